"""The numbered scripts, from an ImageNet-shaped folder to a verified cache, and what they say to wrong input."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import demo_overrides, run_numbered
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import AutoConfig, Dinov2Model

import evaluate_sd15
import train_sd15
from configs.schema import knobs, load_config
from errors import UserError
from evaluation.report import comparable
from evaluation.sampling import initial_noise
from fid_sd15 import read_reference
from models.dinov2_encoder import IMAGENET_MEAN, IMAGENET_STD, DINOv2Encoder
from preprocessing.images import UnreadableImage, cut_view, read_view
from preprocessing.manifest import read_manifest, read_table
from preprocessing.samples import COLUMNS, read_samples
from preprocessing.shards import FieldReader

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "preprocessing").glob("[0-9]_*.py"))


def image_tree(root, counts, size=(20, 16)):
    """Folder root/train/{class}/ with the given numbers of images."""
    rng = np.random.default_rng(0)
    for synset, count in counts.items():
        folder = root / "train" / synset
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{synset}_{i}.JPEG")


def sample(root, out, per_class, seed=0):
    run_numbered(
        "1_sample_imagenet_subset", "--imagenet", root, "--per-class", per_class, "--out", out, "--seed", seed
    )
    return read_samples(out)


def verify(miniature, *more):
    fields = [
        ("csv", "train.csv"),
        ("latents", "cache/latents"),
        ("tokens", "cache/tokens"),
        ("text", "cache/text"),
    ]
    run_numbered(
        "5_verify_cache", *(part for name, path in fields for part in (f"--{name}", miniature / path)), *more
    )


class TestSampling:
    def test_every_class_has_the_same_number_and_ids_follow_sorted_synsets(self, tmp_path):
        image_tree(tmp_path, {"n02": 5, "n01": 6, "n03": 5})
        samples = sample(tmp_path, tmp_path / "list.csv", 4)
        assert {(s.class_id, s.synset) for s in samples} == {(0, "n01"), (1, "n02"), (2, "n03")}
        assert [sum(s.class_id == c for s in samples) for c in range(3)] == [4, 4, 4]
        assert all(
            Path(s.img_path).exists() and s.id == f"{s.synset}/{Path(s.img_path).stem}" for s in samples
        )
        with open(tmp_path / "list.csv") as file:
            assert next(csv.reader(file)) == COLUMNS == ["id", "img_path", "class_id", "synset"]

    def test_a_short_class_is_skipped_by_name_and_keeps_the_others_numbers(self, tmp_path, capsys):
        image_tree(tmp_path, {"n01": 4, "n02": 2, "n03": 4})
        samples = sample(tmp_path, tmp_path / "list.csv", 3)
        assert {s.class_id for s in samples} == {0, 2}
        assert "class 1 (n02) has 2 images" in capsys.readouterr().err

    def test_the_smaller_list_begins_the_larger_one_and_the_seed_decides(self, tmp_path):
        image_tree(tmp_path, {"n01": 9, "n02": 9})
        small, large, again, other = (
            sample(tmp_path, tmp_path / f"{i}.csv", count, seed)
            for i, (count, seed) in enumerate([(3, 0), (7, 0), (7, 0), (7, 1)])
        )
        assert large[: len(small)] == small
        assert large == again
        assert {s.id for s in large} != {s.id for s in other}

    def test_hidden_folders_are_no_classes(self, tmp_path):
        image_tree(tmp_path, {"n01": 2, "n02": 2})
        (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
        assert {(s.class_id, s.synset) for s in sample(tmp_path, tmp_path / "list.csv", 2)} == {
            (0, "n01"),
            (1, "n02"),
        }

    def test_nothing_to_sample_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match="no train images"):
            sample(tmp_path, tmp_path / "list.csv", 1)
        image_tree(tmp_path, {"n01": 1})
        with pytest.raises(UserError, match="lower --per-class"):
            sample(tmp_path, tmp_path / "list.csv", 2)


class TestViews:
    def test_aligned_view_is_the_central_square_of_the_vae(self):
        pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
        expected = Image.fromarray(pixels[:, 12:28]).resize((8, 8), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(cut_view(Image.fromarray(pixels), 8)), np.asarray(expected))
        assert np.array_equal(
            np.asarray(cut_view(Image.fromarray(pixels), 16)), pixels[:, 12:28]
        )  # no resampling

    def test_official_view_is_dinov2s_transform(self):
        """Resize(256, bicubic) + CenterCrop(224), written out."""
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
        resized = image.resize((341, 256), Image.Resampling.BICUBIC)
        expected = np.asarray(resized)[16:240, 58:282]
        assert np.array_equal(np.asarray(cut_view(image, 224, "official")), expected)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
    def test_any_colour_mode_becomes_rgb(self, tmp_path, mode):
        path = tmp_path / f"image.{'tiff' if mode == 'CMYK' else 'png'}"
        Image.new("RGB", (9, 12), (200, 10, 30)).convert(mode).save(path)
        assert read_view(path, 4).shape == (4, 4, 3)

    def test_sixteen_bits_are_scaled_not_clipped(self, tmp_path):
        Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
        assert np.abs(read_view(tmp_path / "deep.png", 4).astype(int) - 128).max() <= 1

    def test_exif_rotation_is_applied(self, tmp_path):
        image = Image.new("RGB", (8, 8))
        image.paste((255, 255, 255), (0, 0, 8, 4))  # white above
        exif = Image.Exif()
        exif[0x0112] = 3  # turned by 180°
        image.save(tmp_path / "turned.png", exif=exif)
        view = read_view(tmp_path / "turned.png", 8)
        assert view[0].mean() < 50 < view[-1].mean()

    def test_truncated_and_missing_files_are_unreadable(self, tmp_path):
        image_tree(tmp_path, {"n01": 1})
        path = tmp_path / "train" / "n01" / "n01_0.JPEG"
        path.write_bytes(path.read_bytes()[:200])
        for bad in (path, tmp_path / "nowhere.png", ROOT / "LICENSE"):
            with pytest.raises(UnreadableImage):
                read_view(bad, 8)


class TestTeacher:
    def test_it_returns_the_patch_tokens_of_the_real_class(self, miniature):
        folder = str(miniature / "models" / "dinov2-mini")
        teacher = DINOv2Encoder.from_pretrained(folder, grid=4)
        images = torch.rand(2, 3, teacher.size, teacher.size)
        tokens = teacher(images)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            hidden = Dinov2Model.from_pretrained(folder)((images - mean) / std).last_hidden_state
        assert tokens.shape == (2, 16, 64)
        assert tokens.equal(hidden[:, 1:])
        assert not tokens.requires_grad

    @pytest.mark.parametrize("registers", [0, 4])
    @pytest.mark.parametrize("grid", [2, 5])
    def test_n_is_grid_squared_with_and_without_registers(self, tmp_path, registers, grid):
        kind = "dinov2_with_registers" if registers else "dinov2"
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 14,
            "image_size": 28,
        }
        config = AutoConfig.for_model(
            kind, **sizes, **({"num_register_tokens": registers} if registers else {})
        )
        from transformers import AutoModel

        AutoModel.from_config(config).save_pretrained(tmp_path)
        teacher = DINOv2Encoder.from_pretrained(str(tmp_path), grid)
        assert teacher.size == 14 * grid
        assert teacher(torch.rand(1, 3, 14 * grid, 14 * grid)).shape == (1, grid**2, 32)

    def test_one_token_output_is_refused(self, miniature):
        teacher = DINOv2Encoder.from_pretrained(str(miniature / "models" / "dinov2-mini"), grid=4)
        for cls_only in (torch.rand(2, 64), torch.rand(2, 1, 64)):
            with pytest.raises(ValueError, match="patch tokens"):
                teacher.check_tokens(cls_only)
        with pytest.raises(ValueError, match="expected images"):
            teacher(torch.rand(1, 3, 30, 30))

    def test_another_model_is_refused(self, miniature):
        with pytest.raises(UserError, match="resnet model; DINOv2 was expected"):
            DINOv2Encoder.from_pretrained(str(miniature / "models" / "classifier"), grid=4)
        with pytest.raises(UserError, match="does not exist"):
            DINOv2Encoder.from_pretrained("no-such-teacher", grid=4)


class TestCache:
    def test_fields_are_joined_by_id_and_say_what_they_are(self, miniature):
        latents, tokens = (FieldReader(miniature / "cache" / name, name) for name in ("latents", "tokens"))
        assert set(latents.ids) == set(tokens.ids) == {s.id for s in read_samples(miniature / "train.csv")}
        assert latents.spec.view == {"kind": "aligned", "size": 32}
        assert tokens.spec.view == {"kind": "aligned", "size": 32, "patch": 8, "grid": 4}
        assert len(tokens.spec.source["weights_sha256"]) == 64

    def test_cached_values_are_those_of_the_image_with_that_id(self, miniature):
        chosen = read_samples(miniature / "train.csv")[7]
        teacher = DINOv2Encoder.from_pretrained(str(miniature / "models" / "dinov2-mini"), grid=4)
        pixels = torch.tensor(read_view(chosen.img_path, 32)).permute(2, 0, 1)[None] / 255
        expected = torch.nn.functional.normalize(teacher(pixels), dim=-1)[0].numpy()
        cached = FieldReader(miniature / "cache" / "tokens", "tokens").read([chosen.id])[0]
        assert np.abs(cached - expected).max() < 1e-3
        assert np.abs(np.linalg.norm(cached.astype(np.float32), axis=-1) - 1).max() < 1e-3

    def test_text_table_ends_with_the_null_prompt(self, miniature):
        table, manifest = read_table(miniature / "cache" / "text")
        names = json.loads((miniature / "imagenet_classes.json").read_text())
        assert table.shape[:2] == (len(names) + 1, 77)
        assert manifest["details"]["prompts"][3] == f"a photo of a {names['3']}"
        assert manifest["details"]["prompts"][-1] == ""

    def test_verification_passes_and_then_finds_damage(self, miniature, tmp_path, capsys):
        verify(miniature, "--full")
        assert "the cache is good" in capsys.readouterr().out
        other = tmp_path / "other.csv"
        text = (miniature / "train.csv").read_text().replace("n00000001_", "n00000001_x")
        other.write_text(text)
        with pytest.raises(SystemExit) as stop:
            verify(miniature, "--csv", other)
        assert stop.value.code == 1
        assert "FAIL" in capsys.readouterr().out

    def test_verification_fails_where_the_cache_lacks_images_of_the_list(self, miniature, tmp_path, capsys):
        rows = (miniature / "train.csv").read_text().splitlines()
        longer, shorter = tmp_path / "longer.csv", tmp_path / "shorter.csv"
        longer.write_text("\n".join([*rows, *(row.replace("_", "_more", 1) for row in rows[1:])]) + "\n")
        shorter.write_text("\n".join(rows[:20]) + "\n")
        with pytest.raises(SystemExit):
            verify(miniature, "--csv", longer)
        assert "60 of 120 images are in both fields; 0 known as unreadable" in capsys.readouterr().out
        verify(miniature, "--csv", shorter)  # a cache may hold more than one list needs

    def test_an_unreadable_image_is_left_out_and_listed(self, miniature, tmp_path, capsys):
        image_tree(tmp_path, {"n01": 3, "n02": 3})
        sample(tmp_path, tmp_path / "list.csv", 3)
        (tmp_path / "train" / "n01" / "n01_1.JPEG").write_bytes(b"no image")
        out = tmp_path / "tokens"
        arguments = [
            "--csv",
            tmp_path / "list.csv",
            "--teacher",
            miniature / "models" / "dinov2-mini",
            "--grid",
            4,
        ]
        run_numbered("3_build_dino_cache", *arguments, "--out", out, "--workers", 0, "--batch-size", 2)
        assert read_manifest(out, "tokens")["num_samples"] == 5
        assert "1 images could not be read" in capsys.readouterr().err
        assert "n01/n01_1" in (out / "unreadable.csv").read_text()

    def test_running_again_does_nothing(self, miniature, capsys):
        out = miniature / "cache" / "tokens"
        before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        teacher = miniature / "models" / "dinov2-mini"
        run_numbered(
            "3_build_dino_cache",
            "--csv",
            miniature / "train.csv",
            "--teacher",
            teacher,
            "--grid",
            4,
            "--out",
            out,
        )
        assert "already complete" in capsys.readouterr().out
        assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.parametrize(
    ("script", "wrong", "message"),
    [
        ("2_encode_vae_latents", {"--csv": "nowhere.csv"}, "make it with script 1"),
        ("2_encode_vae_latents", {"--base": "nowhere"}, "does not exist"),
        ("2_encode_vae_latents", {"--base": "{root}/models/classifier"}, "has no vae/ folder"),
        ("2_encode_vae_latents", {"--image-size": "33"}, "not a multiple of 2"),
        (
            "2_encode_vae_latents",
            {"--image-size": "64", "--out": "{root}/cache/latents"},
            "written with another shape",
        ),
        ("3_build_dino_cache", {"--image-size": "30"}, "not a multiple of the patch 8: use 24 or 32"),
        ("3_build_dino_cache", {"--grid": "1"}, "use --grid 2 or more"),
        ("3_build_dino_cache", {"--teacher": "{root}/models/classifier"}, "DINOv2 was expected"),
        ("3_build_dino_cache", {"--device": "tpu"}, "device 'tpu' cannot be used"),
        ("4_prepare_clip_embeddings", {"--class-names": "nowhere.json"}, "cannot read nowhere.json"),
        ("4_prepare_clip_embeddings", {"--class-names": "{root}/train.csv"}, "is not JSON"),
        ("4_prepare_clip_embeddings", {"--template": "a photo"}, "must contain {class_name}"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(miniature, tmp_path, script, wrong, message):
    base, csv_file = miniature / "models" / "sd15-mini", miniature / "train.csv"
    right = {
        "2_encode_vae_latents": {"--csv": csv_file, "--base": base, "--image-size": 32},
        "3_build_dino_cache": {"--csv": csv_file, "--teacher": miniature / "models" / "dinov2-mini"},
        "4_prepare_clip_embeddings": {"--class-names": miniature / "imagenet_classes.json", "--base": base},
    }[script]
    options = (
        {"--out": tmp_path / "out"}
        | right
        | {key: value.format(root=miniature) if "{root}" in value else value for key, value in wrong.items()}
    )
    with pytest.raises(UserError) as error:
        run_numbered(script, *(part for option in options.items() for part in option))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_a_command_to_paste(script, capsys):
    with pytest.raises(SystemExit) as stop:
        run_numbered(script, "--help")
    assert stop.value.code == 0
    assert f"python preprocessing/{script}.py " in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train_sd15", "evaluate_sd15", "demo"])
def test_help_of_the_root_scripts_shows_commands_and_every_knob(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"python {script}.py" in shown
    if script == "train_sd15":
        assert all(f"{key} = " in shown for key in knobs())


@pytest.mark.parametrize(
    "start", [["preprocessing/1_sample_imagenet_subset.py"], ["-m", "preprocessing.1_sample_imagenet_subset"]]
)
def test_scripts_start_as_files_and_as_modules(tmp_path, start):
    command = [sys.executable, *start, "--imagenet", str(tmp_path), "--out", str(tmp_path / "list.csv")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no train images")
    assert result.stderr.count("\n") == 1


def test_the_whole_pipeline_ends_with_a_page(miniature, tmp_path, capsys):
    """From cached miniature to a page of results: train both arms, sample, fid, align, compare."""
    runs = [tmp_path / "urepa", tmp_path / "baseline"]
    for run, more in zip(runs, ([], ["align.coeff=0"]), strict=True):
        arguments = demo_overrides(miniature, run, *more)
        train_sd15.main(["--config", str(ROOT / "configs" / "demo.yaml"), *arguments])
        evaluate_sd15.main(["sample", str(run)])
        evaluate_sd15.main(["fid", str(run), "--checkpoint", "all"])
        evaluate_sd15.main(["align", str(run)])
    evaluate_sd15.main(["compare", *map(str, runs), "--out", str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("data:image/png;base64,") >= 7
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    numbers = json.loads((tmp_path / "page" / "compare.json").read_text())
    assert all(set(values) == {"urepa", "baseline"} for values in numbers.values())
    first = next(iter(numbers.values()))
    alignment = json.loads((runs[0] / "eval" / "align.json").read_text())
    assert alignment["cknna"]["cknna"] < 0.9  # 1 would be the teacher compared with itself
    assert alignment["cca"]["mean_rho"] < 0.9
    assert abs(alignment["head_cosine"]) < 0.9
    assert numbers["CCA with images paired at random"]["urepa"] == alignment["cca"]["null_mean_rho"]
    assert numbers["mid-block CKNNA with the teacher"]["urepa"] == alignment["cknna"]["cknna"]
    assert numbers["cosine of the head's tokens with the teacher's"]["baseline"] is None
    results = [json.loads(path.read_text()) for path in sorted((runs[0] / "eval").glob("fid_*.json"))]
    assert first["urepa"] == results[-1]["value"]
    assert [result["step"] for result in results] == [2, 4, 6]
    evaluate_sd15.main(["align", str(runs[0]), "--timestep", "100"])
    with pytest.raises(UserError, match="with other options"):
        evaluate_sd15.main(["compare", *map(str, runs), "--out", str(tmp_path / "page")])
    samples = sorted((runs[0] / "samples").iterdir())[-1]
    before = (samples / "000003.png").read_bytes()
    (samples / "000003.png").unlink()
    evaluate_sd15.main(["sample", str(runs[0])])
    assert (samples / "000003.png").read_bytes() == before  # image i depends on its own seed


def test_samples_of_a_run_are_those_of_the_stock_pipeline(miniature, tmp_path):
    """Labels, seeds, null prompt, timesteps and guidance of `sample`, against diffusers' own pipeline."""
    run = tmp_path / "run"
    train_sd15.main(["--config", str(ROOT / "configs" / "demo.yaml"), *demo_overrides(miniature, run)])
    evaluate_sd15.main(
        ["sample", str(run), "--num-samples", "3", "--cfg", "3", "--sampling-steps", "4", "--seed", "5"]
    )
    (folder,) = (run / "samples").iterdir()
    pipe = StableDiffusionPipeline.from_pretrained(miniature / "models" / "sd15-mini")
    pipe.unet = UNet2DConditionModel.from_pretrained(run / "export" / "ema" / "unet")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    names = json.loads((miniature / "imagenet_classes.json").read_text())
    for i in range(3):
        theirs = pipe(
            f"a photo of a {names[str(i)]}", latents=initial_noise([5 + i], (4, 16, 16)), num_inference_steps=4,
            guidance_scale=3.0, height=32, width=32, output_type="np",
        ).images[0]  # fmt: skip
        ours = np.asarray(Image.open(folder / f"{i:06d}.png")) / 255
        assert np.abs(ours - theirs).max() < 0.01  # the cached text is fp16
    settings = ["--num-samples", "3", "--cfg", "3", "--sampling-steps", "4"]
    evaluate_sd15.main(["sample", str(run), *settings, "--seed", "5", "--raw"])
    evaluate_sd15.main(["sample", str(run), *settings, "--seed", "6"])
    images = {path.name: (path / "000000.png").read_bytes() for path in (run / "samples").iterdir()}
    assert (
        len(images) == len(set(images.values())) == 3
    )  # one folder for each setting, and each setting matters


def test_halves_of_the_real_images_are_random(miniature, tmp_path):
    """Rows go round the classes, so every other image would be every other class."""

    class ByRow:
        def features(self, images):
            odd = np.arange(len(images)) % 2
            return np.stack([odd, 1 - odd], axis=1).astype(np.float32), odd

    config = load_config(ROOT / "configs" / "demo.yaml", demo_overrides(miniature, tmp_path))
    reference = read_reference(config, ByRow())
    assert reference.real.count == sum(half.count for half in reference.halves) == 60
    assert all(0.2 < half.mean[0] < 0.8 for half in reference.halves)


def test_two_protocols_are_never_mixed_in_a_comparison(tmp_path):
    def result(step, **conditions):
        return {"step": step, "num_samples": 10, "conditions": {"cfg": 1.0, "metric": "fd_x"} | conditions}

    cheap, full = [result(1), result(2)], [result(2, cfg=7.5)]
    assert comparable({"a": cheap + full, "b": cheap}) == {"a": cheap, "b": cheap}
    with pytest.raises(UserError, match="no protocol was used for all"):
        comparable({"a": full, "b": cheap})
    with pytest.raises(UserError, match="no protocol was used for all"):
        comparable({"a": [result(2, extractor="x")], "b": [result(2, extractor="y")]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere"], "is not a run folder"),
        (["fid", "{run}", "--checkpoint", "5"], "no checkpoint of step 5"),
        (["fid", "{run}", "--extractor", "nowhere"], "nowhere"),
        (["sample", "{run}", "--cfg", "0.5"], "--cfg ≥ 1"),
        (
            ["compare", "{run}", "--out", "{run}/page"],
            "has not been evaluated: run `python evaluate_sd15.py fid",
        ),
    ],
)
def test_evaluation_says_what_is_missing(miniature, tmp_path_factory, arguments, message):
    run = tmp_path_factory.getbasetemp() / "unevaluated"
    train_sd15.main(["--config", str(ROOT / "configs" / "demo.yaml"), *demo_overrides(miniature, run)])
    with pytest.raises(UserError) as error:
        evaluate_sd15.main([argument.format(run=run) for argument in arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
