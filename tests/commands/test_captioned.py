"""A captioned folder from script 1 to samples: what has classes elsewhere goes on without them, and says so."""

import csv
import json

import pytest
from conftest import DATA_PATHS, EVAL_PATHS, demo_overrides, run_numbered
from PIL import Image

import evaluate
import train
from cache.image_list import different_prompts, read_samples
from cache.text import prompts_of_text
from common.errors import UserError
from configs.loading import load_config
from training.parts import build_parts
from training.self_test import self_test

# Images of each list; two of all share a prompt.
FEW = 24
CAPTION = "the digit {} costs $5 or $6"


@pytest.fixture(scope="module")
def captioned(miniature, tmp_path_factory):
    """Digits with captions, their lists and caches, and a run of them: [root, overrides]."""
    root = tmp_path_factory.mktemp("captioned")
    photos = root / "photos"
    photos.mkdir()
    rows = read_samples(miniature / "train.csv") + read_samples(miniature / "val.csv")
    with open(photos / "metadata.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file_name", "text"])
        for i, row in enumerate(rows[: 2 * FEW]):
            Image.open(row.img_path).save(photos / f"{i}.png")
            lines.writerow([f"{i}.png", CAPTION.format(max(i, 1))])
    lists = ["--out", root / "train.csv", "--hold-out", FEW, "--hold-out-csv", root / "val.csv"]
    run_numbered("1_sample_imagenet_subset", "--images", photos, *lists)
    models = miniature / "models"
    for split, cache in (("train", "cache"), ("val", "cache_val")):
        encoding = ["--csv", root / f"{split}.csv", "--workers", 0, "--batch-size", 8]
        latents = ["--base", models / "sd15-mini", "--image-size", 32, "--out", root / cache / "latents"]
        run_numbered("2_encode_vae_latents", *encoding, *latents)
        tokens = ["--teacher", models / "dinov2-mini", "--grid", 4, "--out", root / cache / "tokens"]
        run_numbered("3_build_dino_cache", *encoding, *tokens)
    text = ["--csv", root / "train.csv", "--base", models / "sd15-mini", "--out", root / "cache/text"]
    run_numbered("4_prepare_text_embeddings", *text)
    data, held_out = DATA_PATHS.items(), EVAL_PATHS.items()
    paths = [f"data.{name}={root / path}" for name, path in data]
    paths += [f"eval.{name}={root / path}" for name, path in held_out if name != "extractor"]
    overrides = demo_overrides(miniature, root / "run", *paths)
    return root, overrides


@pytest.fixture(scope="module")
def run(captioned):
    root, overrides = captioned
    shown = prompts_of_text(root / "cache/text")[3]
    previews = ["train.preview_every=6", "train.preview_images=2", f"train.preview_prompts=['{shown}','1']"]
    train.main(["--config", "configs/demo.yaml", *overrides, *previews])
    return root / "run"


def test_scripts_2_and_3_take_a_captioned_list_and_script_5_checks_its_prompts(captioned, miniature, capsys):
    root, _ = captioned
    fields = [f"--{name}={root / 'cache' / name}" for name in ("latents", "tokens")]
    run_numbered("5_verify_cache", "--csv", root / "train.csv", *fields, "--text", root / "cache/text")
    number = len(different_prompts(read_samples(root / "train.csv")))
    assert f"has {number} of the {number} different prompts" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_numbered(
            "5_verify_cache", "--csv", root / "train.csv", *fields, "--text", miniature / "cache/text"
        )
    assert (
        f"has 0 of the {number} different prompts of the CSV, {number} are missing" in capsys.readouterr().out
    )


def test_each_image_is_trained_with_its_own_prompt_and_the_self_test_counts_them(captioned, capsys):
    root, overrides = captioned
    parts = build_parts(load_config("configs/demo.yaml", overrides))
    prompts, dataset = prompts_of_text(root / "cache/text"), parts.dataset
    samples = {sample.id: sample.prompt for sample in read_samples(root / "train.csv")}
    assert [prompts[label] for label in dataset.labels] == [samples[key] for key in dataset.ids]
    self_test(parts)
    assert f"{FEW} captioned images, {len(prompts)} different prompts" in capsys.readouterr().out


def test_a_prompt_that_the_text_lacks_is_one_line(captioned, miniature):
    _, overrides = captioned
    config = load_config("configs/demo.yaml", [*overrides, f"data.text={miniature / 'cache/text'}"])
    with pytest.raises(UserError, match=r"lacks the prompt of .*: run script 4 with --csv"):
        build_parts(config)


def test_previews_show_the_prompts_that_are_asked_for(run):
    (file,) = (run / "previews").glob("*.json")
    prompts = prompts_of_text(run.parent / "cache/text")
    assert json.loads(file.read_text())["column_labels"] == [prompts[3], prompts[1]]


def test_a_preview_prompt_that_the_text_lacks_is_refused_before_the_first_step(captioned, tmp_path):
    _, overrides = captioned
    more = [f"run={tmp_path / 'run'}", "train.preview_every=2", "train.preview_prompts=[a cat]"]
    with pytest.raises(UserError, match=r"train.preview_prompts 'a cat': .* script 4 with --prompts FILE"):
        train.main(["--config", "configs/demo.yaml", *overrides, *more])


def test_align_leaves_out_what_needs_classes_and_says_so(run, capsys):
    evaluate.main(["align", str(run), "--num-images", str(FEW), "--timesteps", "250"])
    assert (
        "val.csv has captions and no classes: the linear probe by class is left out"
        in capsys.readouterr().out
    )
    found = json.loads((run / "eval/align.json").read_text())
    metrics = {name for row in found["rows"] for name in row["metrics"]} | set(found["teacher"]["mid"])
    assert "cca" in metrics
    assert "probe" not in metrics


def test_samples_are_measured_without_an_accuracy_by_class_and_drawn_by_prompt(run, capsys):
    evaluate.main(["metrics", str(run)])
    said = capsys.readouterr().out
    assert "accuracy by class is left out" in said
    (point,) = map(json.loads, (run / "eval/points.jsonl").read_text().splitlines())
    assert "classifier_fd20" in point["metrics"]
    assert not any("accuracy" in name for name in point["metrics"])
    prompt = prompts_of_text(run.parent / "cache/text")[5]
    evaluate.main(["pictures", str(run), "-o", str(run / "p.png"), "--prompts", prompt, "0"])
    assert json.loads((run / "p.json").read_text())["columns"][0] == prompt
    for wrong, says in (("a cat", "script 4 with --prompts FILE"), ("99", "are 0 to")):
        with pytest.raises(UserError, match=says):
            evaluate.main(["pictures", str(run), "-o", str(run / "q.png"), "--prompts", wrong])
    evaluate.main(["report", str(run), "-o", str(run / "page.html")])
    page = (run / "page.html").read_text()
    assert "linear probe" not in page
