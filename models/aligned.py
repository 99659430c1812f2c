"""Stable Diffusion 1.5's U-Net with taps, alignment heads, and the part of it that is trained."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from common.errors import UserError
from method.alignment import AlignHead
from models.taps import Tap, Taps

# The blocks around the bottleneck: what LoRA and partial fine-tuning touch.
ALIGNED_BLOCKS = r"(mid_block|down_blocks\.3|up_blocks\.0)"
# One anchored regex: a list of suffixes would match the whole U-Net. down_blocks.3 and up_blocks.0 hold no attention.
LORA_TARGETS = {
    "attention+conv": rf"^{ALIGNED_BLOCKS}\..*\.(to_q|to_k|to_v|to_out\.0|conv1|conv2)$",
    "attention": rf"^{ALIGNED_BLOCKS}\..*\.(to_q|to_k|to_v|to_out\.0)$",
}
DOWN_BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP_BLOCKS = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


def sd15_taps(unet: UNet2DConditionModel) -> dict[str, Tap]:
    """The three places of the plan, all at the lowest resolution: `(B, 1280, 8, 8)` for a 64×64 latent.

    `dec_first` is read before the upsampler of `up_blocks.0`, whose own output is already 16×16.
    """
    blocks = {"enc_last": "down_blocks.3", "mid": "mid_block", "dec_first": "up_blocks.0"}
    return {
        name: Tap(f"{path}.resnets.{len(unet.get_submodule(path).resnets) - 1}")
        for name, path in blocks.items()
    }


def lora_config(rank: int = 32, alpha: float = 32, targets: str = "attention+conv") -> LoraConfig:
    """The plan's LoRA: 22 modules and 7,462,912 parameters at rank 32 on the full-size U-Net."""
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS[targets], init_lora_weights="gaussian"
    )


class SD15UNetAligned(nn.Module):
    """A U-Net that is trained in part, is read at its taps, and has one alignment head per tap beside it.

        model = SD15UNetAligned(unet, ["mid"], D=1024, grid=14, train="lora", lora_config=lora_config())
        prediction = model(latents, timesteps, encoder_hidden_states)
        tokens = model.get_aligned_tokens()       # {"mid": (B, 196, 1024)}
        model.clear_hooks()

    Args:
        unet: SD-1.5's U-Net, of any width. It is changed in place: LoRA is added or weights are frozen.
        align_layers: taps to align; empty builds neither hooks nor heads.
        D, grid: width and token grid of the teacher.
        head, head_hidden: kind of all heads, and the hidden width of the kind `mlp` (see `AlignHead`).
        train: "lora" (with `lora_config`), "partial" (all weights around the bottleneck), or "full".
        seed: seed of the initial LoRA and head weights, which leave torch's random state on the CPU alone.

    The heads are no part of `unet`, so its state dict stays loadable in stock diffusers. Raises `UserError` for a U-Net that
    is not SD-1.5's.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        align_layers: Sequence[str] = ("mid",),
        D: int = 1024,
        *,
        grid: int | tuple[int, int] = 14,
        head: str = "conv1x1",
        head_hidden: int = 2048,
        train: str = "lora",
        lora_config: LoraConfig | None = None,
        seed: int = 0,
    ):
        super().__init__()
        insist_sd15(unet)
        self.unet = unet
        self.trained = train
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _choose_trained(unet, train, lora_config)
            width = unet.config.block_out_channels[-1]
            self.heads = nn.ModuleDict(
                {name: AlignHead(width, D, grid, head, head_hidden) for name in align_layers}
            )
        taps = sd15_taps(unet)
        self.taps = Taps(unet, {name: taps[name] for name in align_layers})

    def forward(
        self, latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, *, capture: bool = True
    ) -> Tensor:
        """The U-Net's own output `(B, 4, h, w)`, bit for bit; the taps listen meanwhile unless `capture` is False.

        Inputs are turned to the U-Net's own precision.
        """
        dtype = self.dtype
        latents, encoder_hidden_states = latents.to(dtype), encoder_hidden_states.to(dtype)
        if not (self.heads and capture):
            return self.unet(latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        with self.taps.recording():
            return self.unet(latents, timesteps, encoder_hidden_states, return_dict=False)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's precision; its own property of that name walks through all modules, a millisecond each time."""
        return self.unet.conv_in.weight.dtype

    def get_aligned_tokens(self) -> dict[str, Tensor]:
        """Tokens `(B, N, D)` of each head for the last forward; raises RuntimeError when nothing was captured."""
        if set(self.taps.captured) != set(self.heads):
            raise RuntimeError("no hidden states captured: call forward (with capture=True) first")
        return {name: head(self.taps.captured[name]) for name, head in self.heads.items()}

    def clear_hooks(self) -> None:
        """Forget the captured hidden states, and with them the graph they keep alive."""
        self.taps.clear()

    def compile_unet(self, mode: str = "default") -> None:
        """Compile the U-Net at its next call; taps stay, and sampling may still use it.

        With gradient checkpointing each block is compiled by itself: a tap inside a checkpoint breaks a graph of the whole.
        CUDA graphs are left out, which would hand out the same memory again while a tap holds it.
        """
        if mode == "max-autotune":
            mode = "max-autotune-no-cudagraphs"
        modules = [self.unet]
        if self.unet.is_gradient_checkpointing:
            kinds = (ResnetBlock2D, BasicTransformerBlock)  # what diffusers checkpoints
            modules = [module for module in self.unet.modules() if isinstance(module, kinds)]
        for module in modules:
            module.compile(mode=mode)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained by name, `unet.…` and `heads.…`: what checkpoints and EMA hold."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trained(self, source: Path, weights: dict[str, Tensor]) -> None:
        """Start from what another run trained: all of the U-Net's trained weights, and those heads that both have.

        Raises `UserError` unless the other run trained the same part of the same U-Net.
        """
        own = self.trained_parameters()
        theirs = {name: value for name, value in weights.items() if name in own or name.startswith("unet.")}
        missing = [name for name in own if name.startswith("unet.") and name not in theirs]
        foreign = [name for name in theirs if name not in own]
        if missing or foreign:
            raise UserError(
                f"{source} holds other weights than model.train={self.trained} trains (for instance {(missing + foreign)[0]}): "
                "choose the same model.train and LoRA settings"
            )
        with torch.no_grad():
            for name, value in theirs.items():
                if value.shape != own[name].shape:
                    raise UserError(
                        f"{source}: {name} is {tuple(value.shape)}, here it is {tuple(own[name].shape)}: choose its settings"
                    )
                own[name].copy_(value)

    def export(self, folder: str | Path) -> Path:
        """Write the current weights as ordinary tools expect them and return where they are.

        LoRA becomes `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`; anything else a diffusers
        `unet/` folder. Heads are never exported.
        """
        folder = Path(folder)
        if self.trained != "lora":
            self.unet.save_pretrained(folder / "unet")
            return folder / "unet"
        StableDiffusionPipeline.save_lora_weights(
            folder,
            # PEFT's own names: diffusers' converter renames attention but not convolutions, and its loader then silently
            # drops the attention half of such a mixed file (diffusers 0.42).
            unet_lora_layers=get_peft_model_state_dict(self.unet),
            unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict(),  # carries alpha
        )
        return folder / "pytorch_lora_weights.safetensors"

    def lora_state_dict(self) -> dict[str, Tensor]:
        """LoRA weights under PEFT's names, with the prefix `unet.` of a pipeline."""
        return {f"unet.{name}": value for name, value in get_peft_model_state_dict(self.unet).items()}

    def merged_unet(self) -> UNet2DConditionModel:
        """The U-Net as an ordinary one, its LoRA merged into the weights for good."""
        if self.trained == "lora":
            self.unet.fuse_lora()
            self.unet.unload_lora()
        return self.unet


def insist_sd15(unet: UNet2DConditionModel) -> None:
    """Raise `UserError` unless the U-Net has SD-1.5's four down and up blocks."""
    found = tuple(unet.config.down_block_types), tuple(unet.config.up_block_types)
    if found != (DOWN_BLOCKS, UP_BLOCKS):
        raise UserError(
            f"the base model's U-Net has {len(found[0])} levels ({', '.join(found[0])}), not those of Stable Diffusion 1.5: "
            "check model.base"
        )


def _choose_trained(unet: UNet2DConditionModel, train: str, config: LoraConfig | None) -> None:
    """Freeze the U-Net, then add LoRA or free the weights that are to be trained."""
    unet.requires_grad_(False)
    if train == "lora":
        if config is None:
            raise ValueError("train='lora' needs a lora_config")
        try:
            unet.add_adapter(config)  # freezes the base
        except ValueError as error:  # peft's, when the targets match nothing
            raise UserError(f"LoRA finds no module to wrap: {str(error).splitlines()[0]}") from None
    elif train == "partial":
        for path in ("down_blocks.3", "mid_block", "up_blocks.0"):
            unet.get_submodule(path).requires_grad_(True)
    elif train == "full":
        unet.requires_grad_(True)
    else:
        raise ValueError(f"train must be lora, partial or full, not {train!r}")
