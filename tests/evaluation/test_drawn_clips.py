"""Clips from a small video transformer: drawn, kept, resumed, shown and measured."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import demo_overrides, run_numbered
from PIL import Image
from small_films import write_film

import evaluate
import train
from cache.clips import clip_info, read_clip
from cache.image_list import read_samples, write_samples
from cache.text import shown_prompts
from common.errors import UserError
from configs.loading import load_config
from evaluation.image_files import clips_of, load_images, save_images, strips_of
from evaluation.score import load_scorers, measure
from evaluation.score_clips import load_clip_scorer
from metrics.features import Features, FeatureSet
from miniature.families import make_pipeline
from training.ranks import Ranks

SIZE, FRAMES, FPS, FILMS = 32, 5, 8, 6
SETTINGS = ["eval.num_samples=4", "eval.sampling_steps=1", "eval.cfg=1", "eval.bootstrap=0"]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Films of textures that move, their list, latents and text, and a config whose base model is a small Wan."""
    root = tmp_path_factory.mktemp("clips")
    (root / "films").mkdir()
    rng = np.random.default_rng(0)
    for number in range(FILMS):
        base = rng.integers(0, 256, (1, 8, 8, 3), np.uint8).repeat(6, 1).repeat(6, 2)  # (1, 48, 48, 3)
        pictures = np.concatenate([np.roll(base, number * i, axis=2) for i in range(FRAMES + 2)])
        write_film(root / f"films/{number}.mp4", pictures, rate=FPS)
        (root / f"films/{number}.txt").write_text(f"film {number}")
    make_pipeline("wan", root / "wan")
    listing = ["--videos", root / "films", "--frames", FRAMES, "--fps", FPS, "--out", root / "list.csv"]
    run_numbered("1_sample_imagenet_subset", *listing)
    made = ["--csv", root / "list.csv", "--base", root / "wan"]
    more = ["--image-size", SIZE, "--workers", 0]
    run_numbered("2_encode_vae_latents", *made, *more, "--out", root / "latents")
    run_numbered("4_prepare_text_embeddings", *made, "--out", root / "text")
    data = {"csv": root / "list.csv", "latents": root / "latents", "tokens": None, "text": root / "text"}
    config = {"run": str(root / "run"), "model": {"base": str(root / "wan")}}
    config |= {"align": {"taps": ["auto"], "coeff": 0.0}, "teacher": {"source": "online", "model": "none"}}
    config |= {"data": {name: path and str(path) for name, path in data.items()}}
    (root / "wan.yaml").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def drawn(house):
    """The folder of four drawn clips."""
    evaluate.main(["sample", str(house / "wan.yaml"), *SETTINGS])
    return folder_of(house, 0)


def folder_of(house, seed):
    """The folder of the clips that were drawn from this seed on."""
    manifests = {
        path.parent: json.loads(path.read_text()) for path in house.glob("run_base/samples/*/*.json")
    }
    (folder,) = (folder for folder, found in manifests.items() if found["settings"]["seed"] == seed)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".mp4")}


def test_a_drawn_clip_is_one_png_of_the_frames_that_the_codec_decoded(house, tmp_path, monkeypatch):
    decoded, decode = [], evaluate.draw_samples.__globals__["decode_images"]
    monkeypatch.setattr(
        "evaluation.sample.decode_images", lambda *args: decoded.append(decode(*args)) or decoded[-1]
    )
    evaluate.main(["sample", str(house / "wan.yaml"), *SETTINGS, "eval.seed=9"])
    (clips,) = decoded
    assert clips.shape == (4, FRAMES, SIZE, SIZE, 3)
    folder = folder_of(house, 9)
    for index, clip in enumerate(clips):
        picture = np.asarray(Image.open(folder / f"{index:06d}.png"))
        assert picture.shape == (SIZE, FRAMES * SIZE, 3)
        for number, frame in enumerate(clip):
            np.testing.assert_array_equal(picture[:, number * SIZE : (number + 1) * SIZE], frame)
    np.testing.assert_array_equal(clips_of(load_images(folder, range(4)), FRAMES), clips)


def test_strips_and_clips_are_inverse_and_a_wrong_number_of_frames_is_refused():
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
    np.testing.assert_array_equal(clips_of(strips_of(clips), 3), clips)
    with pytest.raises(ValueError, match="4 frames do not stand"):
        clips_of(strips_of(clips), 4)


def test_the_settings_say_frames_and_rate_and_films_stand_beside(drawn):
    settings = json.loads((drawn / "manifest.json").read_text())["settings"]
    assert (settings["frames"], settings["fps"]) == (FRAMES, FPS)
    assert sorted(path.name for path in drawn.glob("*.mp4")) == [f"{i:06d}.mp4" for i in range(4)]
    about = clip_info(drawn / "000000.mp4")
    assert (about.frames, about.fps, about.size) == (FRAMES, FPS, (SIZE, SIZE))


def test_a_drawing_that_was_killed_goes_on_to_the_same_files(house, drawn, monkeypatch):
    whole = files_of(drawn)
    kept = drawn.with_name("kept")
    shutil.move(drawn, kept)
    with monkeypatch.context() as patch:
        patch.setattr("evaluation.sample.write_films", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(["sample", str(house / "wan.yaml"), *SETTINGS])
    assert files_of(drawn) == {name: data for name, data in whole.items() if name.endswith(".png")}
    (drawn / "000002.png").write_bytes(whole["000002.png"][:100])
    (drawn / "000003.png").unlink()
    evaluate.main(["sample", str(house / "wan.yaml"), *SETTINGS])
    assert files_of(drawn) == whole
    shutil.rmtree(kept)


def test_clips_are_not_written_for_adms_evaluator(house):
    with pytest.raises(UserError, match="--npz is for images"):
        evaluate.main(["sample", str(house / "wan.yaml"), "--npz", *SETTINGS])


def test_what_a_flow_or_clips_cannot_have_is_refused(house, tmp_path):
    with pytest.raises(UserError, match=r"eval\.eta is DDIM's, and Wan 2\.1 is sampled by"):
        evaluate.main(["sample", str(house / "wan.yaml"), *SETTINGS, "eval.eta=0.5"])
    with pytest.raises(UserError, match=r"teacher\.source=online is for images"):
        train.main(["--config", str(house / "wan.yaml"), f"run={tmp_path}/run", "align.coeff=0.5"])


def test_clips_that_one_picture_cannot_hold_are_refused_before_they_are_drawn(house, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", FRAMES * SIZE**2 // 2 - 1)
    with pytest.raises(UserError, match="clips of 5 frames of 32 px are too large to be kept as one picture"):
        evaluate.main(["sample", str(house / "wan.yaml"), *SETTINGS, "eval.seed=3"])


def test_a_picture_has_a_row_for_each_clip_and_a_column_for_each_frame(house, drawn, tmp_path):
    evaluate.main(
        ["pictures", str(house / "wan.yaml"), *SETTINGS, "--prompts", "0", "3", "-o", str(tmp_path / "p.png")]
    )
    shown, names = json.loads((tmp_path / "p.json").read_text()), shown_prompts(house / "text")
    assert shown["columns"] == [f"frame {i + 1}" for i in range(FRAMES)]
    assert [re.sub(r".*\n", "", name) for name in shown["rows"]] == [f"{names[i]}, seed {i}" for i in (0, 3)]


def test_previews_of_a_training_are_rows_of_frames(house, tmp_path):
    how = [f"run={tmp_path / 'run'}", "train.steps=2", "train.preview_every=2", "train.preview_images=2"]
    how += ["data.batch_size=2", "train.device=cpu"]
    train.main(["--config", str(house / "wan.yaml"), *SETTINGS, *how])
    (file,) = (tmp_path / "run/previews").glob("*.json")
    shown, names = json.loads(file.read_text()), shown_prompts(house / "text")
    assert shown["columns"] == [f"frame {i + 1}" for i in range(FRAMES)]
    assert list(shown["rows"]) == [f"{names[0]}, seed 0", f"{names[3]}, seed 1"]


@pytest.fixture(scope="module")
def judged(house, miniature):
    """Settings of an image classifier and a video classifier, that see frames and clips."""
    torch.manual_seed(0)
    small = {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    small |= {"num_frames": 4, "intermediate_size": 16, "num_labels": 5}
    network = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**small))
    network.save_pretrained(house / "videomae")
    wants = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}}
    (house / "videomae/preprocessor_config.json").write_text(json.dumps(wants))
    seen = {"extractor": miniature / "models/classifier", "video_extractor": house / "videomae"}
    return [*SETTINGS, *(f"eval.{name}={path}" for name, path in seen.items())]


def test_the_metrics_of_a_run_are_of_all_frames_and_of_whole_clips(house, drawn, judged, capsys):
    evaluate.main(["metrics", str(house / "wan.yaml"), *judged])
    (point,) = map(json.loads, (house / "run_base/eval/points.jsonl").read_text().splitlines())
    assert {
        "classifier_fd20",
        "classifier_kid20",
        "video_motion4",
        "video_difference4",
        "video_fd4",
    } <= point["metrics"].keys()
    assert point["distance_of_halves"].keys() == {"classifier"}
    reference = point["protocol"]["judges"]["classifier"]["reference"]
    assert (reference["num_images"], reference["frames"]) == (FILMS * FRAMES, FRAMES)
    assert point["protocol"]["real_clips"]["clips"] == 4
    assert "video_motion4" in capsys.readouterr().out
    evaluate.main(["metrics", str(house / "wan.yaml"), *judged])
    assert len((house / "run_base/eval/points.jsonl").read_text().splitlines()) == 1


def test_drawn_clips_that_are_the_real_ones_measure_as_the_real_ones(house, judged, tmp_path):
    count = [f"eval.num_samples={FILMS}"]
    config = load_config(house / "wan.yaml", [*judged, *count])
    ranks, device = Ranks(cpu=True), torch.device("cpu")
    samples = read_samples(house / "list.csv")
    real = np.stack(list(map(real_clip, samples)))
    save_images(real, tmp_path, range(FILMS))
    scorer = load_clip_scorer(config, device)
    for _ in range(2):
        found = scorer.compare(tmp_path, range(FILMS), config.eval, ranks)
        names = ("motion", "difference", "flicker", "consistency")
        assert {f"video_{name}{FILMS}" for name in names} <= found.keys()
        assert found.pop(f"video_fd{FILMS}", {"value": 0})["value"] == pytest.approx(0, abs=1e-6)
        assert all(of["value"] == of["real"] for of in found.values())
    scorers = load_scorers(config, device, ranks)
    frames = measure(tmp_path, range(FILMS), None, scorers, config.eval, device, ranks, FRAMES)
    assert frames[f"classifier_fd{FILMS * FRAMES}"]["value"] == pytest.approx(0, abs=1e-4)
    assert frames[f"classifier_precision{FILMS * FRAMES}"]["value"] == 1
    save_images(real[:, :1].repeat(FRAMES, 1), tmp_path / "still", range(FILMS))
    still = scorer.compare(tmp_path / "still", range(FILMS), config.eval, ranks)
    assert still[f"video_motion{FILMS}"]["value"] == 0 < still[f"video_motion{FILMS}"]["real"]
    same = still[f"video_consistency{FILMS}"]
    assert same["real"] < same["value"] == pytest.approx(1)


def test_captions_that_name_the_classes_of_the_judges_give_accuracies(house, judged, tmp_path):
    config = load_config(house / "wan.yaml", [*judged, f"eval.num_samples={FILMS}"])
    ranks, device = Ranks(cpu=True), torch.device("cpu")
    real = np.stack(list(map(real_clip, read_samples(house / "list.csv"))))
    save_images(real, tmp_path, range(FILMS))
    clips, (frames,) = load_clip_scorer(config, device), load_scorers(config, device, ranks)
    clips.extractor.names, seen = (
        ["left", "right", "up", "down", "still"],
        clips.extractor.features(real).labels,
    )
    captions = [f"it goes {clips.extractor.names[label]}" for label in seen]
    found = clips.compare(tmp_path, range(FILMS), config.eval, ranks, captions)
    assert found[f"video_accuracy{FILMS}"]["value"] == 1
    assert not any("accuracy" in name for name in clips.compare(tmp_path, range(FILMS), config.eval, ranks))
    of_frames = frames.extractor.features(real.reshape(-1, *real.shape[2:])).labels.reshape(FILMS, FRAMES)
    named = ["a seven"] * FILMS
    right = (of_frames == frames.extractor.names.index("seven")).mean()
    measured = measure(tmp_path, range(FILMS), named, [frames], config.eval, device, ranks, FRAMES)
    assert measured[f"classifier_accuracy{FILMS * FRAMES}"]["value"] == pytest.approx(right)


def test_the_frames_of_the_clips_of_several_processes_come_back_in_order():
    values = np.arange(5 * 3, dtype=np.float32).reshape(5, 3, 1)  # clips, frames, features
    parts = [FeatureSet().add(Features(values[rank::2].reshape(-1, 1), None, None)) for rank in range(2)]
    np.testing.assert_array_equal(FeatureSet.interleave(parts, 3).pool, values.reshape(-1, 1))


def test_held_out_clips_are_the_real_ones_where_there_are_any_and_must_be_like_the_drawn(
    house, judged, tmp_path
):
    samples = read_samples(house / "list.csv")
    write_samples(tmp_path / "val.csv", samples[-2:])
    config = load_config(house / "wan.yaml", [*judged, f"eval.csv={tmp_path / 'val.csv'}"])
    scorer = load_clip_scorer(config, "cpu")
    assert (list(scorer.clips), scorer.identity["source"]) == (samples[-2:], "val.csv")
    short = (tmp_path / "val.csv").read_text().replace(f",{FRAMES},", f",{FRAMES - 1},")
    (tmp_path / "val.csv").write_text(short)
    with pytest.raises(UserError, match=r"val.csv does not list clips of 5 frames at 8 a second"):
        load_clip_scorer(config, "cpu")


def real_clip(sample):
    return read_clip(sample.img_path, sample.start, sample.frames, sample.fps, SIZE)


def test_a_network_for_clips_is_refused_for_images(miniature, tmp_path):
    config = load_config(
        "configs/demo.yaml", [*demo_overrides(miniature, tmp_path), "eval.video_extractor=x"]
    )
    with pytest.raises(UserError, match="the run is of images"):
        load_clip_scorer(config, "cpu")


def test_the_page_plays_films_and_shows_the_numbers_of_real_clips(house, drawn, judged, tmp_path):
    evaluate.main(["metrics", str(house / "wan.yaml"), *judged])
    evaluate.main(["report", str(house / "wan.yaml"), "-o", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    films = re.findall(r'<video controls loop muted playsinline src="data:video/mp4;base64,([^"]+)"', page)
    assert len(films) == 3
    (tmp_path / "a.mp4").write_bytes(base64.b64decode(films[0]))
    about = clip_info(tmp_path / "a.mp4")
    assert (about.frames, about.fps) == (FRAMES, FPS)
    assert "media-src data:" in page
    assert f"4 clips of {FRAMES} frames at {FPS} a second" in page
    assert f"({FILMS * FRAMES} real frames)" in page
    assert "beside 4 real clips of list.csv" in page
    for row, arrow in (("video_motion4", ""), ("video_difference4", ""), ("video_fd4", " ↓")):
        assert re.search(f"<td>{row}{arrow}</td><td[^>]*>[^<]+", page), row
    assert re.search(r"video_motion4</td><td[^>]*>[^<]+\(real [0-9.e-]+\)", page)
    strips = json.loads((tmp_path / "page_figures/pictures_0.json").read_text())
    assert strips["columns"] == [f"frame {i + 1}" for i in range(FRAMES)]
