"""The benchmarks of training and of the Fréchet distance run, at the smallest size, and their comparisons can fail."""

import json
import shutil
import sys

import pytest
from safetensors.torch import save_file
from small_runs import tensors, train

from benchmarks import frechet, train_step, vs_diffusers
from benchmarks.kills import differences

# What vs_diffusers.py relies on in diffusers' example, and no more.
EXAMPLE = """
import argparse
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import check_min_version
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer
check_min_version("99.0")

def main():
    parser = argparse.ArgumentParser()
    for name in ("pretrained_model_name_or_path", "dataset_name", "checkpointing_steps", "output_dir", "lr_scheduler",
                 "report_to", "seed", "mixed_precision"):
        parser.add_argument("--" + name)
    parser.add_argument("--train_batch_size", type=int)
    parser.add_argument("--max_train_steps", type=int)
    args = parser.parse_args()
    vae, text_encoder = AutoencoderKL.from_pretrained(""), CLIPTextModel.from_pretrained("")
    CLIPTokenizer.from_pretrained("")
    unet = UNet2DConditionModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    data = load_dataset(args.dataset_name)["train"].with_transform(None)
    loader = torch.utils.data.DataLoader(data, batch_size=args.train_batch_size)
    bar = tqdm(range(args.max_train_steps))
    for batch in list(loader) * args.max_train_steps:
        latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
        text = text_encoder(batch["input_ids"], return_dict=False)[0]
        unet(latents, torch.zeros(len(latents), dtype=torch.long), text).sample.square().mean().backward()
        bar.update(1)
        bar.set_postfix(loss=0)
        args.max_train_steps -= 1
        if not args.max_train_steps:
            return
"""


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__.split('.')[-1]}.py", *map(str, arguments)])
    module.main()


def test_train_step_measures_each_arm(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "WINDOWS", 2)
    run(
        monkeypatch, train_step, "--size", "small", "--train", "lora", "--batch", 2, "--compile", "none", "--steps", 1,
        "--dir", tmp_path, "--results", tmp_path,
    )  # fmt: skip
    found = json.loads((tmp_path / "train_step.json").read_text())
    assert [(row["train"], row["λ"]) for row in found["rows"]] == [("lora", 0.0), ("lora", 0.8)]
    assert all(row["ms/step"] > 0 and row["ours / bare"] > 0 for row in found["rows"])
    assert [target["what"] for target in found["targets"]] == [
        "ours / bare loop: lora, batch 2, compile none"
    ]
    assert not list(tmp_path.glob("benchmark-*"))


def test_all_ways_to_a_frechet_distance_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(frechet, "IMAGES", 100)
    run(monkeypatch, frechet, "--dim", 32, "--repeats", 1, "--results", tmp_path)
    found = json.loads((tmp_path / "frechet.json").read_text())
    values = {row["value"] for row in found["rows"] if "value" in row}
    assert len(values) == 1
    assert len(found["rows"]) == 5


def test_full_size_without_a_gpu_is_refused(monkeypatch, capsys):
    for module, more in ((train_step, []), (vs_diffusers, ["--example", "x.py"])):
        with pytest.raises(SystemExit):
            run(monkeypatch, module, *more)
        assert "--size small runs on a CPU" in capsys.readouterr().err


def test_vs_diffusers_drives_the_example_with_our_lora_and_latents(tmp_path, monkeypatch):
    (tmp_path / "example.py").write_text(EXAMPLE)
    monkeypatch.setattr(train_step, "WINDOWS", 2)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "datasets")
    run(
        monkeypatch, vs_diffusers, "--example", tmp_path / "example.py", "--size", "small", "--batch", 2, "--steps", 8,
        "--runs", 1, "--dir", tmp_path, "--results", tmp_path,
    )  # fmt: skip
    rows = json.loads((tmp_path / "vs_diffusers.json").read_text())["rows"]
    assert [row["loop"] for row in rows] == ["diffusers", "ours, λ = 0", "ours, λ = 0.8"]
    assert rows[0]["diffusers / this"] == 1


def test_the_harness_sees_a_single_weight_and_a_single_line_that_differ(miniature, tmp_path):
    a = train(miniature, tmp_path / "a")
    shutil.copytree(a.path, tmp_path / "b")
    b = type(a)(tmp_path / "b")
    assert [row["differing"] for row in differences(a, b)] == [0, 0, 0, 0]
    changed = tensors(b)
    next(iter(changed.values())).view(-1)[0] += 1
    save_file(changed, b.newest_checkpoint() / "trained.safetensors")
    (b.path / "metrics.jsonl").write_text(
        (b.path / "metrics.jsonl").read_text().replace('"step": 4, "loss": ', '"step": 4, "loss": 1')
    )
    assert [row["differing"] for row in differences(a, b)] == [1, 0, 0, 1]
