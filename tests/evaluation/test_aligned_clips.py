"""Alignment of clips on held-out ones: every frame is measured as an image is, and `align` takes all of them."""

import json

import numpy as np
import pytest
import torch
from conftest import run_numbered
from small_films import write_film

import evaluate
import train
from evaluation.heldout import Bench, heldout_images, read_taps
from metrics.similarity import pool_tokens
from metrics.similarity_rows import TeacherSide, tap_metrics
from metrics.spatial import spatial_metrics
from miniature.families import make_pipeline
from training.parts import load_run_model
from training.run_folder import RunFolder

SIZE, GRID, FRAMES, LATENT_FRAMES, HELD_OUT = 32, 4, 5, 2, 16


@pytest.fixture(scope="module")
def run(tmp_path_factory, miniature):
    """A run of two steps of a small Wan on four clips, and sixteen that are held out."""
    root, models = tmp_path_factory.mktemp("clips"), miniature / "models"
    (root / "films").mkdir()
    rng = np.random.default_rng(0)
    for number in range(HELD_OUT + 4):
        base = rng.integers(0, 256, (1, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)  # (1, 32, 32, 3)
        pictures = np.concatenate([np.roll(base, number % 3 * i, axis=2) for i in range(FRAMES + 1)])
        write_film(root / f"films/{number}.mp4", pictures, rate=8)
        (root / f"films/{number}.txt").write_text(f"film {number % 5}")
    make_pipeline("wan", root / "wan")
    run_numbered(
        "1_sample_imagenet_subset", "--videos", root / "films", "--frames", FRAMES, "--fps", 8,
        "--hold-out", HELD_OUT, "--hold-out-csv", root / "val.csv", "--out", root / "train.csv",
    )  # fmt: skip
    for split in ("train", "val"):
        made = ["--csv", root / f"{split}.csv", "--workers", 0]
        base = ["--base", root / "wan", "--image-size", SIZE, "--out", root / f"latents_{split}"]
        run_numbered("2_encode_vae_latents", *made, *base)
        teacher = ["--teacher", models / "dinov2-mini", "--grid", GRID, "--out", root / f"tokens_{split}"]
        run_numbered("3_build_dino_cache", *made, *teacher)
    text = ["--csv", root / "train.csv", "--base", root / "wan", "--out", root / "text"]
    run_numbered("4_prepare_text_embeddings", *text)
    fields = {"csv": "{}.csv", "latents": "latents_{}", "tokens": "tokens_{}"}
    data, held = (
        {name: str(root / path.format(split)) for name, path in fields.items()} for split in ("train", "val")
    )
    config = {"run": str(root / "run"), "model": {"base": str(root / "wan")}}
    config |= {"data": data | {"text": str(root / "text"), "batch_size": 2}, "eval": held | {"batch_size": 4}}
    config |= {"align": {"taps": ["auto"], "head": "mlp", "spatial_norm": 0.6, "manifold_coeff": 0.0}}
    config |= {"teacher": {"model": str(models / "dinov2-mini"), "dim": 64, "grid": GRID}}
    config |= {"train": {"steps": 2, "device": "cpu"}}
    (root / "wan.yaml").write_text(json.dumps(config))
    train.main(["--config", str(root / "wan.yaml")])
    return RunFolder(root / "run")


@torch.no_grad()
def test_taps_and_heads_of_clips_are_those_of_their_frames(run):
    config = run.config
    model = load_run_model(run, 2, torch.device("cpu"), weights="ema")
    bench = Bench(config, heldout_images(config), 0, torch.device("cpu"), lambda: None)
    assert bench.teacher_grid == (LATENT_FRAMES, GRID, GRID)
    ((tap, head),) = model.heads.items()
    features, grids, tokens = read_taps(bench, model, {tap: head}, 250)
    frames, h, w = grids[tap]
    assert (frames, features[tap].shape[:2]) == (LATENT_FRAMES, (HELD_OUT, frames * h * w))
    cosines = []
    teacher = torch.from_numpy(bench.held.teacher).view(HELD_OUT, LATENT_FRAMES, GRID * GRID, -1)
    with model.reading([tap]):
        for start, x_0, noise, text in bench.batches():
            t = bench.path.times(torch.full((len(x_0),), 250))
            model.predict(bench.path(x_0, noise, t)[0], t, text, capture=True)
            captured = model.taps.captured[tap]  # (b, C, f, h, w)
            for frame in range(LATENT_FRAMES):
                image = captured[:, :, frame].float()
                cells = image.flatten(2).transpose(1, 2).numpy()  # (b, h·w, C)
                own = pool_tokens(cells, tuple(image.shape[-2:]), (h, w))
                there = features[tap][start : start + len(x_0), frame * h * w : (frame + 1) * h * w]
                np.testing.assert_allclose(there, own, rtol=1e-5, atol=1e-6)
                wanted = teacher[start : start + len(x_0), frame]
                mean, std = wanted.mean(1, keepdim=True), wanted.std(1, keepdim=True)
                wanted = (wanted - 0.6 * mean) / (std + 1e-6)
                made = head(captured[:, :, frame], (GRID, GRID))
                cosines.append(torch.cosine_similarity(made, wanted, dim=-1).mean().item())
    assert tokens[tap].cosine == pytest.approx(np.mean(cosines), abs=1e-5)


def test_teachers_tokens_and_spatial_metrics_of_clips_are_those_of_frames():
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(40, 3 * 16, 8)).astype(np.float32)  # three frames of 4 × 4
    side = TeacherSide.on((3, 2, 4), teacher, (3, 4, 4), None, k=2, seed=0)
    for frame in range(3):
        own = pool_tokens(teacher[:, 16 * frame : 16 * (frame + 1)], (4, 4), (2, 4))
        np.testing.assert_array_equal(side.tokens[:, 8 * frame : 8 * (frame + 1)], own)
    whole = TeacherSide.on((3, 4, 4), teacher, (3, 4, 4), None, k=2, seed=0)
    assert whole.metrics()["lds"] == spatial_metrics(teacher.reshape(120, 16, 8), (4, 4), seed=0)["lds"]
    found, _ = tap_metrics(teacher @ rng.normal(size=(8, 8)).astype(np.float32), whole)
    assert found["ridge_r2"]["value"] > 0.95 > 0.2 > found["ridge_r2"]["null"]
    with pytest.raises(ValueError, match="differ in their frames"):
        pool_tokens(teacher, (3, 4, 4), (2, 4, 4))


def test_align_measures_clips_and_the_page_tells_of_their_frames(run, tmp_path):
    evaluate.main(["align", str(run.path), "--timesteps", "250"])
    found = json.loads((run.path / "eval/align.json").read_text())
    assert found["num_images"] == HELD_OUT
    assert found["teacher_grid"] == [LATENT_FRAMES, GRID, GRID]
    assert {row["features"] for row in found["rows"]} == {"tap", "head"}
    evaluate.main(["report", str(run.path), "-o", str(tmp_path / "page.html")])
    assert f"on {LATENT_FRAMES} frames of " in (tmp_path / "page.html").read_text()
