"""One training step of configs/A.yaml at full size on CPU: random weights, real classes, real shapes. `make test-full`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

import train_sd15
from models.taps import Taps
from preprocessing.manifest import FieldSpec, write_table
from preprocessing.samples import Sample, write_samples
from preprocessing.shards import FieldWriter
from training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
FIELDS = {"latents": (4, 64, 64), "tokens": (196, 1024)}


@pytest.fixture
def full_size(tmp_path):
    """A Stable Diffusion folder with SD-1.5's own U-Net configuration, and a cache of two images of full-size shapes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet = unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    unet.save_pretrained(tmp_path / "sd15" / "unet")
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        tmp_path / "sd15" / "scheduler"
    )
    ids = ["a", "b"]
    write_samples(
        tmp_path / "list.csv", [Sample(key, "unused", number, "n") for number, key in enumerate(ids)]
    )
    generator = torch.Generator().manual_seed(0)
    about = {
        "latents": {"details": {"posterior": "mode", "scaled": True, "scaling_factor": 0.18215}},
        "tokens": {"source": {"model": "facebook/dinov2-large"}},
    }
    for field, shape in FIELDS.items():
        writer = FieldWriter(
            tmp_path / field, FieldSpec(field, shape, "float16", "random", **about[field]), ids
        )
        for shard, batch in writer.pending(2):
            values = torch.randn(2, *shape, generator=generator)
            if field == "tokens":
                values = torch.nn.functional.normalize(values, dim=-1)
            writer.put(shard, batch, writer.spec.encode(values))
        writer.finish()
    write_table(
        tmp_path / "text", torch.randn(3, 77, 768).half(), FieldSpec("text", (77, 768), "float16", "random")
    )
    return tmp_path


@pytest.mark.full_size
def test_one_step_of_config_a_at_full_size(full_size, monkeypatch):
    captured = {}
    clear = Taps.clear

    def note_shapes(taps):
        captured.update({name: tuple(feature.shape) for name, feature in taps.captured.items()})
        clear(taps)

    monkeypatch.setattr(Taps, "clear", note_shapes)
    overrides = [f"data.{name}={full_size}/{name}" for name in ("latents", "tokens", "text")]
    overrides += [f"data.csv={full_size}/list.csv", f"model.base={full_size}/sd15", f"run={full_size}/run"]
    overrides += ["data.batch_size=2", "data.read_threads=2", "train.steps=1", "train.precision=fp32"]
    overrides += ["align.taps=[enc_last,mid,dec_first]"]
    train_sd15.main(["--config", str(ROOT / "configs" / "A.yaml"), *overrides])
    assert captured == dict.fromkeys(("enc_last", "mid", "dec_first"), (2, 1280, 8, 8))
    run = RunFolder(full_size / "run")
    (line,) = run.metrics()
    assert all(np.isfinite(value) for value in line.values() if value is not None)
    trained = load_file(run.newest_checkpoint() / "trained.safetensors")
    assert sum(value.numel() for name, value in trained.items() if name.startswith("unet.")) == 7_462_912
    head = sum(value.numel() for name, value in trained.items() if name.startswith("heads.mid."))
    assert head == 1280 * 1024 + 2 * 1024
    exported = load_file(run.path / "export" / "ema" / "pytorch_lora_weights.safetensors")
    assert sum(value.numel() for value in exported.values()) == 7_462_912
