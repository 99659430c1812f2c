"""Latents and tokens of clips: scripts 2, 3, 4 and 5 on a list of clips, against the codec and the teacher called by hand."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import run_numbered
from PIL import Image
from small_films import write_film

import train
from cache.clips import read_clip
from cache.dataset import AlignedDataset
from cache.image_list import read_samples
from cache.manifest import read_manifest
from cache.reader import FieldReader
from common.errors import UserError
from miniature.families import make_pipeline
from models.families.table import family_of
from models.teachers.table import load_teacher
from preprocessing import pipeline
from preprocessing.encoders import frames_of_latents

SIZE, GRID, FRAMES, FPS = 32, 3, 9, 8


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Three films, one of them too short for its second window as the file says it is long; tiny models; both fields."""
    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    (root / "films").mkdir()
    for name in ("a", "b", "c"):
        base = rng.integers(0, 256, (1, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)  # (1, 48, 64, 3)
        pictures = np.concatenate([np.roll(base, 3 * i, axis=2) for i in range(20)])
        write_film(root / f"films/{name}.mp4", pictures, rate=FPS)
        (root / f"films/{name}.txt").write_text(f"film {name}")
    for family in ("wan", "ltxvideo"):
        make_pipeline(family, root / family)
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=42, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(root / "teacher")
    listed(root, "list.csv")
    latents(root, "latents")
    tokens(root, "tokens")
    return root


def listed(root, out, *more, frames=FRAMES):
    run_numbered(
        "1_sample_imagenet_subset", "--videos", root / "films", "--frames", frames, "--fps", FPS, "--windows", 2, "--out",
        root / out, *more,
    )  # fmt: skip


def encoding(root, out, more):
    given = {"--csv": root / "list.csv", "--workers": 0, "--out": root / out}
    given |= dict(zip(more[::2], more[1::2], strict=True))
    return [part for pair in given.items() for part in pair]


def latents(root, out, *more, base="wan"):
    run_numbered(
        "2_encode_vae_latents", "--base", root / base, "--image-size", SIZE, *encoding(root, out, more)
    )


def tokens(root, out, *more):
    run_numbered(
        "3_build_dino_cache", "--teacher", root / "teacher", "--grid", GRID, *encoding(root, out, more)
    )


def checksums(root, name, field):
    return [shard["checksum"] for shard in read_manifest(root / name, field)["shards"]]


def pixels_of(sample, size):
    clip = read_clip(sample.img_path, sample.start, sample.frames, sample.fps, size)
    return torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float()  # (1, 3, F, S, S)


@pytest.mark.parametrize("base", ["wan", "ltxvideo"])
def test_latents_are_the_codecs_own_of_each_clip(house, tmp_path, base):
    latents(house, tmp_path / "latents", base=base)
    samples, reader = read_samples(house / "list.csv"), FieldReader(tmp_path / "latents", "latents")
    codec = family_of(str(house / base)).load_codec()
    stored = reader.read([sample.id for sample in samples]).float()
    with torch.no_grad():
        made = torch.cat([codec.encode(pixels_of(sample, SIZE) / 127.5 - 1) for sample in samples])
    assert stored.shape[2:] == (1 + (FRAMES - 1) // codec.frames, SIZE // codec.down, SIZE // codec.down)
    torch.testing.assert_close(stored, made, atol=2e-3, rtol=2e-3)
    assert reader.spec.view == {"kind": "aligned", "size": SIZE, "frames": FRAMES, "fps": FPS}


@pytest.mark.parametrize(("pick", "per_latent"), [("middle", 4), ("mean", 4), ("middle", 8), ("mean", 8)])
def test_tokens_of_a_latent_frame_are_those_of_the_frames_that_it_is_made_of(
    house, tmp_path, pick, per_latent
):
    """A reference frame by frame, with the teacher called for one picture at a time."""
    tokens(house, tmp_path / "t", "--frames-of-teacher", pick, "--frames-per-latent", per_latent)
    sample = read_samples(house / "list.csv")[1]
    reader = FieldReader(tmp_path / "t", "tokens")
    teacher = load_teacher(str(house / "teacher"), GRID)
    pictures = pixels_of(sample, teacher.size)[0].movedim(1, 0) / 255  # (F, 3, S, S)
    of_frame = [F.normalize(teacher(picture[None])[0], dim=-1) for picture in pictures]
    expected = [of_frame[0]]
    for first in range(1, FRAMES, per_latent):
        if pick == "middle":
            expected.append(of_frame[first + per_latent // 2])
        else:
            expected.append(F.normalize(torch.stack(of_frame[first : first + per_latent]).mean(0), dim=-1))
    found = reader.read([sample.id])[0].float()
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-3, rtol=2e-3)
    assert reader.spec.view["latent_frames"] == 1 + (FRAMES - 1) // per_latent
    assert reader.spec.view["frames_of_teacher"] == pick


def test_every_frame_belongs_to_one_latent_frame():
    for frames, per_latent in ((17, 4), (17, 8), (1, 4), (5, 4)):
        groups = frames_of_latents(frames, per_latent, "mean")
        assert [number for group in groups for number in group] == list(range(frames))
        assert len(groups) == 1 + (frames - 1) // per_latent
        middle = frames_of_latents(frames, per_latent, "middle")
        assert all(one[0] in group for one, group in zip(middle, groups, strict=True))


@pytest.mark.parametrize("base", ["wan", "ltxvideo"])
def test_one_pass_makes_both_fields_as_two_do_and_takes_the_grouping_of_the_vae(house, tmp_path, base):
    latents(
        house,
        tmp_path / "l",
        "--fused",
        tmp_path / "t",
        "--teacher",
        house / "teacher",
        "--grid",
        GRID,
        base=base,
    )
    per_latent = {"wan": 4, "ltxvideo": 8}[base]
    tokens(house, tmp_path / "alone", "--frames-per-latent", per_latent)
    latents(house, tmp_path / "latents", base=base)
    assert checksums(tmp_path, "t", "tokens") == checksums(tmp_path, "alone", "tokens")
    assert checksums(tmp_path, "l", "latents") == checksums(tmp_path, "latents", "latents")


def test_neither_batches_nor_processes_nor_interruptions_change_a_cache(house, tmp_path, monkeypatch):
    shards = ("--shard-size", 2)
    tokens(house, tmp_path / "whole", *shards, "--dtype", "int8")
    tokens(
        house,
        tmp_path / "parts",
        *shards,
        "--dtype",
        "int8",
        "--batch-size",
        3,
        "--workers",
        2,
        "--shard",
        "0/2",
    )
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return put(*args)

    put = pipeline.FieldWriter.put
    second = *shards, "--dtype", "int8", "--shard", "1/2"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.FieldWriter, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens(house, tmp_path / "parts", *second, "--batch-size", 1)
    tokens(house, tmp_path / "parts", *second)
    assert checksums(tmp_path, "whole", "tokens") == checksums(tmp_path, "parts", "tokens")


def test_moments_and_draws_of_clips_are_those_of_the_posterior(house, tmp_path):
    for kept in ("moments", "sample"):
        latents(house, tmp_path / kept, "--posterior", kept)
    mode = FieldReader(house / "latents", "latents")
    moments, drawn = (FieldReader(tmp_path / kept, "latents") for kept in ("moments", "sample"))
    ids = mode.ids
    mean, std = moments.read(ids).float().chunk(2, dim=1)
    torch.testing.assert_close(mean, mode.read(ids).float())
    assert ((drawn.read(ids).float() - mean).abs() <= 6 * std + 2e-2).all()
    assert not drawn.read(ids).equal(mode.read(ids))


def test_a_film_that_breaks_after_it_was_listed_is_noted_and_the_rest_goes_on(house, tmp_path, capsys):
    films = tmp_path / "films"
    films.mkdir()
    for path in sorted((house / "films").iterdir()):
        os.link(path, films / path.name)
    listed(tmp_path, "list.csv")
    data = (films / "b.mp4").read_bytes()
    (films / "b.mp4").unlink()
    (films / "b.mp4").write_bytes(data[: len(data) // 2])
    tokens(house, tmp_path / "tokens", "--csv", tmp_path / "list.csv")
    manifest = read_manifest(tmp_path / "tokens", "tokens")
    assert (manifest["num_samples"], manifest["num_unreadable"]) == (4, 2)
    assert "2 clips could not be read" in capsys.readouterr().err
    assert "b.mp4" in (tmp_path / "tokens/unreadable.csv").read_text()


def test_a_list_of_the_wrong_kind_or_length_is_one_line(house, tmp_path, miniature):
    with pytest.raises(UserError, match=r"lists images and Wan .* make a list with script 1 and --videos"):
        latents(house, tmp_path / "l", "--csv", miniature / "train.csv")
    with pytest.raises(UserError, match=r"lists clips and Stable Diffusion .* --images"):
        latents(house, tmp_path / "l", base=miniature / "models/sd15-mini")
    listed(house, "five.csv", frames=5)
    with pytest.raises(UserError, match="clips of 5 frames are not 8 k"):
        latents(house, tmp_path / "l", "--csv", house / "five.csv", base="ltxvideo")
    with pytest.raises(UserError, match="clips of 9 frames are not 3 k"):
        tokens(house, tmp_path / "t", "--frames-per-latent", 3)


def test_script_5_checks_clips_and_draws_three_frames_of_each(house, tmp_path, capsys, monkeypatch):
    run_numbered(
        "4_prepare_text_embeddings",
        "--csv",
        house / "list.csv",
        "--base",
        house / "wan",
        "--out",
        house / "text",
    )
    fields = ["--csv", house / "list.csv", "--latents", house / "latents", "--text", house / "text"]
    from importlib import import_module

    # The tiny VAE is not trained, so what it decodes is nothing like the clip.
    monkeypatch.setattr(import_module("preprocessing.5_verify_cache"), "PSNR_FLOOR", 0)
    run_numbered(
        "5_verify_cache", *fields, "--tokens", house / "tokens", "--sheet", tmp_path / "s.png", "--full"
    )
    out = capsys.readouterr().out
    assert "6 of 6 clips are in both fields" in out
    assert "9 frames at 8.0 a second are 3 latent frames" in out
    assert Image.open(tmp_path / "s.png").width > 4 * 3 * 192
    tokens(house, tmp_path / "other", "--frames-per-latent", 8)
    with pytest.raises(SystemExit):
        run_numbered("5_verify_cache", *fields, "--tokens", tmp_path / "other")
    assert "FAIL 9 frames" in capsys.readouterr().out


def test_a_network_is_aligned_on_clips_from_films_to_a_lora(house, tmp_path, capsys):
    text = tmp_path / "text"
    run_numbered(
        "4_prepare_text_embeddings", "--csv", house / "list.csv", "--base", house / "wan", "--out", text
    )
    paths = {"run": tmp_path / "run", "model.base": house / "wan", "teacher.model": house / "teacher"}
    paths |= {f"data.{name}": house / name for name in ("latents", "tokens")}
    paths |= {"data.csv": house / "list.csv", "data.text": text}
    settings = {
        "data.batch_size": 1,
        "train.steps": 2,
        "train.log_every": 1,
        "teacher.dim": 64,
        "teacher.grid": GRID,
    }
    settings |= {"align.neighbours": 1, "optim.warmup_fraction": 0.0, "train.device": "cpu"}
    train.main(
        ["--config", "configs/families/wan.yaml", *(f"{k}={v}" for k, v in (paths | settings).items())]
    )
    said = capsys.readouterr().out
    assert "6 captioned clips, 3 different prompts" in said
    assert f"→ 3×{GRID}×{GRID};" in said  # the loss knows of frames, so that there are neighbours
    assert list((tmp_path / "run/export").rglob("*.safetensors"))


def test_the_dataset_joins_clips_and_refuses_fields_of_other_moments(house, tmp_path):
    run_numbered(
        "4_prepare_text_embeddings", "--csv", house / "list.csv", "--base", house / "wan", "--out", tmp_path / "text"
    )  # fmt: skip
    parts = house / "latents", house / "tokens", tmp_path / "text"
    dataset = AlignedDataset(house / "list.csv", *parts)
    item = dataset[0]
    assert item["latent"].shape[1:] == (3, 4, 4)
    assert item["dino_tokens"].shape == (3 * GRID**2, 64)
    assert dataset.token_grid == (GRID, GRID)
    listed(house, "other.csv", frames=13)
    with pytest.raises(
        UserError, match=r"clips of 9 frames at 8 a second, and .*other.csv lists clips of 13"
    ):
        AlignedDataset(house / "other.csv", *parts)
    tokens(house, tmp_path / "eight", "--frames-per-latent", 8)
    with pytest.raises(UserError, match="tokens of 2 latent frames"):
        AlignedDataset(house / "list.csv", house / "latents", tmp_path / "eight", tmp_path / "text")
