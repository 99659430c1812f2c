"""Clips from a small video transformer: drawn, kept, resumed, shown and measured."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import run_numbered
from PIL import Image
from small_films import write_film

import evaluate
import train
from cache.clips import clip_info
from cache.text import shown_prompts
from common.errors import UserError
from evaluation.image_files import clips_of, load_images, strips_of
from miniature.families import make_pipeline

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
