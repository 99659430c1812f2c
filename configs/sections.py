"""Every knob of a training run by section: typed, defaulted, range-checked, explained. Their combination: `schema.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from common.base_model import BASE
from common.device import check_device_name
from common.errors import UserError
from common.files import expand_home
from common.sides import check_grid, height_width
from method.paths import DRAWS

# Upper limits are far above what anyone needs: they catch slips before memory or time are spent on them.
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
AtLeast0 = Annotated[float, Field(ge=0, le=1e12)]
Above0 = Annotated[float, Field(gt=0, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=10)]
Grid = Annotated[int | tuple[int, int], BeforeValidator(check_grid)]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
OneNeedsNoList = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)


def _as_complaint(check: Callable[[str], str]) -> Callable[[Any], Any]:
    """Return a validator of text: what `check` raises becomes the complaint about the setting."""

    def validate(value: Any) -> Any:
        try:
            return check(value) if isinstance(value, str) else value
        except UserError as error:
            raise ValueError(str(error)) from None

    return validate


@_as_complaint
def _place(text: str) -> str:
    if not text:
        raise UserError("it is empty: give a name, or leave the setting out")
    return expand_home(text)


# A hub id or the path of a folder or file; and a path alone.
Place = Annotated[str, AfterValidator(_place)]
FilePath = Annotated[
    Path, BeforeValidator(lambda value: Path(_place(value)) if isinstance(value, str) else value)
]


def knob(default: Any, meaning: str, **limits: Any) -> Any:
    """Return the field of a setting from its default (`...` where it must be given), its line in `--help`, and its limits."""
    return Field(default, description=meaning, **limits)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )


class Model(Section):
    base: Place = knob(BASE, "base model: a hub id or a local diffusers folder")
    revision: str | None = knob(None, "hub revision (commit) of the base model")
    init_from: FilePath | None = knob(
        None,
        "start from the weights of another run: its folder or a checkpoint's (their moving average), or one "
        "trained.safetensors",
    )
    train: Literal["lora", "partial", "full"] = knob(
        "lora",
        "lora; partial = all weights of the blocks around the taps, as the family names them; full = all weights",
    )
    lora_rank: int = knob(32, "rank of the LoRA matrices", ge=1, le=4096)
    lora_alpha: Above0 = knob(32, "LoRA scale is lora_alpha / lora_rank")
    lora_targets: str = knob(
        "auto",
        "what LoRA wraps, by the names of the family; auto = its first. Stable Diffusion 1.5: attention+conv or attention, in "
        "the blocks of `partial`, of which only the mid-block holds attention",
    )
    gradient_checkpointing: bool = knob(False, "recompute activations in backward to save memory")
    quantize: Literal["none", "int8", "nf4"] = knob(
        "none",
        "frozen weights of linear layers in fewer bits, for LoRA: int8 = 8 bits by torchao (pip install torchao), "
        "nf4 = 4 bits by bitsandbytes, as QLoRA (pip install bitsandbytes; a GPU)",
    )

    @model_validator(mode="after")
    def _only_frozen_weights_are_quantized(self):
        if self.quantize != "none" and self.train != "lora":
            raise ValueError(
                f"model.quantize = {self.quantize} is for model.train=lora: weights in so few bits cannot be trained"
            )
        return self


class Teacher(Section):
    source: Literal["cached", "online", "backbone"] = knob(
        "cached",
        "cached = data.tokens; online = decode the latents and encode them at every step: with the "
        "VAE 2.8 times the operations of a LoRA step, with a tiny decoder 1.2 (docs/method.md); backbone = `block` of the "
        "network itself, in the same forward: model, dim, grid and data.tokens are then not used",
    )
    block: str | None = knob(
        None, "backbone: the tap whose features are the teacher; it must lie behind align.taps", min_length=1
    )
    model: Place | None = knob(
        None,
        "cached: name of the model that made data.tokens, as its manifest has it (null accepts any); online: the "
        "DINOv2, DINOv3 or SigLIP to load, a hub id or folder, or a checkpoint file of a DINOv2",
    )
    revision: str | None = knob(None, "online: hub revision (commit) of the teacher")
    decoder: Place | None = knob(
        None,
        "online: hub id or folder of an AutoencoderTiny, such as madebyollin/taesd; null = the base model's VAE",
    )
    dim: int = knob(
        1024, "width D of the teacher's tokens; the cache must agree (ViT-L: 1024)", ge=1, le=16_384
    )
    grid: Grid = knob(14, "tokens per side, or [height, width]; the cache must agree (14 -> N = 196)")

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of the grid."""
        return height_width(self.grid)


class Data(Section):
    csv: FilePath = knob(..., "training images: CSV of preprocessing script 1")
    latents: FilePath = knob(..., "folder of cached VAE latents (script 2)")
    tokens: FilePath | None = knob(
        None, "folder of cached teacher tokens (script 3); not used by teacher.source=online"
    )
    text: FilePath = knob(..., "folder of cached text embeddings (script 4)")
    text_on_device: Literal["auto", True, False] = knob(
        "auto",
        "whether the text of all prompts stays on the device; else it is read with each batch. auto = where it takes at most "
        "2 GB; the result is the same bit for bit",
    )
    batch_size: int = knob(
        48, "images per forward; a step takes optim.accumulate of them on each process", ge=1, le=65_536
    )
    read_threads: int = knob(
        2, "batches read at the same time, ahead of the step; 0 reads each when it is needed", ge=0, le=256
    )
    caption_dropout: Share = knob(0.1, "share of captions replaced by the null prompt (for CFG)")


class Diffusion(Section):
    prediction: Literal["auto", "v", "epsilon"] = knob(
        "auto",
        "space in which the diffusion loss is taken: v (the default) or epsilon; of flow matching its own, ε − x_0",
    )
    parameterization: Literal["auto", "epsilon", "v"] = knob(
        "auto", "what the network outputs; auto = the base model's own prediction_type"
    )
    v_weight_max: Above0 = knob(
        5.0, "ceiling of the weight 1/α² that a v-loss puts on the error of an ε-network"
    )
    snr_gamma: Above0 | None = knob(
        None,
        "γ of min-SNR: the loss is min(SNR, γ) |x_0 − x̂_0|², whatever prediction says; null = unweighted",
    )
    shift: Annotated[float, Field(gt=0, le=1000)] | Literal["resolution"] | None = knob(
        None,
        "flow matching: s of t = s u / (1 + (s − 1) u), more noise where it is larger; null = that of the base model's "
        "scheduler, resolution = what its pipeline takes for images of this size",
    )
    draw: Literal[DRAWS] | None = knob(None, "flow matching: how u is drawn; null = uniform")
    logit_mean: float | None = knob(
        None, "flow matching, draw=logit_normal: mean of the normal number; null = 0"
    )
    logit_std: Above0 | None = knob(
        None, "flow matching, draw=logit_normal: its standard deviation; null = 1"
    )
    guidance: AtLeast0 | None = knob(
        None,
        "what a network that is told a guidance scale (Flux) is told, in training and sampling alike; null = its family's",
    )

    @model_validator(mode="after")
    def _normal_is_drawn(self):
        given = [name for name in ("logit_mean", "logit_std") if getattr(self, name) is not None]
        if given and self.draw != "logit_normal":
            raise ValueError(f"diffusion.{given[0]} has no effect without diffusion.draw=logit_normal")
        return self


class Optim(Section):
    name: Literal["adamw", "adamw8bit"] = knob(
        "adamw", "adamw = AdamW, fused; adamw8bit = its moments in 8 bits, by torchao (pip install torchao)"
    )
    lr: Rate = knob(2e-4, "learning rate of the network's trained weights (plan: LoRA 2e-4, full 1e-4)")
    head_lr: Rate | None = knob(None, "learning rate of the alignment heads; null = the same")
    betas: Annotated[tuple[Decay, Decay], AsTuple] = knob((0.9, 0.999), "AdamW betas")
    eps: Annotated[float, Field(ge=1e-30, le=1)] = knob(1e-8, "AdamW epsilon")
    weight_decay: AtLeast0 = knob(0.01, "AdamW weight decay")
    warmup_fraction: Share = knob(
        0.1, "share of the steps over which the rate rises from 0; then cosine to 0"
    )
    accumulate: Positive = knob(
        1, "batches whose gradients make a step; the sample Gram is taken over each batch"
    )
    grad_clip: Above0 = knob(1.0, "largest gradient norm, over all trained weights")
    ema_decay: float = knob(0.9995, "decay of the moving average that evaluation uses", ge=0, lt=1)


class Train(Section):
    steps: Positive = knob(60_000, "optimiser steps")
    precision: Literal["auto", "bf16", "fp32"] = knob(
        "auto",
        "auto = bf16 on a GPU that has it, else fp32. In bf16 the network is held in bf16, and what is trained of "
        "it in fp32 as well",
    )
    compile: Literal["auto", "none", "default", "max-autotune"] = knob(
        "auto",
        "torch.compile of the network; auto = default on a GPU, none elsewhere. The first step takes minutes",
    )
    channels_last: bool | None = knob(
        None, "memory layout of the network; null = channels last on a GPU in bf16"
    )
    device: Annotated[str, AfterValidator(_as_complaint(check_device_name))] = knob(
        "auto", "auto = cuda when present, else cpu; cpu, cuda, or cuda:N"
    )
    log_every: Positive = knob(50, "steps between lines of metrics.jsonl")
    checkpoint_every: Positive = knob(5000, "steps between checkpoints")
    keep_checkpoints: Positive = knob(3, "newest checkpoints kept")
    keep_every: Count = knob(0, "checkpoints at multiples of this are kept for good; 0 = none")
    max_skipped: Positive = knob(
        10, "steps in a row without a finite gradient, each skipped, that end the training"
    )
    preview_every: Count = knob(0, "steps between sample grids of the moving average; 0 = none")
    preview_images: int = knob(16, "images of a preview", ge=1, le=1024)
    preview_prompts: Annotated[tuple[str, ...], AsTuple, OneNeedsNoList] = knob(
        (),
        "prompts of the previews, each its text or its number in data.text; empty = eight of all prompts or classes, evenly "
        "spread",
    )
    eval_every: Count = knob(
        0,
        "steps between evaluations of the moving average by the settings of eval, as `evaluate.py curve` "
        "makes them; 0 = none (plan: 5000; one of 10k images costs about an A100-hour)",
    )
    wandb: str | None = knob(None, "Weights & Biases project to log to as well (pip install wandb)")

    @model_validator(mode="after")
    def _previews_show_their_prompts(self):
        if self.preview_prompts and not self.preview_every:
            raise ValueError(
                "train.preview_prompts has no effect while train.preview_every = 0: set that too"
            )
        if len(self.preview_prompts) > self.preview_images:
            raise ValueError(
                f"train.preview_images = {self.preview_images} are fewer than the {len(self.preview_prompts)} "
                "train.preview_prompts: raise it"
            )
        return self
