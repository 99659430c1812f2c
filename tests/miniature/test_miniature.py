"""The embedded miniature: real formats, reproducible, and safe to interrupt."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers import AutoImageProcessor, CLIPTokenizer, Dinov2Model, ResNetForImageClassification

from common.errors import UserError
from miniature import digits
from miniature import make as miniature

make_demo = importlib.import_module("preprocessing.0_make_demo")
ROOT = Path(__file__).parents[2]

SD15_BLOCKS = {
    "down_block_types": [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}


def run(out: Path, seed: int = 0) -> Path:
    make_demo.main(["--out", str(out), "--seed", str(seed), "--quick"])
    return out


def contents(out: Path) -> dict[str, bytes]:
    """Every file but the records of seconds."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "quality.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def weights(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("demo") / "made" / "here")


@pytest.fixture(scope="module")
def pipeline(demo: Path) -> StableDiffusionPipeline:
    diffusers_logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(demo / "models" / "sd15-mini")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_images_lie_in_imagenets_layout_and_the_splits_share_none(demo: Path) -> None:
    names = {}
    for split in ("train", "val"):
        folders = sorted((demo / "ILSVRC" / "Data" / "CLS-LOC" / split).iterdir())
        assert [folder.name for folder in folders] == digits.SYNSETS == sorted(digits.SYNSETS)
        assert [len(list(folder.glob(f"{folder.name}_*.JPEG"))) for folder in folders] == [12] * 10
        names[split] = {path.name for folder in folders for path in folder.iterdir()}
    assert not names["train"] & names["val"]
    classes = json.loads((demo / "imagenet_classes.json").read_text())
    assert list(classes) == [str(i) for i in range(10)]
    assert classes["7"] == "seven"


def test_every_digit_is_kept_and_split_80_to_20(tmp_path: Path) -> None:
    digits.make_images(tmp_path, quick=False, seed=0)
    counts = [
        len(list((tmp_path / "ILSVRC/Data/CLS-LOC" / split).glob("*/*.JPEG"))) for split in ("train", "val")
    ]
    assert counts == [1437, 360]


def test_images_are_loaded_with_the_centre_crop(demo: Path) -> None:
    images, labels = digits.load_images(demo, "val")
    assert images.shape == (120, 3, 32, 32)
    assert labels.tolist() == sorted([*range(10)] * 12)
    file = sorted((demo / "ILSVRC/Data/CLS-LOC/val/n00000000").iterdir())[0]
    with Image.open(file) as image:
        assert image.size == (40, 32)
        centre = np.asarray(image.crop((4, 0, 36, 32)))
    assert torch.equal(images[0], torch.from_numpy(centre.copy()).permute(2, 0, 1) / 255)


def test_the_stable_diffusion_folder_opens_in_the_stock_pipeline_and_samples(pipeline) -> None:
    image = pipeline("a photo of a seven", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
    assert np.isfinite(image).all()


def test_block_types_are_those_of_sd15_and_the_mid_block_is_2x2(pipeline) -> None:
    unet = pipeline.unet
    blocks = {
        "down_block_types": [type(block).__name__ for block in unet.down_blocks],
        "mid_block_type": type(unet.mid_block).__name__,
        "up_block_types": [type(block).__name__ for block in unet.up_blocks],
    }
    assert blocks == SD15_BLOCKS
    shapes = []
    hook = unet.mid_block.register_forward_hook(lambda module, args, output: shapes.append(output.shape[-2:]))
    with torch.no_grad(), hook:
        unet(torch.zeros(1, 4, 16, 16), 0, torch.zeros(1, 77, pipeline.text_encoder.config.hidden_size))
    assert shapes == [(2, 2)]


def test_the_scheduler_is_sd15s_with_v_prediction(pipeline) -> None:
    config = pipeline.scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert (config.num_train_timesteps, config.steps_offset, config.clip_sample) == (1000, 1, False)
    assert config.prediction_type == "v_prediction"


def test_scaled_latents_have_unit_std(demo: Path, pipeline) -> None:
    images, _ = digits.load_images(demo, "train")
    with torch.no_grad():
        latents = pipeline.vae.encode(2 * images - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert latents.shape == (120, 4, 16, 16)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)


def test_the_tokenizer_pads_to_77_and_knows_every_character(demo: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(demo / "models" / "sd15-mini", subfolder="tokenizer")
    ids = tokenizer(["a photo of a seven", ""], padding="max_length", truncation=True).input_ids
    assert [len(row) for row in ids] == [77, 77]
    assert ids[0][0] == tokenizer.bos_token_id
    assert ids[1][1:] == [tokenizer.eos_token_id] * 76
    assert tokenizer.tokenize("seven") == ["seven</w>"]
    strange = tokenizer("größe 漢 #", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in strange
    assert tokenizer.decode(strange).replace(" ", "") == "größe漢#"


def test_prompts_of_different_classes_become_distinct_under_the_full_training() -> None:
    small = importlib.import_module("miniature.models")
    tokenizer = small.build_tokenizer(digits.CLASS_NAMES)
    with small.reproducible(0):
        encoder = small.train_text_encoder(tokenizer, digits.CLASS_NAMES, miniature.STEPS[False]["text"])
    separation = 1 - small.measure_prompt_cosine(tokenizer, encoder, digits.CLASS_NAMES)
    assert separation >= miniature.FLOORS["prompt_separation"]


def test_the_teacher_is_a_dinov2_with_one_token_per_patch(demo: Path) -> None:
    teacher = Dinov2Model.from_pretrained(demo / "models" / "dinov2-mini")
    processor = AutoImageProcessor.from_pretrained(demo / "models" / "dinov2-mini")
    pixels = processor(Image.new("RGB", (40, 32), "gray"), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        tokens = teacher(pixels).last_hidden_state
    grid = 32 // teacher.config.patch_size
    assert tokens.shape == (1, 1 + grid**2, teacher.config.hidden_size)
    assert grid == 4
    assert teacher.config.hidden_size % 32 == 0


def test_the_classifier_says_what_it_wants_and_names_ten_classes(demo: Path) -> None:
    folder = demo / "models" / "classifier"
    classifier = ResNetForImageClassification.from_pretrained(folder)
    wants = json.loads((folder / "preprocessor_config.json").read_text())
    assert (wants["image_mean"], wants["image_std"]) == ([0.5] * 3, [0.5] * 3)
    assert wants["crop_size"] == {"height": 32, "width": 32}
    assert classifier.config.num_labels == 10
    assert classifier.config.id2label[3] == "three"


def test_same_seed_same_bytes_and_other_seed_other_weights(demo: Path, tmp_path: Path) -> None:
    again = contents(run(tmp_path / "again"))
    assert again.keys() == contents(demo).keys()
    assert again == contents(demo)
    other = weights(run(tmp_path / "other", seed=1))
    assert len(other) == 5
    assert all(other[name] != data for name, data in weights(demo).items())


def test_a_run_that_was_killed_goes_on_to_the_same_end(demo: Path, tmp_path: Path, monkeypatch) -> None:
    def killed(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
        (folder / "model.safetensors").write_bytes(b"half")
        raise SystemExit

    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setitem(miniature.MODELS, "sd15-mini", killed)
        with pytest.raises(SystemExit):
            run(out)
    assert not (out / "models" / "quality.json").exists()
    assert not (out / "models" / "sd15-mini").exists()
    # After SIGKILL, nobody tidies up.
    shutil.rmtree(out / "ILSVRC")
    for leftover in (out / "models" / ".sd15-mini.7.partial" / "vae", out / ".ILSVRC.7.partial" / "Data"):
        leftover.mkdir(parents=True)
        (leftover / "junk").write_text("half")
        os.utime(leftover.parent, (0, 0))  # a fresh one may have a writer that is about to lock it
    finished = (out / "models" / "dinov2-mini" / "model.safetensors").stat().st_mtime_ns
    run(out)
    assert contents(out) == contents(demo)
    assert (out / "models" / "dinov2-mini" / "model.safetensors").stat().st_mtime_ns == finished


def test_a_finished_demo_is_recognised_without_importing_torch(demo: Path) -> None:
    script = str(ROOT / "preprocessing" / "0_make_demo.py")
    code = (
        f"import runpy, sys; sys.argv = [{script!r}, '--out', {str(demo)!r}, '--quick']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert not {'torch', 'sklearn', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "already complete" in done.stdout


def test_a_missed_floor_is_an_error_and_leaves_no_model(demo: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(
        miniature.MODELS, "classifier", lambda out, folder, steps: {"classifier_accuracy": 0.96}
    )
    with pytest.raises(UserError, match=r"classifier_accuracy is 0\.960, floor 0\.97.*--seed"):
        miniature.make_model("classifier", tmp_path, quick=False, seed=0)
    assert not any((tmp_path / "models").iterdir())
    quality = json.loads((demo / "models" / "quality.json").read_text())
    assert quality["floors_enforced"] is False
    assert quality["models"]["classifier"]["seconds"] > 0


def test_what_is_not_ours_is_refused(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot use --out"):
        run(file)
    (tmp_path / "imagenet" / "ILSVRC").mkdir(parents=True)
    with pytest.raises(UserError, match="holds something else"):
        run(tmp_path / "imagenet")
    assert [path.name for path in (tmp_path / "imagenet").iterdir()] == ["ILSVRC"]
    with pytest.raises(UserError, match="made with"):
        run(demo, seed=7)
