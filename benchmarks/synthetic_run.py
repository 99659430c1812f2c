"""A base model with random weights and a cache of random values: a training's shapes without anything to download."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from cache.image_list import Sample, write_samples
from cache.manifest import FieldSpec
from cache.shards import FieldWriter
from cache.text import text_spec, write_table

# Of Stable Diffusion 1.5 and DINOv2-L at 14×14 tokens, and of a network that a CPU trains in a tenth of a second a step.
SIZES = {
    "full": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768},
        "latents": (4, 64, 64), "tokens": (196, 1024), "text": (77, 768), "classes": 1000,
    },
    "small": {
        "unet": {"sample_size": 16, "cross_attention_dim": 32, "block_out_channels": (16, 32, 64, 64), "layers_per_block": 1,
                 "attention_head_dim": 2, "norm_num_groups": 8},
        "latents": (4, 16, 16), "tokens": (16, 64), "text": (77, 32), "classes": 10,
    },
}  # fmt: skip
ABOUT = {
    "latents": {"details": {"posterior": "mode", "scaled": True, "scaling_factor": 0.18215}},
    "tokens": {"source": {"model": "facebook/dinov2-large"}},
}


def make_synthetic(folder: Path, size: str = "full", images: int = 256) -> list[str]:
    """Write base model and cache below `folder`; returns the settings that make a config use them."""
    shapes = SIZES[size]
    make_base(folder / "sd15", shapes["unet"])
    generator = torch.Generator().manual_seed(0)

    def values_of(field: str, indices: list[int]) -> Tensor:
        values = torch.randn(len(indices), *shapes[field], generator=generator)
        return torch.nn.functional.normalize(values, dim=-1) if field == "tokens" else values

    write_cache(folder, shapes, images, values_of, classes=min(shapes["classes"], images))
    return [
        f"model.base={folder}/sd15",
        f"data.csv={folder}/list.csv",
        *(f"data.{name}={folder}/{name}" for name in ("latents", "tokens", "text")),
        f"teacher.dim={shapes['tokens'][1]}",
        f"teacher.grid={int(shapes['tokens'][0] ** 0.5)}",
        f"run={folder}/run",
    ]


def write_cache(
    folder: Path, shapes: dict, count: int, values_of: Callable[[str, list[int]], Tensor], *,
    classes: int, shard_size: int | None = None,
) -> None:  # fmt: skip
    """Write a cache as scripts 1 to 4 do, with random text; `values_of(field, indices)` gives the values `(n, *shape)`.

    The ids are like ImageNet's, so that those of one folder are neighbours.
    """
    index_of = {f"n{i // 200:08d}/n{i // 200:08d}_{i}": i for i in range(count)}
    samples = [Sample(key, "unused", i % classes, f"n{i % classes}") for key, i in index_of.items()]
    write_samples(folder / "list.csv", samples)
    for field, about in ABOUT.items():
        spec = FieldSpec(field, shapes[field], "float16", "random numbers", **about)
        writer = FieldWriter(folder / field, spec, list(index_of), shard_size=shard_size)
        for shard, batch in writer.pending(64):
            writer.put(shard, batch, spec.encode(values_of(field, [index_of[key] for key in batch])))
        writer.finish()
    text = torch.randn(classes + 1, *shapes["text"], generator=torch.Generator().manual_seed(1)).half()
    fields = {"prompt_embeds": text}
    write_table(folder / "text", fields, text_spec(fields, "random numbers"))


def make_base(folder: Path, unet_config: dict) -> None:
    """Write a diffusers folder with a U-Net of random weights and SD-1.5's noise schedule."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config)
    unet = unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    unet.save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule.save_pretrained(folder / "scheduler")
