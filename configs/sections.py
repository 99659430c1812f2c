"""Every knob of a training run by section: typed, defaulted, range-checked, explained. Their combination: `schema.py`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from method.alignment import MANIFOLD_LOSSES, PROJECTIONS
from method.coefficient import DECAYS

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Model(Section):
    base: str = Field(BASE, description="Stable Diffusion 1.5: a hub id or a local diffusers folder")
    revision: str | None = Field(None, description="hub revision (commit) of the base model")
    init_from: Path | None = Field(
        None,
        description="start from the weights of another run: its folder or a checkpoint's (their moving average), or one "
        "trained.safetensors",
    )
    train: Literal["lora", "partial", "full"] = Field(
        "lora",
        description="lora; partial = all weights of down_blocks.3, mid_block, up_blocks.0; full = all weights",
    )
    lora_rank: int = Field(32, ge=1, description="rank of the LoRA matrices")
    lora_alpha: float = Field(32, gt=0, description="LoRA scale is lora_alpha / lora_rank")
    lora_targets: str = Field(
        "attention+conv",
        description="what LoRA wraps, by the names of the family. Stable Diffusion 1.5: attention+conv or attention, in "
        "down_blocks.3, mid_block, up_blocks.0, of which only mid_block holds attention",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward to save memory"
    )


class Teacher(Section):
    source: Literal["cached", "online"] = Field(
        "cached",
        description="cached = data.tokens; online = decode the latents and encode them at every step: with the "
        "VAE 2.8 times the operations of a LoRA step, with a tiny decoder 1.2 (docs/method.md)",
    )
    model: str | None = Field(
        None,
        description="cached: name of the model that made data.tokens, as its manifest has it (null accepts any); online: the "
        "DINOv2 to load, a hub id, folder or checkpoint file",
    )
    revision: str | None = Field(None, description="online: hub revision (commit) of the teacher")
    decoder: str | None = Field(
        None,
        description="online: hub id or folder of an AutoencoderTiny, such as madebyollin/taesd; null = the base model's VAE",
    )
    dim: int = Field(
        1024, ge=1, description="width D of the teacher's tokens; the cache must agree (ViT-L: 1024)"
    )
    grid: int = Field(14, ge=2, description="tokens per side; the cache must agree (14 -> N = 196)")


class Data(Section):
    csv: Path = Field(description="training images: CSV of preprocessing script 1")
    latents: Path = Field(description="folder of cached VAE latents (script 2)")
    tokens: Path | None = Field(
        None, description="folder of cached teacher tokens (script 3); not used by teacher.source=online"
    )
    text: Path = Field(description="folder of cached CLIP embeddings (script 4)")
    batch_size: int = Field(
        48, ge=1, description="images per forward; a step takes optim.accumulate of them on each process"
    )
    read_threads: int = Field(
        2,
        ge=0,
        description="batches read at the same time, ahead of the step; 0 reads each when it is needed",
    )
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="share of captions replaced by the null prompt (for CFG)"
    )


class Align(Section):
    taps: tuple[str, ...] = Field(
        ("mid",),
        min_length=1,
        description="where the network is read, by the names of its family (Stable Diffusion 1.5: enc_last, mid, dec_first); "
        "the loss is the mean over taps (in a shell: 'align.taps=[enc_last,mid]')",
    )
    coeff: float = Field(
        0.8, ge=0, description="λ, weight of the alignment loss; 0 = no alignment work at all"
    )
    manifold_coeff: float = Field(
        3.0, ge=0, description="w, weight of the manifold loss beside the token loss"
    )
    manifold: Literal[tuple(MANIFOLD_LOSSES)] = Field(
        "sample",
        description="Gram matrix of pooled tokens across the batch (B×B), of tokens within an image (N×N), or both",
    )
    upper_only: bool = Field(False, description="compare the strict upper triangle of the Gram matrices only")
    gather: bool = Field(
        False,
        description="take the sample Gram over the batches of all ranks together; its meaning depends on their number",
    )
    head: Literal[tuple(PROJECTIONS)] = Field(
        "conv1x1",
        description="what projects the features: the plan's 1×1 conv, GroupNorm, GELU; LayerNorm and one layer; REPA's three "
        "layers with SiLU; iREPA's 3×3 conv",
    )
    head_hidden: int = Field(2048, ge=1, description="width of the hidden layers of head = mlp")
    spatial_norm: float | None = Field(
        None,
        ge=0,
        le=1,
        description="iREPA's α: the teacher's tokens become (y − α·mean) / std over each image's tokens; null = as they are",
    )
    schedule: Literal[tuple(DECAYS)] = Field(
        "constant", description="how λ goes to coeff_end after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="λ rises linearly from 0 over these steps")
    decay_steps: int = Field(
        0, ge=0, description="length of the decay, counted after the warm-up; 0 = to the end"
    )
    coeff_end: float = Field(0.0, ge=0, description="λ at the end of the decay")
    power: float = Field(1.0, gt=0, description="exponent of the polynomial schedule")
    cutoff_step: int = Field(0, ge=0, description="λ = 0 from this step on; 0 = never")
    similarity_threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="λ = 0 once the moving average of the mean cosine reaches this; null = never",
    )
    similarity_ema_decay: Decay = Field(
        0.99, description="decay of that average; it decides nothing before it has seen 1 / (1 − decay) steps"
    )
    threshold_mode: Literal["permanent", "recoverable"] = Field(
        "permanent", description="whether λ stays 0, or comes back when the average falls below the threshold"
    )
    similarity_every: int = Field(
        10, ge=1, description="while λ is 0 but recoverable, measure the similarity at every so many steps"
    )

    @field_validator("taps", mode="before")
    @classmethod
    def _one_tap_needs_no_list(cls, taps):
        return (taps,) if isinstance(taps, str) else taps

    @model_validator(mode="after")
    def _taps_are_distinct(self):
        if len(set(self.taps)) != len(self.taps):
            raise ValueError(f"align.taps names a tap twice: {', '.join(self.taps)}")
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self):
        without = {"coeff_end": 0.0, "decay_steps": 0, "power": 1.0}
        idle = [name for name, default in without.items() if getattr(self, name) != default]
        if self.schedule == "constant" and idle:
            raise ValueError(
                f"align.{idle[0]} has no effect while align.schedule is constant: choose another schedule"
            )
        if self.coeff == 0 and self.coeff_end > 0:
            raise ValueError(
                f"align.coeff_end = {self.coeff_end:g} has no effect while align.coeff = 0, which leaves the alignment "
                "out: raise align.coeff, or set align.coeff_end=0"
            )
        return self

    @model_validator(mode="after")
    def _something_left_to_compare(self):
        if self.spatial_norm == 1 and self.manifold != "token" and self.manifold_coeff > 0:
            raise ValueError(
                "align.spatial_norm = 1 takes away the mean tokens that the sample Gram compares: set align.manifold=token, "
                "align.manifold_coeff=0, or a smaller align.spatial_norm"
            )
        return self


class Diffusion(Section):
    prediction: Literal["v", "epsilon"] = Field("v", description="space in which the diffusion loss is taken")
    parameterization: Literal["auto", "epsilon", "v"] = Field(
        "auto", description="what the network outputs; auto = the base model's own prediction_type"
    )
    v_weight_max: float = Field(
        5.0, gt=0, description="ceiling of the weight 1/α² that a v-loss puts on the error of an ε-network"
    )
    snr_gamma: float | None = Field(
        None,
        gt=0,
        description="γ of min-SNR: the loss is min(SNR, γ) |x_0 − x̂_0|², whatever prediction says; null = unweighted",
    )


class Optim(Section):
    name: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="adamw = AdamW, fused; adamw8bit = its moments in 8 bits, by torchao (pip install torchao)",
    )
    lr: float = Field(
        2e-4,
        gt=0,
        description="learning rate of the U-Net's trained weights (plan: LoRA 2e-4, full 1e-4)",
    )
    head_lr: float | None = Field(
        None, gt=0, description="learning rate of the alignment heads; null = the same"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW betas")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    warmup_fraction: float = Field(
        0.1, ge=0, le=1, description="share of the steps over which the rate rises from 0; then cosine to 0"
    )
    accumulate: int = Field(
        1, ge=1, description="batches whose gradients make a step; the sample Gram is taken over each batch"
    )
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm, over all trained weights")
    ema_decay: float = Field(
        0.9995, ge=0, lt=1, description="decay of the moving average that evaluation uses"
    )


class Train(Section):
    steps: int = Field(60_000, ge=1, description="optimiser steps")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="auto = bf16 on a GPU that has it, else fp32. In bf16 the network is held in bf16, and what is trained of "
        "it in fp32 as well",
    )
    compile: Literal["auto", "none", "default", "max-autotune"] = Field(
        "auto",
        description="torch.compile of the U-Net; auto = default on a GPU, none elsewhere. The first step takes minutes",
    )
    channels_last: bool | None = Field(
        None, description="memory layout of the U-Net; null = channels last on a GPU in bf16"
    )
    device: str = Field("auto", description="auto = cuda when present, else cpu")
    log_every: int = Field(50, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: int = Field(5000, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints kept")
    keep_every: int = Field(
        0, ge=0, description="checkpoints at multiples of this are kept for good; 0 = none"
    )
    max_skipped: int = Field(
        10, ge=1, description="steps in a row without a finite gradient, each skipped, that end the training"
    )
    preview_every: int = Field(
        0, ge=0, description="steps between sample grids of the moving average; 0 = none"
    )
    preview_images: int = Field(16, ge=1, description="images of a preview")
    eval_every: int = Field(
        0,
        ge=0,
        description="steps between evaluations of the moving average by the settings of eval, as `evaluate_sd15.py curve` "
        "makes them; 0 = none (plan: 5000; one of 10k images costs about an A100-hour)",
    )
    wandb: str | None = Field(
        None, description="Weights & Biases project to log to as well (pip install wandb)"
    )
