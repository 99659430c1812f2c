"""The numbered scripts, from an ImageNet-shaped folder to a verified cache, and what they say to wrong input."""

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

import evaluate
import train as train_script
from common.errors import UserError
from configs.loading import knobs
from method.sampler import initial_noise
from models.teachers.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from models.teachers.table import load_teacher

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "preprocessing").glob("[0-9]_*.py"))


class TestTeacher:
    def test_it_returns_the_patch_tokens_of_the_real_class(self, miniature):
        folder = str(miniature / "models" / "dinov2-mini")
        teacher = load_teacher(folder, grid=4)
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
        teacher = load_teacher(str(tmp_path), grid)
        assert teacher.size == 14 * grid
        assert teacher(torch.rand(1, 3, 14 * grid, 14 * grid)).shape == (1, grid**2, 32)

    def test_one_token_output_is_refused(self, miniature):
        teacher = load_teacher(str(miniature / "models" / "dinov2-mini"), grid=4)
        for cls_only in (torch.rand(2, 64), torch.rand(2, 1, 64)):
            with pytest.raises(ValueError, match="patch tokens"):
                teacher.check_tokens(cls_only)
        with pytest.raises(ValueError, match="expected images"):
            teacher(torch.rand(1, 3, 30, 30))

    def test_another_model_is_refused(self, miniature):
        with pytest.raises(UserError, match=r"a resnet model; give .* \(DINOv2: .*dinov3_vit"):
            load_teacher(str(miniature / "models" / "classifier"), grid=4)
        with pytest.raises(UserError, match="does not exist"):
            load_teacher("no-such-teacher", grid=4)


@pytest.mark.parametrize(
    ("script", "wrong", "message"),
    [
        ("2_encode_vae_latents", {"--csv": "nowhere.csv"}, "again with script 1"),
        ("2_encode_vae_latents", {"--base": "nowhere"}, "does not exist"),
        ("2_encode_vae_latents", {"--base": "{root}/models/classifier"}, "model_index.json cannot be read"),
        ("2_encode_vae_latents", {"--image-size": "33"}, "not a multiple of 2"),
        (
            "2_encode_vae_latents",
            {"--image-size": "64", "--out": "{root}/cache/latents"},
            "written with another shape",
        ),
        ("3_build_dino_cache", {"--image-size": "30"}, "not a multiple of the patch 8: use 24 or 32"),
        ("3_build_dino_cache", {"--grid": "1"}, "use --grid 2 or more"),
        ("3_build_dino_cache", {"--teacher": "{root}/models/classifier"}, "give one of a known model_type"),
        ("3_build_dino_cache", {"--device": "tpu"}, "device 'tpu' cannot be used"),
        ("4_prepare_text_embeddings", {"--class-names": "nowhere.json"}, "cannot read nowhere.json"),
        ("4_prepare_text_embeddings", {"--class-names": "{root}/train.csv"}, "looks like a CSV"),
        ("4_prepare_text_embeddings", {"--template": "a photo"}, "must contain {class_name}"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(miniature, tmp_path, script, wrong, message):
    base, csv_file = miniature / "models" / "sd15-mini", miniature / "train.csv"
    right = {
        "2_encode_vae_latents": {"--csv": csv_file, "--base": base, "--image-size": 32},
        "3_build_dino_cache": {"--csv": csv_file, "--teacher": miniature / "models" / "dinov2-mini"},
        "4_prepare_text_embeddings": {"--class-names": miniature / "imagenet_classes.json", "--base": base},
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


@pytest.mark.parametrize("script", ["train", "evaluate", "demo"])
def test_help_of_the_root_scripts_shows_commands_and_every_knob(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"python {script}.py" in shown
    if script == "train":
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


def test_samples_of_a_run_are_those_of_the_stock_pipeline(miniature, tmp_path):
    """Labels, seeds, null prompt, timesteps and guidance of `sample`, against diffusers' own pipeline."""
    run = tmp_path / "run"
    train_script.main(["--config", str(ROOT / "configs" / "demo.yaml"), *demo_overrides(miniature, run)])
    evaluate.main(
        ["sample", str(run), "eval.num_samples=3", "eval.cfg=3", "eval.sampling_steps=4", "eval.seed=5"]
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
    settings = ["eval.num_samples=3", "eval.cfg=3", "eval.sampling_steps=4"]
    evaluate.main(["sample", str(run), *settings, "eval.seed=5", "--raw"])
    evaluate.main(["sample", str(run), *settings, "eval.seed=6"])
    images = {path.name: (path / "000000.png").read_bytes() for path in (run / "samples").iterdir()}
    assert (
        len(images) == len(set(images.values())) == 3
    )  # one folder for each setting, and each setting matters
