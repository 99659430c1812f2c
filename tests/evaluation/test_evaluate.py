"""evaluate_sd15.py on small runs: points, curves, references, pictures and the page; nothing is measured or drawn twice."""

import html
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fork_server import run_both, said, start
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import CONFIG, assert_same_run, demo_overrides, stopped_at, train

import evaluate as evaluate_script
from cache.manifest import write_manifest
from cache.views import read_view
from common.errors import UserError
from configs.loading import knobs, load_config
from evaluation import score
from evaluation.image_files import LOG, load_images
from evaluation.sample import MANIFEST
from evaluation.targets import find_targets
from metrics.reference import load_reference
from models.families.sd15 import SD15
from models.pipeline_parts import files_digest
from report.records import points_file


def evaluate(*arguments) -> None:
    evaluate_script.main([str(argument) for argument in arguments])


def points(run) -> list[dict]:
    return points_file(Path(run) / "eval" / "points.jsonl").read()


def drawn(run) -> dict[str, bytes]:
    """All images of a run by their path in `samples`."""
    folder = Path(run) / "samples"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.fixture(scope="module")
def trained(miniature, tmp_path_factory):
    """Two runs with checkpoints at 2, 4, 6, and a config for their bare base model; not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    train(miniature, root / "urepa")
    train(miniature, root / "baseline", "align.coeff=0")
    settings = yaml.safe_load((root / "urepa" / "config.yaml").read_text())
    (root / "plain.yaml").write_text(yaml.safe_dump(settings | {"run": str(root / "plain")}))
    return root


def copy_runs(source: Path, folder: Path) -> Path:
    """Copy the runs and what was measured of them."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    settings = yaml.safe_load((source / "plain.yaml").read_text())
    (folder / "plain.yaml").write_text(yaml.safe_dump(settings | {"run": str(folder / "plain")}))
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of them, of which nothing is measured yet."""
    return copy_runs(trained, tmp_path)


def auto_reference(miniature) -> Path:
    """Where the statistics of the training images are kept."""
    (extractor,) = score.load_extractors(miniature / "models" / "classifier", "cpu")
    return miniature / f"train.classifier-{extractor.identity['weights_sha256'][:8]}.npz"


def no_drawing(monkeypatch):
    """From here on, drawing or looking at an image fails the test."""
    monkeypatch.setattr("evaluation.sample.ImageSampler.load", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr("evaluation.points.measure", lambda *_: pytest.fail("images were measured"))


class TestSampling:
    def test_more_images_leave_the_first_as_they_were(self, runs):
        evaluate("sample", runs / "urepa", "eval.num_samples=7")
        first = drawn(runs / "urepa")
        evaluate("sample", runs / "urepa", "eval.num_samples=20")
        both = drawn(runs / "urepa")
        assert (len(first), len(both)) == (7, 20)
        assert first.items() <= both.items()

    def test_a_setting_without_effect_is_no_other_setting(self, runs):
        evaluate("sample", runs / "urepa", "eval.num_samples=2")
        evaluate(
            "sample",
            runs / "urepa",
            "eval.num_samples=2",
            "eval.guidance_low=0.2",
            "eval.guidance_high=0.5",
            "eval.batch_size=3",
        )
        assert len(list((runs / "urepa" / "samples").iterdir())) == 1  # unguided, and on a CPU

    @pytest.mark.parametrize(
        "option",
        [
            ["eval.seed=1"], ["eval.sampling_steps=3"], ["eval.cfg=2"], ["eval.sampler=ddpm"], ["eval.sampler=dpm++"],
            ["eval.eta=0.5"], ["eval.labels=random"], ["--raw"], ["--checkpoint", 4], ["eval.precision=bf16"],
        ],
    )  # fmt: skip
    def test_every_setting_that_matters_has_its_own_folder_and_images(self, runs, option):
        evaluate("sample", runs / "urepa", "eval.num_samples=2")
        evaluate("sample", runs / "urepa", "eval.num_samples=2", *option)
        images = drawn(runs / "urepa")
        assert len(images) == 4
        assert len(set(images.values())) > 2
        manifests = [json.loads(path.read_text()) for path in (runs / "urepa").rglob(f"samples/*/{MANIFEST}")]
        assert manifests[0]["settings"] != manifests[1]["settings"]
        assert all(len(m["made_with"]["network_sha256"]) == 64 for m in manifests)

    def test_two_intervals_and_two_spaces_never_share_a_folder(self, runs):
        for low, high, space in ((0, 0.7, "snr"), (0, 0.7, "index"), (0.1, 0.7, "snr"), (0, 1, "snr")):
            interval = [f"eval.guidance_low={low}", f"eval.guidance_high={high}"]
            guided = ["eval.cfg=3", *interval, f"eval.guidance_space={space}"]
            evaluate("sample", runs / "urepa", "eval.num_samples=2", *guided)
        assert len(drawn(runs / "urepa")) == 8

    def test_a_checkpoints_folder_names_a_run_and_a_step(self, runs):
        ((by_path,),) = find_targets([runs / "urepa" / "checkpoints" / "step-0000004"])
        ((by_step,),) = find_targets([runs / "urepa"], "4")
        assert (by_path.step, by_path.weights_sha256) == (4, by_step.weights_sha256)
        assert by_path.images_seen == 4 * 4

    def test_a_base_model_whose_weights_changed_does_not_go_on_in_the_folder(self, runs, miniature):
        shutil.copytree(miniature / "models" / "sd15-mini", runs / "base")
        config = runs / "urepa" / "config.yaml"
        settings = yaml.safe_load(config.read_text())
        settings["model"]["base"] = str(runs / "base")
        config.write_text(yaml.safe_dump(settings))
        evaluate("sample", runs / "urepa", "eval.num_samples=2")
        file = runs / "base" / "vae" / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
        evaluate("sample", runs / "urepa", "eval.num_samples=2")  # nothing to do
        with pytest.raises(UserError, match="drawn with other weights or settings"):
            evaluate("sample", runs / "urepa", "eval.num_samples=3")  # changed while it was in use
        before = drawn(runs / "urepa")
        files_digest.cache_clear()
        evaluate(
            "sample", runs / "urepa", "eval.num_samples=2"
        )  # as the next command does: it is another setting
        assert len(drawn(runs / "urepa")) == 2 * len(before)
        assert len(set(drawn(runs / "urepa").values())) == 4

    @pytest.mark.parametrize("damage", ["{", "[]", '{"settings": {}}'])
    def test_a_damaged_manifest_is_one_line(self, runs, damage):
        evaluate("sample", runs / "urepa", "eval.num_samples=2")
        next((runs / "urepa").rglob(f"samples/*/{MANIFEST}")).write_text(damage)
        with pytest.raises(UserError, match=MANIFEST):
            evaluate("sample", runs / "urepa", "eval.num_samples=3")

    def test_a_broken_image_is_drawn_again(self, runs):
        evaluate("sample", runs / "urepa", "eval.num_samples=3")
        whole = drawn(runs / "urepa")
        file = next((runs / "urepa" / "samples").rglob("000001.png"))
        file.write_bytes(file.read_bytes()[:-5])
        evaluate("sample", runs / "urepa", "eval.num_samples=3")
        assert drawn(runs / "urepa") == whole

    def test_an_image_that_no_record_knows_is_drawn_again(self, runs):
        evaluate("sample", runs / "urepa", "eval.num_samples=3")
        whole = drawn(runs / "urepa")
        (folder,) = (runs / "urepa" / "samples").iterdir()
        first, *lines = (folder / LOG).read_text().splitlines(keepends=True)
        for record, text in ((LOG, "".join(lines)), (MANIFEST, None)):
            shutil.copy(folder / "000002.png", folder / "000000.png")
            (folder / record).unlink() if text is None else (folder / record).write_text(text)
            evaluate("sample", runs / "urepa", "eval.num_samples=3")
            assert drawn(runs / "urepa") == whole
        assert set((folder / LOG).read_text().splitlines(keepends=True)) == {first, *lines}

    def test_a_killed_sampling_goes_on_and_leaves_the_same_files(self, runs):
        evaluate("sample", runs / "urepa", "eval.num_samples=150")
        whole = drawn(runs / "urepa")
        (folder,) = (runs / "urepa" / "samples").iterdir()
        log = (folder / LOG).read_text()
        shutil.rmtree(folder)
        process = start("evaluate_sd15 sample urepa eval.num_samples=150", runs)
        while len(list(folder.glob("0*.png"))) < 20:
            assert process.is_alive(), said(runs)
            time.sleep(0.01)
        process.kill()
        process.join()
        assert 20 <= len(drawn(runs / "urepa")) < 150
        evaluate("sample", runs / "urepa", "eval.num_samples=150")
        after = drawn(runs / "urepa")
        assert {name: after[name] for name in whole} == whole
        assert (folder / LOG).read_text() == log

    def test_two_processes_draw_and_measure_what_one_does(self, runs):
        shutil.copytree(runs / "urepa", runs / "together")
        evaluate("metrics", runs / "urepa")
        assert run_both("evaluate_sd15 metrics together", runs) == [0, 0], said(runs, "0")
        assert drawn(runs / "together") == drawn(runs / "urepa")
        logs = [next((runs / run).rglob(f"samples/*/{LOG}")).read_text() for run in ("together", "urepa")]
        assert sorted(logs[0].splitlines()) == logs[1].splitlines()
        (one,), (two,) = points(runs / "urepa"), points(runs / "together")
        assert one["protocol"] == two["protocol"]
        for name, found in one["metrics"].items():
            assert two["metrics"][name]["value"] == pytest.approx(found["value"], rel=1e-9), name

    def test_an_npz_of_the_images_is_what_adms_evaluator_reads(self, runs):
        evaluate("sample", runs / "urepa", "--npz")
        (file,) = (runs / "urepa" / "samples").glob("*.npz")
        (folder,) = (path for path in (runs / "urepa" / "samples").iterdir() if path.is_dir())
        np.testing.assert_array_equal(np.load(file)["arr_0"], load_images(folder, range(20)))


class TestPoints:
    def test_a_point_says_what_it_is_and_is_not_measured_again(self, runs, monkeypatch):
        evaluate("metrics", runs / "urepa")
        (point,) = points(runs / "urepa")
        assert set(point["metrics"]) == {
            f"classifier_{name}20" for name in ("fd", "is", "precision", "recall", "kid", "accuracy")
        }
        assert point["metrics"]["classifier_fd20"]["error_kind"] == "bootstrap"
        assert (point["step"], point["images_seen"]) == (6, 24)
        assert point["protocol"]["judges"]["classifier"]["reference"]["num_images"] == 60
        no_drawing(monkeypatch)
        evaluate("metrics", runs / "urepa")
        assert points(runs / "urepa") == [point]
        monkeypatch.undo()
        evaluate("metrics", runs / "urepa", "eval.seed=100")
        assert len(points(runs / "urepa")) == 2

    def test_other_weights_of_the_same_step_are_another_point(self, runs):
        evaluate("metrics", runs / "urepa")
        shutil.rmtree(runs / "urepa" / "checkpoints")
        shutil.copytree(runs / "baseline" / "checkpoints", runs / "urepa" / "checkpoints")
        config = runs / "urepa" / "config.yaml"
        shutil.copy(runs / "baseline" / "config.yaml", config)
        evaluate("metrics", runs / "urepa")
        first, second = points(runs / "urepa")
        assert (first["protocol"], first["step"]) == (second["protocol"], second["step"])
        assert first["metrics"] != second["metrics"]

    def test_points_of_a_training_that_began_anew_are_forgotten(self, runs, miniature):
        evaluate("metrics", runs / "urepa", "--checkpoint", "all")
        assert [p["step"] for p in points(runs / "urepa")] == [2, 4, 6]
        shutil.rmtree(runs / "urepa" / "checkpoints" / "step-0000006")
        train(miniature, runs / "urepa")
        assert [p["step"] for p in points(runs / "urepa")] == [2, 4]
        shutil.rmtree(runs / "urepa" / "checkpoints")
        train(miniature, runs / "urepa", "seed=7")
        assert points(runs / "urepa") == []

    def test_runs_that_cannot_be_compared_are_refused_before_anything_is_drawn(
        self, runs, miniature, monkeypatch
    ):
        shutil.copytree(miniature / "cache" / "text", runs / "text")
        for name in ("settings", "manifest"):
            content = json.loads((runs / "text" / f"{name}.json").read_text())
            content["details"]["template"] = "a drawing of a {class_name}"
            content.pop("seal", None)
            (runs / "text" / f"{name}.json").write_text(json.dumps(content))
        write_manifest(runs / "text", content)
        config = runs / "baseline" / "config.yaml"
        settings = yaml.safe_load(config.read_text())
        settings["data"]["text"] = str(runs / "text")
        config.write_text(yaml.safe_dump(settings))
        no_drawing(monkeypatch)
        with pytest.raises(UserError, match="cannot be compared: they differ in prompts"):
            evaluate("curve", runs / "urepa", runs / "baseline", "--out", runs / "curve")

    def test_raw_weights_stand_beside_the_base_model_and_not_beside_their_average(self, runs):
        evaluate(
            "curve", runs / "urepa", runs / "plain.yaml", "--raw", "--checkpoint", 6, "--out", runs / "curve"
        )
        assert points(runs / "plain_base")[0]["protocol"]["weights"] == "raw"
        evaluate("curve", runs / "urepa", "--checkpoint", 6, "--out", runs / "curve")
        assert len(points(runs / "urepa")) == 2

    def test_half_a_line_of_a_crash_is_forgotten(self, runs):
        evaluate("metrics", runs / "urepa")
        file = runs / "urepa" / "eval" / "points.jsonl"
        whole = file.read_bytes()
        file.write_bytes(whole + b'{"target": "ure')
        evaluate("metrics", runs / "urepa", "eval.seed=1")
        assert file.read_bytes().startswith(whole)
        assert len(points(runs / "urepa")) == 2

    def test_only_the_first_images_stay_where_that_is_asked(self, runs, monkeypatch):
        monkeypatch.setattr("evaluation.points.KEPT", 5)
        evaluate("metrics", runs / "urepa", "eval.keep_images=false")
        assert sorted(name[-10:] for name in drawn(runs / "urepa")) == [f"{i:06d}.png" for i in range(5)]
        no_drawing(monkeypatch)
        evaluate("metrics", runs / "urepa", "eval.keep_images=false")

    def test_the_reference_is_made_once_and_refused_when_the_data_changed(self, runs, miniature, monkeypatch):
        file = auto_reference(miniature)
        file.unlink(missing_ok=True)
        evaluate("metrics", runs / "urepa")
        (extractor,) = score.load_extractors(miniature / "models" / "classifier", "cpu")
        made = load_reference(file, extractor)
        assert (made.pool.count, len(made.features)) == (60, 60)
        assert made.distance_of_halves > 0
        with monkeypatch.context() as patch:
            patch.setattr(
                "evaluation.score.photographs", lambda *_: pytest.fail("the real images were read again")
            )
            evaluate("metrics", runs / "baseline")
        shutil.copy(file, runs / "kept.npz")
        arrays = dict(np.load(file))
        told = json.loads(str(arrays["metadata"])) | {"ids_sha256": "others"}
        np.savez(file, **arrays | {"metadata": np.array(json.dumps(told))})
        with pytest.raises(UserError, match="ids_sha256"):
            evaluate("metrics", runs / "urepa", "eval.seed=5")
        shutil.copy(runs / "kept.npz", file)

    def test_a_reference_made_by_hand_gives_the_same_numbers(self, runs, miniature):
        classifier = miniature / "models" / "classifier"
        out = runs / "mine"
        made_of = [
            "reference",
            miniature / "train.csv",
            "--size",
            32,
            "--out",
            out,
            f"eval.extractor={classifier}",
        ]
        evaluate(*made_of)
        evaluate("metrics", runs / "urepa")
        evaluate("metrics", runs / "urepa", f"eval.reference={out}.classifier.npz")
        first, second = points(runs / "urepa")
        assert first["metrics"] == second["metrics"]

    def test_a_reference_of_images_of_another_size_is_refused(self, runs, miniature):
        classifier = miniature / "models" / "classifier"
        made_of = [
            miniature / "train.csv",
            "--size",
            16,
            "--out",
            runs / "small",
            f"eval.extractor={classifier}",
        ]
        evaluate("reference", *made_of)
        with pytest.raises(UserError, match="size = 16, wanted is 32"):
            evaluate("metrics", runs / "urepa", f"eval.reference={runs}/small.classifier.npz")

    def test_a_point_is_noted_once_for_each_purpose(self, runs):
        for command in ("metrics", "curve", "metrics", "curve"):
            more = ["--checkpoint", 6, *(["--out", runs / "curve"] if command == "curve" else [])]
            evaluate(command, runs / "urepa", *more)
        assert [p["kind"] for p in points(runs / "urepa")] == ["metrics", "curve"]

    def test_images_without_a_run_are_measured_against_a_reference(self, runs, miniature, capsys):
        evaluate("sample", runs / "urepa", "--npz")
        evaluate("metrics", runs / "urepa")
        (file,) = (runs / "urepa" / "samples").glob("*.npz")
        (folder,) = (path for path in file.parent.iterdir() if path.is_dir())
        given = [f"eval.extractor={miniature}/models/classifier", "eval.bootstrap=5"]
        given += [f"eval.reference={auto_reference(miniature)}"]
        for images in (file, folder):
            capsys.readouterr()
            evaluate("metrics", images, *given)
            said = dict(re.findall(r"(classifier_\w+) ([\d.e-]+)", capsys.readouterr().out))
            for name, found in points(runs / "urepa")[0]["metrics"].items():
                if "accuracy" not in name:  # nobody knows what these images were to show
                    assert float(said[name]) == pytest.approx(found["value"], rel=1e-3)

    def test_the_bare_base_model_has_a_folder_of_its_own(self, runs):
        evaluate("metrics", runs / "plain.yaml")
        (point,) = points(runs / "plain_base")
        assert (point["step"], point["images_seen"], point["target"]) == (0, 0, "plain_base")
        evaluate("metrics", runs / "plain_base")  # the folder is a RUN too
        assert points(runs / "plain_base") == [point]
        evaluate("metrics", runs / "urepa")
        assert points(runs / "urepa")[0]["protocol"] == point["protocol"]


class TestCurves:
    def test_every_checkpoint_is_a_point_and_the_figure_shows_all_runs(self, runs, monkeypatch, capsys):
        three = [runs / "urepa", runs / "baseline", runs / "plain.yaml"]
        evaluate("curve", *three, "--out", runs / "curve")
        assert [p["step"] for p in points(runs / "urepa")] == [2, 4, 6]
        result = json.loads((runs / "curve" / "curve.json").read_text())
        series = result["series"]["classifier_fd20"]
        assert set(series) == {"urepa", "baseline"}
        assert series["urepa"]["images"] == [8, 16, 24]
        assert all(error > 0 for error in series["urepa"]["errors"])
        assert set(result["levels"]["classifier_fd20"]) == {"plain_base"}
        assert result["baseline"] == "baseline"
        assert result["steps_to_baseline"]["classifier_fd20"]["baseline"]["factor"] == 1
        assert "baseline's final classifier_fd20" in capsys.readouterr().out
        for name in ("curve.png", "curve_all.png"):
            with Image.open(runs / "curve" / name) as image:
                assert min(image.size) > 300
        before = (runs / "urepa" / "eval" / "points.jsonl").read_bytes()
        no_drawing(monkeypatch)
        evaluate("curve", *three, "--out", runs / "curve")
        assert (runs / "urepa" / "eval" / "points.jsonl").read_bytes() == before

    def test_all_runs_are_drawn_by_the_protocol_of_the_first(self, runs):
        config = runs / "baseline" / "config.yaml"
        settings = yaml.safe_load(config.read_text())
        settings["eval"] |= {"sampling_steps": 5, "seed": 9}
        config.write_text(yaml.safe_dump(settings))
        evaluate("curve", runs / "urepa", runs / "baseline", "--checkpoint", 6, "--out", runs / "curve")
        assert points(runs / "urepa")[0]["protocol"] == points(runs / "baseline")[0]["protocol"]

    def test_final_numbers_are_the_plans_and_the_sweep_is_over_guidance_alone(self, runs, monkeypatch):
        monkeypatch.setitem(SD15.final_settings, "eval.sampling_steps", 4)
        evaluate("final", runs / "urepa", "--sweep", 1, 2)
        final, one, two = points(runs / "urepa")
        assert [p["kind"] for p in (final, one, two)] == ["final", "sweep", "sweep"]
        settings = final["protocol"]
        assert (settings["steps"], settings["cfg"], settings["guidance_interval"]) == (4, 7.5, [0.0, 0.7])
        assert (one["protocol"]["steps"], one["protocol"]["cfg"], two["protocol"]["cfg"]) == (2, 1.0, 2.0)
        assert {k for k in one["protocol"] if one["protocol"][k] != two["protocol"][k]} == {
            "cfg", "guidance_interval", "guidance_space",
        }  # fmt: skip

    def test_the_plans_protocol_is_250_steps_of_guidance_7_5_up_to_0_7(self):
        assert SD15.final_settings == {
            "eval.sampling_steps": 250,
            "eval.cfg": 7.5,
            "eval.guidance_high": 0.7,
        }


class TestWhileTraining:
    def test_evaluation_changes_nothing_and_curve_finds_its_points(
        self, miniature, capsys, tmp_path, monkeypatch
    ):
        knobs = ["train.eval_every=3", "eval.num_samples=10"]
        measured = train(miniature, tmp_path / "measured", *knobs)
        assert "was not evaluated" not in capsys.readouterr().out
        plain = train(miniature, tmp_path / "plain", "eval.num_samples=10")
        assert_same_run(measured, plain)
        assert [p["step"] for p in points(measured.path)] == [3, 6]
        evaluate("curve", plain.path, "--checkpoint", 6, "--out", tmp_path / "curve")
        ours, theirs = points(measured.path)[-1], points(plain.path)[-1]
        assert (ours["protocol"], ours["metrics"]) == (theirs["protocol"], theirs["metrics"])
        no_drawing(monkeypatch)
        evaluate("curve", measured.path, "--checkpoint", 6, "--out", tmp_path / "curve")
        assert [p["step"] for p in points(measured.path)] == [3, 6]

    def test_a_resumed_run_measures_what_the_unbroken_one_does(self, miniature, tmp_path, monkeypatch):
        knobs = ["train.eval_every=2", "eval.num_samples=10"]
        whole = train(miniature, tmp_path / "whole", *knobs)
        stopped_at(4, miniature, tmp_path / "run", monkeypatch, *knobs)
        assert [p["step"] for p in points(tmp_path / "run")] == [
            2
        ]  # told to stop, it did not begin to measure
        resumed = train(miniature, tmp_path / "run", *knobs)
        assert_same_run(resumed, whole)
        found = [[(p["step"], p["metrics"]) for p in points(run.path)] for run in (whole, resumed)]
        assert found[0] == found[1]

    @pytest.mark.parametrize("error", [UserError, torch.OutOfMemoryError])
    def test_what_cannot_be_measured_ends_no_training(self, miniature, tmp_path, monkeypatch, capsys, error):
        def fail(*_, **__):
            raise error("out of memory for a picture")

        monkeypatch.setattr("evaluation.sample.decode_images", fail)
        run = train(miniature, tmp_path / "run", "train.eval_every=6")
        assert run.checkpoint_steps()[-1] == 6
        assert "step 6 was not evaluated: out of memory for a picture" in capsys.readouterr().out

    def test_what_an_evaluation_lacks_is_said_before_the_first_step(self, miniature, tmp_path):
        with pytest.raises(UserError, match="nowhere"):
            train(miniature, tmp_path / "run", "train.eval_every=6", "eval.extractor=nowhere")
        assert not (tmp_path / "run" / "checkpoints").exists()


class TestPictures:
    def test_rows_are_runs_and_columns_are_classes_or_steps(self, runs):
        evaluate("pictures", runs / "urepa", runs / "baseline", "-o", runs / "classes.png")
        shown = json.loads((runs / "classes.json").read_text())
        assert list(shown["rows"]) == ["urepa", "baseline"]
        assert shown["columns"] == ["zero", "one", "two", "three", "five", "six", "seven", "eight"]
        assert len(drawn(runs / "urepa")) == 8  # no image more than is shown
        evaluate("pictures", runs / "urepa", "--checkpoint", "all", "--classes", 3, "-o", runs / "steps.png")
        assert json.loads((runs / "steps.json").read_text())["columns"] == ["step 2", "step 4", "step 6"]

    def test_a_picture_is_that_of_sample(self, runs):
        evaluate("pictures", runs / "urepa", "-o", runs / "a.png", "--classes", 4)
        only = drawn(runs / "urepa")
        evaluate("sample", runs / "urepa")
        assert only.items() <= drawn(runs / "urepa").items()


class TestReport:
    @pytest.fixture(scope="class")
    def evaluated(self, trained, tmp_path_factory):
        """A copy with curves, a sweep and alignment; not to be changed."""
        root = copy_runs(trained, tmp_path_factory.mktemp("evaluated"))
        three = [root / name for name in ("urepa", "baseline", "plain.yaml")]
        evaluate("curve", *three, "--out", root / "curve")
        evaluate("final", three[0], "eval.sampling_steps=3", "eval.num_samples=12", "--sweep", 1, 3)
        for run in three[:2]:
            evaluate("align", run, "--timesteps", 100)
        return root

    @pytest.fixture
    def measured(self, evaluated, tmp_path):
        """A copy of that."""
        return copy_runs(evaluated, tmp_path)

    def test_it_holds_everything_with_its_protocol_and_command_and_asks_for_nothing(
        self, measured, monkeypatch
    ):
        no_drawing(monkeypatch)
        three = [measured / name for name in ("urepa", "baseline", "plain.yaml")]
        evaluate("report", *three, "-o", measured / "report.html")
        page = (measured / "report.html").read_text()
        assert page.count("data:image/png;base64,") >= 12
        words = re.sub(r"base64,[^\"]+", "", page)  # megabytes of random letters hold any word
        assert "http" not in words.replace("http-equiv", "")  # self-contained
        text = html.unescape(re.sub(r"[\s\\]+", " ", words))
        for point in (p for run in ("urepa", "baseline") for p in points(measured / run) if p["step"] == 6):
            assert " ".join(point["command"].split()) in text
            for name, found in point["metrics"].items():
                if point["kind"] != "sweep":
                    assert name in text
                    assert f"{found['value']:.4g}" in text
        for phrase in (
            "of EMA weights, against",
            "DDIM 2 steps, unguided",
            "guidance 7.5 at noise levels 0 to 0.7 (snr)",
            "plain_base",
        ):
            assert phrase in text
        aligned = json.loads((measured / "urepa" / "eval" / "align.json").read_text())
        row = next(r for r in aligned["rows"] if (r["model"], r["tap"], r["timestep"]) == ("run", "mid", 100))
        assert f"{row['metrics']['cknna']['value']:.3f} ({row['metrics']['cknna']['null']:.3f})" in text
        folder = measured / "report_figures"
        names = {path.stem for path in folder.glob("*.png")}
        assert {"curve", "curve_all", "samples", "sweep_fd", "align_runs", "loss_diff"} <= names
        assert names == {path.stem for path in folder.glob("*.json")}  # each beside its numbers

    def test_the_curve_says_whose_weights_it_is_of(self, runs):
        evaluate("metrics", runs / "urepa", "--raw")
        evaluate("report", runs / "urepa", "-o", runs / "report.html")
        assert "of raw weights, against" in (runs / "report.html").read_text()

    def test_a_page_can_be_made_of_what_there_is(self, runs):
        with pytest.raises(UserError, match="nothing was measured"):
            evaluate("report", runs / "urepa", "-o", runs / "report.html")
        evaluate("metrics", runs / "urepa")
        evaluate("report", runs / "urepa", runs / "baseline", "-o", runs / "report.html")
        page = (runs / "report.html").read_text()
        assert "Not measured by this protocol: baseline" in page
        assert "Not measured: urepa, baseline" in page

    def test_two_sweeps_are_two_figures_and_other_protocols_other_tables(self, measured):
        evaluate("final", measured / "urepa", "eval.sampling_steps=2", "eval.num_samples=20", "--sweep", 1, 3)
        evaluate("metrics", measured / "urepa", "eval.seed=5")
        evaluate("report", measured / "urepa", "-o", measured / "report.html")
        drawn = [
            json.loads(path.read_text())
            for path in sorted((measured / "report_figures").glob("sweep_*.json"))
        ]
        assert sorted(figure["xlabel"].split()[0] for figure in drawn) == [
            "classifier_is12",
            "classifier_is20",
        ]
        assert all(figure["series"]["urepa"]["scales"] == [1.0, 3.0] for figure in drawn)
        text = (measured / "report.html").read_text()
        assert "Other measurements" in text
        assert "seeds from 5" in text

    def test_another_checkpoints_alignment_replaces_nothing_and_other_conditions_are_left_out(
        self, measured, monkeypatch
    ):
        monkeypatch.setattr("evaluation.align.draw_alignment", lambda *_: None)
        urepa, baseline = measured / "urepa", measured / "baseline"
        before = (urepa / "eval" / "align.json").read_bytes()
        evaluate("align", urepa, "--timesteps", 100, "--checkpoint", 2)
        assert (urepa / "eval" / "align.json").read_bytes() == before
        assert json.loads((urepa / "eval" / "step-0000002" / "align.json").read_text())["step"] == 2
        evaluate("align", baseline, "--timesteps", 100, "eval.seed=3")
        evaluate("report", urepa, baseline, "-o", measured / "report.html")
        assert "other conditions than urepa, so not shown: baseline" in (measured / "report.html").read_text()

    def test_images_that_were_trained_on_are_not_held_out(self, runs, miniature):
        config = runs / "urepa" / "config.yaml"
        settings = yaml.safe_load(config.read_text())
        settings["eval"] |= {name: settings["data"][name] for name in ("csv", "latents", "tokens")}
        config.write_text(yaml.safe_dump(settings))
        with pytest.raises(UserError, match="is not held out"):
            evaluate("align", runs / "urepa", "--timesteps", 100)

    def test_two_protocols_are_never_mixed_in_a_table(self, measured):
        (measured / "baseline" / "eval" / "points.jsonl").unlink()
        evaluate("metrics", measured / "baseline", "eval.sampling_steps=3")
        evaluate("report", measured / "urepa", measured / "baseline", "-o", measured / "report.html")
        curve = json.loads((measured / "report_figures" / "curve.json").read_text())
        assert set(curve["series"]["classifier_fd20"]) == {"urepa"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere"], "is not a run folder"),
        (["sample", "{root}/urepa", "{root}/urepa"], "given twice"),
        (["metrics", "{root}/urepa", "--checkpoint", "5"], "no checkpoint of step 5; it has 2, 4, 6"),
        (["metrics", "{root}/urepa", "eval.extractor=nowhere"], "nowhere"),
        (
            ["metrics", "{root}/urepa", "eval.extractor=inception"],
            "Inception's weights are missing: put https",
        ),
        (["metrics", "{root}/urepa", "eval.reference=nowhere.npz"], "cannot read nowhere.npz: No such file"),
        (
            ["metrics", "{root}/urepa", "eval.reference=[nowhere.npz,b.npz]"],
            "cannot read nowhere.npz: No such file",
        ),
        (["metrics", "{root}/urepa", "eval.bootstrap=1"], "gives no spread"),
        (["metrics", "nowhere.npz"], "give eval.reference"),
        (["sample", "{root}/urepa", "eval.cfg=0.5"], "eval.cfg = 0.5"),
        (["sample", "{root}/urepa", "eval.num_samples=1"], "eval.num_samples = 1"),
        (["sample", "{root}/urepa", "eval.sampler=ddpm", "eval.eta=1"], "eval.eta is DDIM's"),
        (
            ["sample", "{root}/urepa", "eval.guidance_low=0.8", "eval.guidance_high=0.7"],
            "the guidance interval is empty",
        ),
        (["sample", "{root}/urepa", "--device", "tpu"], "cannot be used"),
        (["sample", "{root}/urepa", "eval.sampling_steps=300"], "drifts off its noise levels"),
        (["metrics", "{root}/urepa", "eval.num_samples=3"], "too few for metrics"),
        (["sample", "{root}/urepa", "eval.cgf=2"], "unknown key 'eval.cgf'; did you mean 'eval.cfg'?"),
        (["sample", "{root}/urepa", "evl.seed=2"], "unknown key 'evl.seed'; did you mean 'eval.seed'?"),
        (["final", "{root}/urepa", "train.steps=9"], "train.steps is a setting of the training"),
        (["sample", "{root}/urepa", "cfg=2"], "did you mean 'eval.cfg'?"),
        (["report", "{root}/urepa", "-o", "x.html", "eval.cfg=2"], "it takes no settings"),
        (["reference", "nowhere", "--out", "x", "eval.bootstrap=1"], "gives no spread"),
        (["pictures", "{root}/urepa", "-o", "x.jpg"], "must end in .png"),
        (["final", "{root}/urepa", "--sweep", "0.5"], "eval.cfg = 0.5"),
        (["curve", "{root}/urepa", "--baseline", "{root}/baseline"], "is none of the runs"),
        (["pictures", "{root}/urepa", "-o", "x.png", "--classes", "10"], "classes are 0 to 9"),
        (["report", "{root}/urepa", "-o", "page"], "must end in .html"),
        (
            ["report", "{root}/urepa", "-o", "x.html", "--times", "{root}/urepa/run.json"],
            "run.json: Input should be a valid array: give the record",
        ),
        (
            ["reference", "nowhere", "--out", "x", "eval.extractor={classifier}"],
            "nowhere is no folder of images",
        ),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(
    trained, miniature, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    places = {"root": trained, "classifier": miniature / "models" / "classifier"}
    before = sorted(trained.rglob("*"))
    with pytest.raises(UserError) as error:
        evaluate(*(argument.format(**places) for argument in arguments))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(trained.rglob("*")) == before


def test_what_is_there_as_a_folder_is_a_run_and_not_a_setting(runs):
    (runs / "urepa").rename(runs / "coeff=0.8")
    evaluate("sample", runs / "coeff=0.8", "--raw", "eval.num_samples=2")
    assert len(drawn(runs / "coeff=0.8")) == 2


def test_a_setting_may_stand_anywhere_also_after_an_option_with_several_values(runs):
    evaluate("final", "eval.sampling_steps=3", runs / "urepa", "--sweep", 1, 2, "eval.num_samples=4")
    assert [(p["kind"], p["protocol"]["num_samples"]) for p in points(runs / "urepa")] == [
        ("final", 4), ("sweep", 4), ("sweep", 4),
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["sample", "metrics", "reference", "curve", "final", "align", "pictures"])
def test_help_of_a_subcommand_lists_every_setting_of_eval_and_no_other(command, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate(command, "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    listed = {line.split(" = ")[0].strip() for line in shown.splitlines() if line.startswith("  eval.")}
    assert listed == {key for key in knobs() if key.startswith("eval.")}
    assert "\n  train." not in shown


@pytest.mark.parametrize("flag", ["--cfg", "--steps", "--seed", "--guidance-interval"])
def test_a_flag_that_restates_a_setting_is_unknown(flag, trained, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate("sample", trained / "urepa", flag, 3)
    assert stop.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_real_images_are_read_as_the_vae_saw_them(miniature, tmp_path):
    config = load_config(CONFIG, demo_overrides(miniature, tmp_path))
    paths, facts = score.training_images(config)
    chunks = list(score.photographs(paths, facts["size"]))
    assert np.concatenate(chunks).shape == (60, 32, 32, 3)
    np.testing.assert_array_equal(chunks[0][7], read_view(paths[7], 32))
