"""Any backbone with taps, alignment heads beside it, and the part of it that is trained."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from method.alignment import GROUPS, AlignHead
from models.backbone import Backbone
from models.pipeline_parts import kept_exact
from models.taps import Taps

BACKBONE, HEADS = "backbone.", "heads."  # the first part of every trained weight's name


class AlignedModel(nn.Module):
    """A network that is trained in part, is read at its taps, and has one alignment head per tap beside it.

        model = AlignedModel(family, network, ["mid"], D=1024, train="lora", lora=family_lora(family, rank=32))
        prediction = model.predict(x_t, t, text)
        tokens = model.get_aligned_tokens((14, 14))       # {"mid": (B, 196, 1024)}
        model.clear_hooks()

    Args:
        family: what the network is.
        network: the diffusers model of that family, of any width. It is changed in place: LoRA is added or weights are frozen.
        align_layers: taps to align; empty builds neither hooks nor heads.
        D: width of the teacher's tokens.
        teacher_block: a tap behind all of `align_layers`, whose features are the teacher's tokens; D is then its width.
        head, head_hidden: kind of all heads, and the hidden width of the kind `mlp` (see `AlignHead`).
        train: "lora" (with `lora`), "partial" (all weights of the family's partial blocks), or "full".
        seed: seed of the initial LoRA and head weights, which leave torch's random state on the CPU alone.

    The heads are no part of `backbone`, so its state dict stays loadable in stock diffusers. Raises `UserError` for a network
    that is not the family's, or a tap that it does not have.
    """

    def __init__(
        self,
        family: Backbone,
        network: nn.Module,
        align_layers: Sequence[str],
        D: int,
        *,
        teacher_block: str | None = None,
        head: str = "conv1x1",
        head_hidden: int = 2048,
        train: str = "lora",
        lora: LoraConfig | None = None,
        seed: int = 0,
    ):
        super().__init__()
        family.check(network)
        main, known = family.main_tap(network), family.tap_names(network)
        align_layers = list(dict.fromkeys(main if name == "auto" else name for name in align_layers))
        teachers = [] if teacher_block is None else [teacher_block]
        for setting, names in (("align.taps", align_layers), ("teacher.block", teachers)):
            if unknown := [name for name in names if name not in known]:
                listed = ", ".join(known) if len(known) < 9 else f"{known[0]} to {known[-1]}"
                raise UserError(f"{setting} has {unknown[0]!r}: {family.name} has {listed}")
        if teachers:
            _check_behind(known, align_layers, teacher_block)
            D = family.tap_channels(network, teacher_block)
            if head == "conv1x1" and D % GROUPS:
                raise UserError(
                    f"the head conv1x1 normalises {GROUPS} groups, and {teacher_block} has {D} channels: choose another "
                    "align.head"
                )
        self.family, self.backbone, self.trained, self.checkpointing = family, network, train, False
        self.teacher_block = teacher_block
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _choose_trained(family, network, train, lora)
            channels = {name: family.tap_channels(network, name) for name in align_layers}
            self.heads = nn.ModuleDict(
                {name: AlignHead(C, D, head, head_hidden) for name, C in channels.items()}
            )
        self.taps = Taps(network, {name: family.tap(network, name) for name in (*align_layers, *teachers)})

    def predict(self, x_t: Tensor, t: Tensor, text: Mapping[str, Tensor], *, capture: bool = False) -> Tensor:
        """The network's output `(B, C, h, w)` for x_t `(B, C, h, w)` at timesteps t `(B,)`: the only way to call it.

        Inputs are turned to the network's own precision, but for masks, and for sizes of images in pixels, which bf16 would
        round. With `capture` the taps listen meanwhile, which changes no bit.
        """
        dtype, exact = self.dtype, self.family.image_conditions
        turned = (name for name, x in text.items() if x.is_floating_point() and name not in exact)
        text = {**text, **{name: text[name].to(dtype) for name in turned}}
        with self.taps.recording() if self.taps.paths and capture else nullcontext():
            prediction = self.family.forward(self.backbone, x_t.to(dtype), t, text)
        for name, hidden in self.taps.captured.items():
            self.taps.captured[name] = self.family.features(hidden, x_t.shape, text, name)
        return prediction

    @contextmanager
    def reading(self, names: Sequence[str]) -> Iterator[None]:
        """Let other taps than the heads' be captured inside this block."""
        own = self.taps
        self.taps = Taps(self.backbone, {name: self.family.tap(self.backbone, name) for name in names})
        try:
            yield
        finally:
            self.taps.remove()
            self.taps = own

    def to(self, *args, **kwargs) -> "AlignedModel":
        """As of any module, but the weights that the network's class wants in fp32 stay in fp32."""
        with kept_exact(self.backbone):
            return super().to(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The network's precision; its own property of that name walks through all modules, a millisecond each time."""
        exact = getattr(self.backbone, "_keep_in_fp32_modules", None) or ()
        # Weights of 4 bits lie in uint8.
        weights = (p for name, p in self.backbone.named_parameters() if not {*exact} & {*name.split(".")})
        return next(p.dtype for p in weights if p.is_floating_point())

    def get_aligned_tokens(self, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Tokens `(B, N, D)` of each head on the teacher's grid (h, w), for the last forward that captured.

        Those of clips are `(B, f·N, D)` on (f, h, w). A teacher block has a grid of its own, which is then taken. Raises
        RuntimeError when nothing was captured, and `UserError` where the teacher has another number of frames.
        """
        captured = self._captured(*self.heads)
        if self.teacher_block is not None:
            grid = self.get_teacher_tokens()[1]
        for name, feature in captured.items():
            if len(grid) == 3 and feature.shape[2:-2] != tuple(grid[:1]):
                frames = feature.shape[2] if feature.ndim == 5 else 1
                raise UserError(
                    f"tap {name} has {frames} frames, the teacher's tokens {grid[0]}: make both of the same clips and frames"
                )
        return {name: head(captured[name], grid) for name, head in self.heads.items()}

    def get_teacher_tokens(self) -> tuple[Tensor, tuple[int, ...]]:
        """The features of the teacher block as tokens `(B, N, D)` of unit length, detached, and their grid."""
        feature = self._captured(self.teacher_block)[self.teacher_block].detach()  # (B, D, …)
        tokens = feature.flatten(2).transpose(1, 2).float()
        return F.normalize(tokens, dim=-1), tuple(feature.shape[2:])

    def _captured(self, *names: str) -> dict[str, Tensor]:
        if not self.taps.captured.keys() >= set(names):
            raise RuntimeError("no hidden states captured: call predict with capture=True first")
        return {name: self.taps.captured[name] for name in names}

    def clear_hooks(self) -> None:
        """Forget the captured hidden states, and with them the graph they keep alive."""
        self.taps.clear()

    def checkpoint(self, on: bool = True) -> None:
        """Recompute the activations of the family's blocks in backward, or no longer."""
        self.family.checkpoint(self.backbone, on)
        self.checkpointing = on

    def compile_backbone(self, mode: str = "default") -> None:
        """Compile the network at its next call; taps stay, and sampling may still use it.

        With gradient checkpointing each block is compiled by itself: a tap inside a checkpoint breaks a graph of the whole.
        CUDA graphs are left out, which would hand out the same memory again while a tap holds it.
        """
        if mode == "max-autotune":
            mode = "max-autotune-no-cudagraphs"
        modules = [self.backbone]
        if self.checkpointing:
            blocks = self.family.checkpointed(self.backbone)
            modules = [module for module in self.backbone.modules() if type(module) in blocks]
        # Blocks of a class share their code, and each has shapes of its own: Dynamo would stop compiling after the eighth.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(modules))
        for module in modules:
            module.compile(mode=mode, dynamic=False)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained by name, `backbone.…` and `heads.…`: what checkpoints and EMA hold."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trained(self, source: Path, weights: dict[str, Tensor]) -> None:
        """Start from what another run trained: all of the network's trained weights, and those heads that both have.

        Raises `UserError` unless the other run trained the same part of the same network.
        """
        own = self.trained_parameters()
        theirs = {name: value for name, value in weights.items() if name in own or name.startswith(BACKBONE)}
        missing = [name for name in own if name.startswith(BACKBONE) and name not in theirs]
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

        LoRA becomes `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`, or, where the pipeline has
        no such function, a folder for PEFT's `PeftModel.from_pretrained(network, folder)`; anything else becomes a diffusers
        folder of the network, such as `unet/`. Heads are never exported.
        """
        folder, part = Path(folder), self.family.part
        if self.trained != "lora":
            self.backbone.save_pretrained(folder / part)
            return folder / part
        config, weights = self.backbone.peft_config["default"], get_peft_model_state_dict(self.backbone)
        if not self.family.loads_lora:
            config.save_pretrained(str(folder))  # makes the folder
            file = folder / "adapter_model.safetensors"
            named = {f"base_model.model.{name}": x.contiguous() for name, x in weights.items()}
            save_file(named, file, {"format": "pt"})
            return file
        # PEFT's own names: diffusers' converter renames attention but not convolutions, and its loader then silently
        # drops the attention half of such a mixed file (diffusers 0.42). The metadata carries alpha.
        lora = {f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": config.to_dict()}
        self.family.pipeline_class.save_lora_weights(folder, **lora)
        return folder / "pytorch_lora_weights.safetensors"

    def kohya_state_dict(self) -> dict[str, Tensor]:
        """LoRA weights under PEFT's names, of the modules as kohya's tools name them, after the part, such as `unet.`."""
        found = {}
        for name, value in get_peft_model_state_dict(self.backbone).items():
            path, matrix = name.split(".lora_")
            found[f"{self.family.part}.{self.family.kohya_name(path)}.lora_{matrix}"] = value
        return found

    def merged_network(self) -> nn.Module:
        """The network as an ordinary one, its LoRA merged into the weights for good."""
        for path, module in list(self.backbone.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                self.backbone.set_submodule(path, module.get_base_layer())
        return self.backbone


def family_lora(family: Backbone, rank: int, alpha: float, targets: str) -> LoraConfig:
    """The LoRA of a family under one of its `lora_targets`; raises `UserError` for a name that is none of them."""
    known = family.lora_targets
    if targets == "auto":
        targets = next(iter(known))
    if targets not in known:
        raise UserError(f"model.lora_targets = {targets!r}: {family.name} has {', '.join(known)}")
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=known[targets], init_lora_weights="gaussian")


@contextmanager
def _lora_in_fp32() -> Iterator[None]:
    """Let new LoRA weights stay in fp32, as masters start; PEFT would round them to the precision of the frozen weights."""
    move = BaseTunerLayer._move_adapter_to_device_of_base_layer
    BaseTunerLayer._move_adapter_to_device_of_base_layer = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        BaseTunerLayer._move_adapter_to_device_of_base_layer = move


def _check_behind(known: Sequence[str], taps: Sequence[str], block: str) -> None:
    """Raise `UserError` unless the block lies behind all taps, in the order of the forward."""
    last = max(taps, key=known.index)
    if known.index(block) <= known.index(last):
        raise UserError(
            f"teacher.block = {block} must lie behind the tap {last}: a block teaches earlier ones"
        )


def _choose_trained(family: Backbone, network: nn.Module, train: str, lora: LoraConfig | None) -> None:
    """Freeze the network, then add LoRA or free the weights that are to be trained."""
    network.requires_grad_(False)
    if train == "lora":
        if lora is None:
            raise ValueError("train='lora' needs a LoRA config")
        try:
            with _lora_in_fp32():
                if hasattr(network, "add_adapter"):
                    network.add_adapter(lora)
                else:  # of a class that diffusers gives no adapters
                    inject_adapter_in_model(lora, network)
        except ValueError as error:  # peft's, when the targets match nothing
            raise UserError(f"LoRA finds no module to wrap: {str(error).splitlines()[0]}") from None
    elif train == "partial":
        for path in family.partial_blocks(network):
            network.get_submodule(path).requires_grad_(True)
    elif train == "full":
        for parameter in network.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    else:
        raise ValueError(f"train must be lora, partial or full, not {train!r}")
