"""What diffusion transformers share: flow matching, latents cut into patches, blocks in lists, and the cells of a sequence.

A family of transformers is a subclass of `Transformer` that states its facts. Everything that its pipeline does to latents,
times and text before and after the network is in `pack`, `clock`, `conditions` and `unpack`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.pretrained import read_config
from method.paths import FlowPath, Path
from models.backbone import FLOW_SETTINGS, Backbone
from models.pipeline_parts import FLOW_SAMPLERS, load_part
from models.taps import Tap, TapError

ATTENTION = ("to_q", "to_k", "to_v", r"to_out\.0")
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # of blocks with two streams
# diffusers' schedulers of flow matching, by the name of their class, as settings of eval.sampler name them.
OWN_SAMPLERS = {kind.__name__: name for name, kind in FLOW_SAMPLERS.items()}


class Transformer(Backbone):
    """The facts of one family of transformers, for one base model of it."""

    method = "REPA"
    part, noun = "transformer", "transformer"
    flow = True  # else a DDPM, and all of `Backbone`'s
    text_fields = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    # {text field: the argument of the network's forward}; what is not here is for `conditions`.
    arguments: Mapping[str, str] = {
        "prompt_embeds": "encoder_hidden_states",
        "prompt_attention_mask": "encoder_attention_mask",
    }
    latent_argument, time_argument = "hidden_states", "timestep"
    sign = 1  # −1: the network puts out x_0 − ε
    patch: tuple[int, ...] = (2, 2)  # cells of the latents that make one token
    block_lists: tuple[str, ...] = ("transformer_blocks",)  # in the order of the forward
    stream = 1  # which output of a block of two streams is the picture
    # On a side of the latents, or (f, h, w), where the network's config does not say it.
    default_cells: int | tuple[int, ...] | None = None
    own_sigmas = True  # whether the pipeline spaces σ evenly itself, where it hands mu to its scheduler

    # what a family may say of its forward ---------------------------------------------------------------------------------

    def clock(self, network: nn.Module, t: Tensor) -> Tensor:
        """What the network is told of times t `(B,)` in (0, 1), fp32; of a DDPM, of timesteps."""
        return (1000 * t).float() if self.flow else t

    def pack(self, x: Tensor) -> Tensor:
        """Latents `(B, C, h, w)` as the network takes them."""
        return x

    def unpack(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        """The prediction of `shape (B, C, h, w)` in the network's output; variances that it learnt are cut off."""
        return output[:, : shape[1]]

    def conditions(self, network: nn.Module, x: Tensor, text: Mapping[str, Tensor]) -> dict[str, object]:
        """Further arguments of the forward, for latents x `(B, C, h, w)`: ids of places, guidance, masks."""
        return {}

    def picture(self, hidden: Tensor, count: int, text: Mapping[str, Tensor], tap: str) -> Tensor:
        """The `count` tokens of the picture `(B, count, D)` in what a block put out `(B, L, D)`; see `whole`."""
        return whole(hidden, count, tap)

    # what all of them share -----------------------------------------------------------------------------------------------

    def check(self, network: nn.Module) -> None:
        if not isinstance(network, self.network_class):
            raise UserError(
                f"the network of {self.base} is no {self.network_class.__name__}: check model.base"
            )
        if not self.blocks(network):
            raise UserError(f"the network of {self.base} has no blocks: check its config")

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        given = {
            name: text[field].movedim(0, self.text_batch_dim.get(field, 0))
            for field, name in self.arguments.items()
        }
        given |= {self.latent_argument: self.pack(x_t), self.time_argument: self.clock(network, t)}
        # `.sample`, because one network returns the bare tensor where it is asked for a tuple.
        output = network(**given | self.conditions(network, x_t, text)).sample
        return self.sign * self.unpack(output, x_t.shape)

    def cells(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The grid (h, w) of the tokens of latents `(…, h, w)`."""
        return tuple(n // p for n, p in zip(shape[-len(self.patch) :], self.patch, strict=True))

    def blocks(self, network: nn.Module) -> dict[str, str]:
        """{name of a tap: path of the block}, in the order of the forward."""
        paths = [f"{part}.{i}" for part in self.block_lists for i in range(len(network.get_submodule(part)))]
        return {f"block{n}": path for n, path in enumerate(paths)}

    def tap_names(self, network: nn.Module) -> tuple[str, ...]:
        return tuple(self.blocks(network))

    def main_tap(self, network: nn.Module) -> str:
        """The block at a third of the depth, as block 8 of 28 is in REPA's paper."""
        names = self.tap_names(network)
        return names[len(names) // 3]

    def measured_taps(self, network: nn.Module) -> tuple[str, ...]:
        return (self.main_tap(network),)

    def tap(self, network: nn.Module, name: str) -> Tap:
        def read(output, _args, _kwargs) -> Tensor:
            return output[self.stream] if isinstance(output, tuple) else output

        return Tap(self.blocks(network)[name], read)

    def features(self, hidden: Tensor, shape: Sequence[int], text: Mapping[str, Tensor], tap: str) -> Tensor:
        cells = self.cells(shape)
        tokens = self.picture(hidden, math.prod(cells), text, tap)  # (B, N, D)
        return tokens.transpose(1, 2).unflatten(2, cells)

    def partial_blocks(self, network: nn.Module) -> tuple[str, ...]:
        """All blocks up to the main tap: what the alignment reaches."""
        blocks = self.blocks(network)
        return tuple(blocks.values())[: list(blocks).index(self.main_tap(network)) + 1]

    def checkpointed(self, network: nn.Module) -> set[type[nn.Module]]:
        return {type(block) for part in self.block_lists for block in network.get_submodule(part)}

    def tap_channels(self, network: nn.Module, name: str) -> int:
        return network.config.num_attention_heads * network.config.attention_head_dim

    def latent_channels(self, network: nn.Module) -> int:
        return network.config.in_channels

    def latent_shape(self, network: nn.Module) -> tuple[int, ...]:
        if isinstance(self.default_cells, tuple):
            return self.latent_channels(network), *self.default_cells
        side = network.config.get("sample_size", None) or self.default_cells
        if not isinstance(side, int) or side < 1:
            raise UserError(
                f"{self.part} of {self.base} has sample_size = {side!r:.60}: mend its config.json"
            )
        return self.latent_channels(network), side, side

    # its path and its samplers ----------------------------------------------------------------------------------------------

    @property
    def own_output(self) -> str:
        return "flow" if self.flow else super().own_output

    @cached_property
    def scheduler(self):
        """The base model's own scheduler, of the class that its config names; raises `UserError` where there is none.

        Each class keeps the shift under a name of its own, so that one would not find another's. A class that is none of
        `FLOW_SAMPLERS`, such as that of a distilled model, is read as the Euler steps that it is made of.
        """
        if not self.flow:
            return super().scheduler
        what = f"scheduler of {self.base}"
        config = read_config(
            self.base, "scheduler_config.json", what, part="scheduler", revision=self.revision
        )
        kind = FLOW_SAMPLERS[OWN_SAMPLERS.get(str(config.get("_class_name")), "euler")]
        return load_part(self.base, "scheduler", kind, self.revision)

    def output_of(self, parameterization: str) -> str:
        if self.flow and parameterization != "auto":
            raise UserError(
                f"diffusion.parameterization = {parameterization} is for a DDPM, and {self.name} is a flow: set auto"
            )
        return super().output_of(parameterization)

    def path(self, shape: Sequence[int] | None = None, settings: Mapping[str, object] | None = None) -> Path:
        if not self.flow:
            return super().path(shape, settings)
        given = dict(settings or {})
        self.output_of(given.get("parameterization", "auto"))
        for name, neutral in {"prediction": "auto", "snr_gamma": None}.items():
            if given.get(name, neutral) != neutral:
                raise UserError(f"diffusion.{name} is for a DDPM, and {self.name} is a flow: leave it out")
        chosen = {
            name: given[name] for name in FLOW_SETTINGS if name != "guidance" and given.get(name) is not None
        }
        config = self.scheduler.config
        if chosen.get("shift") == "resolution":
            chosen["shift"] = self.shift_of(shape)
        elif "shift" not in chosen:
            # Where the shift depends on the size, diffusers' examples train without one.
            dynamic = config.get("use_dynamic_shifting", False)
            chosen["shift"] = 1.0 if dynamic else self.own_shift
        return FlowPath(**chosen)

    def mu_of(self, shape: Sequence[int], steps: int) -> float | None:
        """The mu that the pipeline hands to its scheduler for latents of `shape (C, …)`; None where it hands none."""
        return None

    @property
    def own_shift(self) -> float:
        """The fixed shift s of the base model's scheduler; raises `UserError` where it is none."""
        config = self.scheduler.config
        shift = config.get("shift", config.get("flow_shift", 1.0))
        if not (isinstance(shift, int | float) and 0 < shift < math.inf):
            raise UserError(
                f"scheduler of {self.base} has shift = {shift}, a number above 0 was expected: mend its config"
            )
        return shift

    def shift_of(self, shape: Sequence[int], steps: int = 50) -> float:
        """The shift s by which the pipeline samples latents of `shape (C, …)`."""
        config = self.scheduler.config
        if config.get("use_dynamic_shifting") and (mu := self.mu_of(shape, steps)) is not None:
            return math.exp(mu)
        return self.own_shift

    def shifted_mu(self, tokens: int) -> float:
        """The mu of the scheduler's config for a number of tokens, on a line through two points, as Flux has it."""
        config = self.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (high - low) / (many - few)
        return tokens * slope + (low - slope * few)

    def sampler_of(self, wanted: str) -> str:
        if not self.flow:
            return super().sampler_of(wanted)
        own = type(self.scheduler).__name__
        if wanted == "auto":
            return OWN_SAMPLERS[own]
        if wanted not in FLOW_SAMPLERS:
            raise UserError(
                f"eval.sampler = {wanted} is for a DDPM; {self.name} is a flow and has {', '.join(FLOW_SAMPLERS)}"
            )
        return wanted

    def spacing(self, shape: Sequence[int], steps: int, sampler: str) -> dict[str, object]:
        """Evenly spaced σ and mu, where the pipeline hands both to its own scheduler."""
        if not self.flow or sampler != "euler" or (mu := self.mu_of(shape, steps)) is None:
            return {}
        return {"mu": mu} | ({"sigmas": np.linspace(1.0, 1 / steps, steps)} if self.own_sigmas else {})

    def sampling_scheduler(self, output: str, sampler: str, steps: int, shape: Sequence[int]):
        if not self.flow:
            return super().sampling_scheduler(output, sampler, steps, shape)
        own, kind = self.scheduler, FLOW_SAMPLERS[sampler]
        if type(own) is kind:
            return own
        shift = self.shift_of(shape, steps)
        if sampler in ("euler", "heun"):
            return kind(num_train_timesteps=own.config.num_train_timesteps, shift=shift)
        return kind(
            num_train_timesteps=own.config.num_train_timesteps, prediction_type="flow_prediction", use_flow_sigmas=True,
            flow_shift=shift,
        )  # fmt: skip


class VideoTransformer(Transformer):
    """Transformers of clips: latents are `(B, C, f, h, w)`, and the tokens lie on a grid (f, h, w)."""

    method = "CREPA"
    patch = (1, 2, 2)


def whole(hidden: Tensor, count: int, tap: str, *, before: int = 0) -> Tensor:
    """The last `count` of the tokens `(B, before + count, D)`; raises `TapError` where there are more or fewer.

    Aligning tokens of text as if they were the picture's would go unnoticed otherwise.
    """
    if hidden.shape[1] != before + count:
        raise TapError(
            f"tap {tap} has {hidden.shape[1]} tokens, {before} of text and {count} of the picture were expected"
        )
    return hidden[:, before:]


def behind(hidden: Tensor, count: int, tap: str, text: int) -> Tensor:
    """The `count` tokens of the picture: all of a double-stream block, those behind `text` others of a single-stream one."""
    return whole(hidden, count, tap, before=text if hidden.shape[1] != count else 0)


def checkpoint_blocks(network: nn.Module, paths: Iterable[str], on: bool) -> None:
    """Recompute the activations of these blocks in backward, with all arguments that they were called with, or no longer."""
    for path in paths:
        block = network.get_submodule(path)
        vars(block).pop("forward", None)  # back to that of the class
        if on:
            block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable, *args, **named):
    """What `forward` returns, checkpointed; arguments by name are handed over by place, else autograd would not see them."""

    def call(*values):
        return forward(*values[: len(args)], **dict(zip(named, values[len(args) :], strict=True)))

    return checkpoint(call, *args, *named.values(), use_reentrant=False)


def lora_of(modules: Sequence[str]) -> str:
    """A regular expression for modules of these names, anywhere in the network."""
    return rf".*\.({'|'.join(modules)})$"
