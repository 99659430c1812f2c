"""A base model with random weights and a cache of random values: a training's shapes without anything to download."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from cache.image_list import Sample, write_samples
from cache.manifest import FieldSpec, TextSpec
from cache.shards import FieldWriter
from cache.text import write_text
from common.files import write_json
from miniature.models import build_tokenizer

# Of Stable Diffusion 1.5 and DINOv2-L at 14×14 tokens, and of a network that a CPU trains in a tenth of a second a step.
SIZES = {
    "full": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
        "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "latents": (4, 64, 64), "tokens": (196, 1024), "text": (77, 768), "classes": 1000, "image": 512,
    },
    "small": {
        "unet": {"sample_size": 16, "cross_attention_dim": 32, "block_out_channels": (16, 32, 64, 64), "layers_per_block": 1,
                 "attention_head_dim": 2, "norm_num_groups": 8},
        "vae": {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 32},
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "latents": (4, 16, 16), "tokens": (16, 64), "text": (77, 32), "classes": 10, "image": 32,
    },
}  # fmt: skip
ABOUT = {
    "latents": {"details": {"posterior": "mode", "scaled": True, "scaling_factor": 0.18215}},
    "tokens": {"source": {"model": "facebook/dinov2-large"}},
}
# The parts of a pipeline folder, as model_index.json names them.
PIPELINE = {
    "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDPMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None],
    "image_encoder": [None, None], "requires_safety_checker": False,
}  # fmt: skip


def make_synthetic(
    folder: Path, size: str = "full", images: int = 256, *, pictures: Sequence[str] | None = None
) -> list[str]:
    """Write base model and cache below `folder`; returns the settings that make a config use them.

    With `pictures` the images of the list are these files, over and over, and the base model is a whole pipeline.
    """
    shapes = SIZES[size]
    make_base(folder / "sd15", shapes["unet"])
    if pictures is not None:
        complete_pipeline(folder / "sd15", shapes)
    generator = torch.Generator().manual_seed(0)

    def values_of(field: str, indices: list[int]) -> Tensor:
        values = torch.randn(len(indices), *shapes[field], generator=generator)
        return torch.nn.functional.normalize(values, dim=-1) if field == "tokens" else values

    classes = min(shapes["classes"], images)
    write_cache(folder, shapes, images, values_of, classes=classes, pictures=pictures or ["unused"])
    tokens, dim = shapes["tokens"]
    caches = (f"data.{name}={folder}/{name}" for name in ("latents", "tokens", "text"))
    settings = [f"model.base={folder}/sd15", f"data.csv={folder}/list.csv", *caches, f"run={folder}/run"]
    return [*settings, f"teacher.dim={dim}", f"teacher.grid={int(tokens**0.5)}"]


def write_cache(
    folder: Path, shapes: dict, count: int, values_of: Callable[[str, list[int]], Tensor], *,
    classes: int, shard_size: int | None = None, pictures: Sequence[str] = ("unused",),
) -> None:  # fmt: skip
    """Write a cache as scripts 1 to 4 do, with random text; `values_of(field, indices)` gives the values `(n, *shape)`.

    The ids are like ImageNet's, so that those of one folder are neighbours.
    """
    index_of = {f"n{i // 200:08d}/n{i // 200:08d}_{i}": i for i in range(count)}
    shown = ((key, pictures[i % len(pictures)], i % classes) for key, i in index_of.items())
    write_samples(folder / "list.csv", [Sample(*sample, f"n{sample[-1]}") for sample in shown])
    for field, about in ABOUT.items():
        view = {"kind": "aligned", "size": shapes["image"]} if field == "latents" else {}
        spec = FieldSpec(field, shapes[field], "float16", "random numbers", view=view, **about)
        writer = FieldWriter(folder / field, spec, list(index_of), shard_size=shard_size)
        for shard, batch in writer.pending(64):
            writer.put(shard, batch, spec.encode(values_of(field, [index_of[key] for key in batch])))
        writer.finish()
    text = torch.randn(classes + 1, *shapes["text"], generator=torch.Generator().manual_seed(1)).half()
    template = "a photo of a {class_name}"
    prompts = [template.format(class_name=f"n{i}") for i in range(classes)]
    named = {"prompt_embeds": {"shape": list(shapes["text"]), "dtype": "float16"}}
    spec = TextSpec.of(named, "random numbers", {}, {"template": template})
    listed = {"n_classes": classes, "synsets": [], "prompts": prompts}
    write_text(folder / "text", spec, listed, {"prompt_embeds": text[:-1]}, {"prompt_embeds": text[-1]})


def make_base(folder: Path, unet_config: dict) -> None:
    """Write a diffusers folder with a U-Net of random weights and SD-1.5's noise schedule."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config)
    unet = unet.to_empty(device="cpu")
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:  # norms pass on what they get, so that the output depends on the input
            torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    unet.save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDPMScheduler(**betas, steps_offset=1, clip_sample=False).save_pretrained(folder / "scheduler")


def complete_pipeline(folder: Path, shapes: dict) -> None:
    """Add VAE, text encoder and tokenizer to a folder of `make_base`, so that StableDiffusionPipeline loads it."""
    make_vae(folder, shapes["vae"])
    tokenizer = build_tokenizer(["photo"])
    tokenizer.save_pretrained(folder / "tokenizer")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(vocab_size=len(tokenizer), **shapes["text_encoder"], **special)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"} | PIPELINE)


def make_vae(folder: Path, config: dict) -> None:
    """Write a VAE of Stable Diffusion 1.5's block types with random weights."""
    levels = len(config["block_out_channels"])
    down, up = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    AutoencoderKL(down_block_types=down, up_block_types=up, **config).save_pretrained(folder / "vae")
