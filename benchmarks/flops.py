"""Floating-point operations of the parts of a training step, for one image: counted on shapes alone, nothing is computed.

    python benchmarks/flops.py

One multiply-add is two operations. Norms, activations, softmax, the losses' reductions and the resizing of the head are not
counted, nor what memory traffic they cost; a time needs a GPU.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from benchmarks.report import Target, benchmark_parser, publish
from method.alignment import PROJECTIONS, AlignHead
from models.sd15_unet_aligned import SD15UNetAligned, lora_config

BATCH = 2
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
DINOV2 = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "g": (1536, 40, 24)}


def main() -> None:
    args = benchmark_parser(__doc__).parse_args()
    with torch.device("meta"):
        parts = {f"step, {train}, λ = 0": step_of(train, ()) for train in ("lora", "full")}
        parts |= {f"step, {train}, U-REPA at mid": step_of(train, ("mid",)) for train in ("lora", "full")}
        parts |= {f"head {kind}, forward and backward": head_of(kind) for kind in PROJECTIONS}
        parts |= {"VAE decode to 512 px": vae_decode(), "AutoencoderTiny decode to 512 px": tiny_decode()}
        parts |= {
            f"DINOv2-{size} at {side} px": dinov2(size, side) for size in DINOV2 for side in (196, 224, 518)
        }
        flops = {name: count(run) for name, run in parts.items()}
    lora = flops["step, lora, λ = 0"]
    rows = [
        {"part, for one image": name, "GFLOP": value / 1e9, "of a LoRA step": value / lora}
        for name, value in flops.items()
    ]
    added = {
        train: flops[f"step, {train}, U-REPA at mid"] / flops[f"step, {train}, λ = 0"] - 1
        for train in ("lora", "full")
    }
    targets = [
        Target(f"what U-REPA adds to a step, {train}", value, at_most=0.02) for train, value in added.items()
    ]
    publish(args, rows, targets)


def count(run: Callable[[], None]) -> float:
    """Operations of one call, per image."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / BATCH


def step_of(train: str, taps: tuple[str, ...]) -> Callable[[], None]:
    """Forward and backward of the diffusion loss and, with taps, of the alignment."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    model = SD15UNetAligned(unet, taps, train=train, lora_config=lora_config()).train()
    latents, text = torch.randn(BATCH, 4, 64, 64), torch.randn(BATCH, 77, 768)

    def run() -> None:
        loss = model(latents, torch.zeros(BATCH, dtype=torch.long), text).square().mean()
        if taps:
            loss = loss + model.get_aligned_tokens()["mid"].sum()  # the losses themselves are reductions
            model.clear_hooks()
        loss.backward()

    return run


def head_of(kind: str) -> Callable[[], None]:
    head, feature = AlignHead(1280, 1024, kind), torch.randn(BATCH, 1280, 8, 8, requires_grad=True)
    return lambda: head(feature, (14, 14)).sum().backward()


def vae_decode() -> Callable[[], None]:
    vae, latents = AutoencoderKL(**VAE).requires_grad_(False), torch.randn(BATCH, 4, 64, 64)
    return lambda: vae.decode(latents)


def tiny_decode() -> Callable[[], None]:
    tiny, latents = AutoencoderTiny().requires_grad_(False), torch.randn(BATCH, 4, 64, 64)
    return lambda: tiny.decode(latents)


def dinov2(size: str, side: int) -> Callable[[], None]:
    width, layers, heads = DINOV2[size]
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, image_size=518, patch_size=14,
        use_swiglu_ffn=size == "g",
    )  # fmt: skip
    model, images = Dinov2Model(config).eval().requires_grad_(False), torch.randn(BATCH, 3, side, side)
    return lambda: model(images)


if __name__ == "__main__":
    main()
