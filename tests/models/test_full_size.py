"""One training step of configs/A.yaml at full size on CPU: random weights, real classes, real shapes. `make test-full`."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import train as train_script
from benchmarks.synthetic_run import make_synthetic
from models.taps import Taps
from training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.mark.full_size
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_step_of_config_a_at_full_size(tmp_path, monkeypatch, precision):
    captured = {}
    clear = Taps.clear

    def note_shapes(taps):
        captured.update({name: tuple(feature.shape) for name, feature in taps.captured.items()})
        clear(taps)

    monkeypatch.setattr(Taps, "clear", note_shapes)
    overrides = make_synthetic(tmp_path, "full", images=2)
    overrides += ["data.batch_size=2", "data.read_threads=2", "train.steps=1", f"train.precision={precision}"]
    overrides += ["align.taps=[enc_last,mid,dec_first]", "optim.warmup_fraction=0"]
    train_script.main(["--config", str(ROOT / "configs" / "A.yaml"), *overrides])
    assert captured == dict.fromkeys(("enc_last", "mid", "dec_first"), (2, 1280, 8, 8))
    run = RunFolder(tmp_path / "run")
    (line,) = run.metrics()
    assert all(np.isfinite(value) for value in line.values() if value is not None)
    assert "skipped" not in line
    trained = load_file(run.newest_checkpoint() / "trained.safetensors")
    assert {str(value.dtype) for value in trained.values()} == {"torch.float32"}
    assert sum(value.numel() for name, value in trained.items() if name.startswith("backbone.")) == 7_462_912
    head = sum(value.numel() for name, value in trained.items() if name.startswith("heads.mid."))
    assert head == 1280 * 1024 + 2 * 1024
    exported = load_file(run.path / "export" / "ema" / "pytorch_lora_weights.safetensors")
    assert sum(value.numel() for value in exported.values()) == 7_462_912
