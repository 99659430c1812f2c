"""Images that are no squares: every script, training, sampling and the measures of alignment on a 2:1 crop."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import run_numbered
from PIL import Image

import evaluate
import train
from cache.image_list import read_samples
from cache.reader import FieldReader
from common.errors import UserError
from configs.loading import load_config
from evaluation.score import photographs, training_images
from miniature.families import make_pipeline
from models.families.table import family_of
from models.teachers.table import load_teacher
from training.parts import build_parts
from training.run_folder import RunFolder

WIDTH, HEIGHT = 64, 32
GRID = (
    3,
    5,
)  # not exactly 2:1, so the teacher must be told of the crop; finer than the network's 2 × 4 cells


@pytest.fixture(scope="module")
def wide(miniature, tmp_path_factory):
    """Captioned images of several shapes, their 2:1 caches for a tiny Stable Diffusion 3, and settings: [root, overrides]."""
    root = tmp_path_factory.mktemp("wide")
    (root / "photos").mkdir()
    make_pipeline("sd3", root / "sd3")
    rng = np.random.default_rng(0)
    with open(root / "photos/metadata.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file_name", "text"])
        for i in range(32):
            small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8))
            small.resize([(150, 70), (150, 80), (90, 120)][i % 3]).save(root / f"photos/{i}.png")
            lines.writerow([f"{i}.png", f"photo {i}"])
    lists = ["--out", root / "train.csv", "--hold-out", 16, "--hold-out-csv", root / "val.csv"]
    run_numbered("1_sample_imagenet_subset", "--images", root / "photos", *lists)
    for split in ("train", "val"):
        tokens(miniature, root, root / split / "tokens", split=split)
        latents(root, root / split / "latents", split=split)
    text = ["--csv", root / "train.csv", "--base", root / "sd3", "--out", root / "text"]
    run_numbered("4_prepare_text_embeddings", *text)
    places = {
        "model.base": "sd3",
        "data.csv": "train.csv",
        "data.text": "text",
        "data.latents": "train/latents",
        "data.tokens": "train/tokens",
        "eval.csv": "val.csv",
        "eval.latents": "val/latents",
        "eval.tokens": "val/tokens",
        "run": "run",
    }
    settings = [f"{key}={root / place}" for key, place in places.items()]
    settings += ["teacher.model=null", "teacher.dim=64", f"teacher.grid={list(GRID)}", "data.batch_size=4"]
    settings += ["optim.accumulate=1", "train.steps=10", "train.log_every=5", "train.precision=fp32"]
    return root, [*settings, "eval.num_samples=4", "eval.sampling_steps=2", "eval.cfg=1.0"]


def latents(root, out, *more, split="train", size=f"{WIDTH}x{HEIGHT}"):
    few = ["--csv", root / f"{split}.csv", "--workers", 0, "--batch-size", 8, "--out", out]
    run_numbered("2_encode_vae_latents", *few, "--base", root / "sd3", "--size", size, *more)


def tokens(miniature, root, out, size=(WIDTH, HEIGHT), grid=GRID, split="train"):
    few = ["--csv", root / f"{split}.csv", "--workers", 0, "--batch-size", 8, "--out", out]
    seen = [] if size is None else ["--size", "x".join(map(str, size))]
    teacher = ["--teacher", miniature / "models/dinov2-mini", "--grid", f"{grid[1]}x{grid[0]}"]
    run_numbered("3_build_dino_cache", *few, *teacher, *seen)


def config_of(overrides, *more):
    return load_config("configs/families/sd3.yaml", [*overrides, *more])


@pytest.fixture(scope="module")
def run(wide):
    root, overrides = wide
    train.main(["--config", "configs/families/sd3.yaml", *overrides, "train.preview_every=10"])
    return root / "run"


def by_hand(path):
    """The central 2:1 crop of an image."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    w, h = min(width, 2 * height), min(height, width // 2)
    left, top = round((width - w) / 2), round((height - h) / 2)
    return image.crop((left, top, left + w, top + h))


@torch.no_grad()
def test_both_fields_are_of_the_same_crop_and_say_so(wide, miniature):
    root, _ = wide
    latents, tokens = (FieldReader(root / "train" / name, name) for name in ("latents", "tokens"))
    assert latents.spec.view == {"kind": "aligned", "size": [HEIGHT, WIDTH]}
    assert tokens.spec.view == {
        "kind": "aligned", "size": [24, 40], "patch": 8, "grid": [3, 5], "crop": [HEIGHT, WIDTH],
    }  # fmt: skip
    assert latents.spec.shape[1:] == (4, 8)
    assert tokens.spec.shape == (15, 64)
    codec = family_of(str(root / "sd3")).load_codec()
    teacher = load_teacher(str(miniature / "models/dinov2-mini"), GRID)
    for sample in read_samples(root / "train.csv")[:6]:
        crop = by_hand(sample.img_path)
        pixels = torch.from_numpy(np.array(crop.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)))
        x_0 = codec.encode(pixels.movedim(-1, 0)[None].float() / 127.5 - 1)
        torch.testing.assert_close(latents.read([sample.id]).float(), x_0, atol=5e-3, rtol=5e-3)
        pixels = torch.from_numpy(np.array(crop.resize((40, 24), Image.Resampling.BICUBIC)))
        seen = torch.nn.functional.normalize(teacher(pixels.movedim(-1, 0)[None].float() / 255), dim=-1)
        torch.testing.assert_close(tokens.read([sample.id]).float(), seen, atol=5e-3, rtol=5e-3)


def test_script_5_checks_them_and_draws_them(wide, capsys):
    root, _ = wide
    fields = [f"--{name}={root / 'train' / name}" for name in ("latents", "tokens")]
    rest = ["--csv", root / "train.csv", "--text", root / "text", "--sheet", root / "sheet.png"]
    with pytest.raises(SystemExit):  # an untrained VAE decodes no image
        run_numbered("5_verify_cache", *fields, *rest)
    said = capsys.readouterr().out
    assert "grid 3 × 5" in said
    assert "ok   the VAE saw the central crop at 64x32 px, the teacher the same at 40x24 px" in said
    failed = [line for line in said.splitlines() if line.startswith("FAIL")]
    assert [line[:25] for line in failed] == ["FAIL decoded latents are "]
    with Image.open(root / "sheet.png") as sheet:
        assert sheet.height == 22 + 3 * (96 + 8)


def test_samples_and_pictures_have_the_size_of_the_training_images(run):
    evaluate.main(["sample", str(run)])
    files = sorted((run / "samples").rglob("*.png"))
    assert len(files) == 4
    assert {Image.open(file).size for file in files} == {(WIDTH, HEIGHT)}
    evaluate.main(["pictures", str(run), "-o", str(run / "p.png")])
    assert (run / "p.png").exists()
    assert list((run / "previews").glob("*.png"))


def test_the_reference_is_made_of_the_training_crops_and_a_network_of_squares_refuses_them(run, miniature):
    config = RunFolder(run).config
    paths, facts = training_images(config)
    assert json.loads(json.dumps(facts))["size"] == [HEIGHT, WIDTH]
    (chunk,) = photographs(paths, facts["size"])
    expected = by_hand(paths[5]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(chunk[5], expected)
    with pytest.raises(
        UserError, match="classifier takes images of the shape 32 × 32, and 64 × 32 would be squashed"
    ):
        evaluate.main(["metrics", str(run), f"eval.extractor={miniature / 'models/classifier'}"])


def test_align_measures_on_the_coarser_grid_of_each_direction(run):
    evaluate.main(["align", str(run), "--num-images", "16", "--timesteps", "250"])
    found = json.loads((run / "eval/align.json").read_text())
    assert found["teacher_grid"] == [3, 5]
    assert list(found["tap_grids"].values()) == [[2, 4]]
    assert np.isfinite(found["heldout_loss_diff"])


def test_the_online_teacher_sees_the_whole_crop(wide, miniature):
    _, overrides = wide
    online = [
        "teacher.source=online",
        f"teacher.model={miniature / 'models/dinov2-mini'}",
        "data.tokens=null",
    ]
    parts = build_parts(config_of(overrides, *online, "teacher.grid=[4, 8]"))
    batch = next(iter(train.open_stream(parts, first_step=0)))
    ready = parts.batches(batch, torch.Generator().manual_seed(0), with_tokens=True)
    assert ready.grid == (4, 8)
    assert ready.tokens.shape == (4, 32, 64)
    pixels = (parts.family.load_codec().decode(ready.x_0) / 2 + 0.5).clamp(
        0, 1
    )  # (4, 3, 32, 64), the teacher's own size
    teacher = load_teacher(str(miniature / "models/dinov2-mini"), (4, 8))
    torch.testing.assert_close(ready.tokens, torch.nn.functional.normalize(teacher(pixels), dim=-1))


def test_other_crops_and_turned_grids_are_one_line(wide, miniature, tmp_path):
    root, overrides = wide
    for grid, said in (
        ("[5, 3]", r"teacher\.grid = \[5, 3\] is not of the shape"),
        ("4", "is not of the shape"),
    ):
        with pytest.raises(UserError, match=said):
            build_parts(config_of(overrides, f"teacher.grid={grid}"))
    with pytest.raises(UserError, match=r"holds tokens \(15, 64\) on a grid \(3, 5\)"):
        build_parts(config_of(overrides, "teacher.grid=[4, 8]"))
    with pytest.raises(UserError, match=r"2 to 256 tokens per side were expected, or \[height, width\]"):
        config_of(overrides, "teacher.grid=[4, 8, 2]")
    tokens(miniature, root, tmp_path / "own", size=None)
    with pytest.raises(
        UserError, match=r"crops of 40x24, .* of crops of 64x32: run script 3 with --size 64x32"
    ):
        build_parts(config_of(overrides, f"data.tokens={tmp_path / 'own'}"))
    with pytest.raises(UserError, match="a grid of 4 has not the shape of --size 64x32"):
        tokens(miniature, root, tmp_path / "square", grid=(4, 4))
    with pytest.raises(
        UserError, match="--size 64x40 is not a multiple of 16, the VAE's down-sampling times"
    ):
        latents(root, tmp_path / "odd", size="64x40")


def test_a_square_given_as_width_and_height_is_the_square(wide, tmp_path):
    root, _ = wide
    latents(root, tmp_path / "a", size="32x32")
    few = ["--csv", root / "train.csv", "--workers", 0, "--batch-size", 8, "--out", tmp_path / "b"]
    run_numbered("2_encode_vae_latents", *few, "--base", root / "sd3", "--image-size", 32)
    a, b = ((tmp_path / name / "manifest.json").read_bytes() for name in "ab")
    assert json.loads(b)["view"] == {"kind": "aligned", "size": 32}
    same = [{**json.loads(text), "shards": None, "seal": None} for text in (a, b)]
    assert same[0] == same[1]
