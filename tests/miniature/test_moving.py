"""Digits in motion: films and small models of videos that the real scripts take."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LTXPipeline
from small_films import read_film

from metrics.extractors import load_classifier, load_video_classifier
from miniature import make_moving, moving
from miniature import moving_models as models
from miniature.digits import CLASS_NAMES

make_demo = importlib.import_module("preprocessing.0_make_demo")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moving")
    make_demo.main(["--out", str(out), "--quick", "--moving"])
    return out


@pytest.fixture(scope="module")
def pipeline(made: Path) -> LTXPipeline:
    pipeline = LTXPipeline.from_pretrained(made / "models/ltx-moving")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_digit_has_a_film_and_the_splits_share_none(made):
    digits = {}
    for split in ("train", "val"):
        lines = (made / "clips" / split / "metadata.jsonl").read_text().splitlines()
        listed = {line["file_name"]: line["text"] for line in map(json.loads, lines)}
        assert set(listed) == {file.name for file in (made / "clips" / split).glob("*.mp4")}
        assert len(listed) == moving.QUICK
        digits[split] = {name.partition("_")[0] for name in listed}
        assert len(digits[split]) == moving.QUICK
        assert all(text.endswith(name[5:-4]) for name, text in listed.items())
    assert not digits["train"] & digits["val"]


def test_a_digit_moves_where_its_caption_says(made):
    towards = {}
    for motion in moving.MOTIONS:
        file = next((made / "clips/train").glob(f"*_{motion.split()[1]}.mp4"))
        clip, rate = read_film(file)
        assert (clip.shape, rate) == ((moving.FRAMES, moving.SIDE, moving.SIDE, 3), moving.FPS)
        y, x = np.mgrid[: moving.SIDE, : moving.SIDE]
        grey = clip.mean(-1)
        centres = [((frame * x).sum() / frame.sum(), (frame * y).sum() / frame.sum()) for frame in grey]
        towards[motion] = np.subtract(centres[-1], centres[0]) / (2 * moving.WAY)
    assert np.allclose([*towards.values()], [*moving.MOTIONS.values()], atol=0.15)


def test_the_stock_pipeline_opens_the_folder_and_draws_a_clip(pipeline):
    video = pipeline(
        "a three moving left", height=32, width=32, num_frames=13, frame_rate=8, num_inference_steps=2,
        output_type="np",
    ).frames  # fmt: skip
    assert video.shape == (1, 13, 32, 32, 3)
    assert np.isfinite(video).all()


def test_the_latents_have_the_cells_of_the_teachers_tokens(pipeline, made):
    clips = models.all_clips(moving.load_digits(made, "val")[0][:1])
    assert models.encode(pipeline.vae, clips).shape == (3, 16, 4, 4, 4)


def test_each_word_of_a_caption_is_one_token(pipeline):
    ids = models.tokenize(pipeline.tokenizer, models.captions(CLASS_NAMES))
    assert len({tuple(row) for row in ids["input_ids"].tolist()}) == 31
    assert ids["attention_mask"].sum(1).max() == 5
    assert not (ids["input_ids"] == pipeline.tokenizer.unk_token_id).any()


def test_training_the_text_encoder_tells_captions_apart():
    tokenizer = models.build_tokenizer(CLASS_NAMES)
    with models.small.reproducible(0):
        before = models.measure_caption_cosine(
            tokenizer, models.train_text_encoder(tokenizer, CLASS_NAMES, 1), CLASS_NAMES
        )
    with models.small.reproducible(0):
        after = models.measure_caption_cosine(
            tokenizer, models.train_text_encoder(tokenizer, CLASS_NAMES, 150), CLASS_NAMES
        )
    assert after <= 1 - make_moving.FLOORS["caption_separation"] < before


def test_the_network_starts_as_zero(pipeline):
    latents, text = torch.randn(1, 64, 16), torch.randn(1, 5, models.TEXT)
    out = pipeline.transformer(
        latents,
        text,
        torch.tensor([500.0]),
        torch.ones(1, 5),
        num_frames=4,
        height=4,
        width=4,
        return_dict=False,
    )[0]
    assert torch.equal(out, torch.zeros_like(out))


def test_the_judges_are_classifiers_that_evaluation_takes_and_captions_name_their_classes(made):
    judges = [load_classifier(made / "models/digit-judge", torch.device("cpu"))]
    judges.append(load_video_classifier(made / "models/motion-judge", "cpu"))
    assert [judge.names for judge in judges] == [CLASS_NAMES, list(moving.MOTIONS)]


def test_quality_holds_the_measures_that_have_floors(made):
    quality = json.loads((made / "models/quality.json").read_text())
    assert quality["floors"] == make_moving.FLOORS
    assert set(quality["floors"]) <= {name for of in quality["models"].values() for name in of}


def test_a_second_call_makes_nothing(made, capsys):
    make_demo.main(["--out", str(made), "--quick", "--moving"])
    assert "already complete" in capsys.readouterr().out


def test_moving_and_a_family_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_demo.main(["--out", str(tmp_path), "--quick", "--moving", "--family", "wan"])
    assert "--moving makes a folder of its own" in capsys.readouterr().err
