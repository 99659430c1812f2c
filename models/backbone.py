"""The contract of a backbone: what a family of diffusion models must say of itself, and nothing else needs to know.

    backbone = family_of("stable-diffusion-v1-5/stable-diffusion-v1-5")     # models/families/table.py
    network = backbone.load_network()
    prediction = backbone.forward(network, x_t, t, text)      # what AlignedModel.predict calls
    text = backbone.encode_text(["a cat"], device)            # {"prompt_embeds": (1, L, C)}
    null = backbone.null_text(device)                         # {"prompt_embeds": (L, C)}
    x_0 = backbone.load_codec().encode(pixels)

A family is one file in `models/families/`: a subclass that fills in the facts below. Latents are `(B, C, h, w)`, and so are
predictions. Text is a dict of named tensors, one row a prompt, under the names that the pipeline's own call uses.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import diffusers
import torch
from torch import Tensor, nn

from common.errors import UserError
from method.paths import PREDICTION_TYPES, SCHEDULER_TYPES, DiffusionPath, Path
from models.latents import LatentCodec
from models.pipeline_parts import SAMPLERS, SPACING, load_part, shapes_of_part
from models.prompts import PromptEncoder
from models.quantize import quantization_config
from models.taps import Tap

# Settings of `diffusion` that only a flow has; null elsewhere.
FLOW_SETTINGS = ("shift", "draw", "logit_mean", "logit_std", "guidance")


class Backbone:
    """The facts of one family, for one base model of it.

    Parts are loaded when they are asked for, from the diffusers folder or hub id `base`; None is for a network that is at hand
    already. Nothing outside `models/families/` names a block, a text width, a number of tokens or a diffusers class.
    """

    name: str  # in the words of users: "Stable Diffusion 1.5"; the table has the short names
    pipeline: str  # diffusers' class, as model_index.json has it
    method: str  # what aligning this family is called: "U-REPA"
    tags: tuple[str, ...]  # of a model card
    part: str  # the pipeline's part that is trained: "unet" or "transformer"
    # What the pipeline's encode_prompt returns, in order, by the names of its call's arguments; "" for what is not kept.
    text_fields: tuple[str, ...]
    # Of fields that have prompts along another dimension than the first.
    text_batch_dim: Mapping[str, int] = {}
    # {text field: its mask}, where what lies behind the mask has no influence: stored up to the longest prompt only.
    trimmed_text: Mapping[str, str] = {}
    # Tokens of a prompt, where the pipeline's call takes it and its own default is not wanted.
    max_sequence_length: int | None = None
    # Fields that are as long as the longest prompt; `text_shapes` has the most that there can be.
    variable_text: tuple[str, ...] = ()
    noun: str  # what messages call the network: "U-Net"
    default_base: str  # the hub id of the family's usual base model
    assumed_config: dict  # of the network of `default_base`, for a forecast where its files are not at hand
    lora_targets: Mapping[str, str]  # {name: regex over module paths}, the default first
    # {part of the pipeline: what gives its class}; a class is imported, which takes seconds, when its part is loaded.
    parts: Mapping[str, Callable[[], type]]
    # Further arguments of the pipeline's from_pretrained, where a whole pipeline is exported.
    load_options: Mapping[str, object] = {}
    # What kohya's tools call the base model; None where they do not know it, or give its blocks other names than diffusers.
    kohya_base: str | None = None
    patch: tuple[int, ...] = (1, 1)  # cells of the latents that make one token of the network
    loads_lora = True  # whether the pipeline has load_lora_weights
    forecast_assumes = ""  # what the plan says of `forecast`
    frame_rate: float | None = None  # frames a second of the clips, where the network is told it
    guidance: float | None = None  # what a network with a guidance embedding is told; None where it has none
    # What `evaluate.py final` sets beside a run's own settings of sampling.
    final_settings: Mapping[str, object] = {}
    # Fields beside the text that a batch may have for its own images, such as the crop that the cache recorded.
    image_conditions: tuple[str, ...] = ()

    def __init__(self, base: str | None = None, revision: str | None = None):
        self.base, self.revision = base, revision
        self._prompt_encoder: PromptEncoder | None = None

    # what a family fills in -------------------------------------------------------------------------------------------

    def check(self, network: nn.Module) -> None:
        """Raise `UserError` unless the network is one of this family."""
        raise NotImplementedError

    def check_trained(self, taps: Sequence[str], train: str, lora_targets: str) -> None:
        """Raise `UserError` where these settings would leave a tap without anything trained before it."""

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The network's output `(B, C, h, w)` for x_t `(B, C, h, w)` at timesteps t `(B,)` and text fields `(B, …)`."""
        raise NotImplementedError

    def tap_names(self, network: nn.Module) -> tuple[str, ...]:
        """The names of all places that can be aligned."""
        raise NotImplementedError

    def main_tap(self, network: nn.Module) -> str:
        """The place that `align.taps=auto` aligns, and that tables and pictures of a single tap show."""
        raise NotImplementedError

    def measured_taps(self, network: nn.Module) -> tuple[str, ...]:
        """The places that `evaluate.py align` reads beside the run's own."""
        return self.tap_names(network)

    def tap(self, network: nn.Module, name: str) -> Tap:
        """Where the tap of this name is read."""
        raise NotImplementedError

    def features(self, hidden: Tensor, shape: Sequence[int], text: Mapping[str, Tensor], tap: str) -> Tensor:
        """The features `(B, C, h, w)` in what a tap read, of latents of `shape (B, …)` and text fields `(B, …)`."""
        return hidden

    def partial_blocks(self, network: nn.Module) -> tuple[str, ...]:
        """The paths of the blocks that model.train=partial trains."""
        raise NotImplementedError

    def checkpointed(self, network: nn.Module) -> set[type[nn.Module]]:
        """The classes of the blocks that gradient checkpointing recomputes."""
        raise NotImplementedError

    def checkpoint(self, network: nn.Module, on: bool = True) -> None:
        """Recompute the activations of blocks in backward, or no longer."""
        network.enable_gradient_checkpointing() if on else network.disable_gradient_checkpointing()

    def forecast(self, network: nn.Module) -> None:
        """Replace what looks at values in a network on the device "meta", where there are none, by what has the same cost."""

    def tap_channels(self, network: nn.Module, name: str) -> int:
        """Channels C of the features `(B, C, h, w)` of a tap."""
        raise NotImplementedError

    def latent_shape(self, network: nn.Module) -> tuple[int, ...]:
        """`(C, h, w)` of the latents that the network was made for."""
        raise NotImplementedError

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        """{field: shape of one prompt's row}."""
        raise NotImplementedError

    def kohya_name(self, path: str) -> str:
        """What kohya's tools call the module that the network has at `path`."""
        return path

    def check_text(self, parts: Mapping[str, object]) -> None:
        """Raise `UserError` unless the tokenizers and text encoders `{part: loaded}` fit each other."""

    # what all families share --------------------------------------------------------------------------------------------

    def load(self, part: str, **options):
        """A part of the base model, networks in fp32; raises `UserError` where it cannot be had."""
        return load_part(self.base, part, self.parts[part](), self.revision, **options)

    def load_network(
        self, dtype: torch.dtype = torch.float32, quantize: str = "none", device: torch.device | None = None
    ) -> nn.Module:
        """The network of the base model in `dtype`, on the CPU; `quantize`d, on the `device` if it is a GPU.

        Raises `UserError` where it cannot be had, or cannot be quantised.
        """
        if quantize == "none":
            return self.load(self.part, dtype=dtype)
        options = {"quantization_config": quantization_config(quantize, dtype, device)}
        if device is not None and device.type != "cpu":
            # With "cpu", diffusers would take the weights for offloaded.
            options["device_map"] = {"": str(device)}
        return self.load(self.part, dtype=dtype, **options)

    def network_of_shapes(self, *, local: bool = False) -> tuple[nn.Module, bool]:
        """The network on the device "meta", and whether its config was at hand (else `assumed_config` is taken)."""
        try:
            return shapes_of_part(self.base, self.part, self.network_class, self.revision, local=local), True
        except UserError:
            if self.base != self.default_base:
                raise
        with torch.device("meta"):
            return self.network_class.from_config(self.assumed_config), False

    def prepare_text(self, prompts: Sequence[str], device: torch.device) -> None:
        """Take note of all prompts that will be encoded, where what is made of one depends on the others."""

    def encode_text(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """The text fields of prompts, each `(n, …)` on the CPU, as the pipeline's own call makes them; masks are uint8."""
        return self.prompt_encoder(device)(prompts)[0]

    def null_text(self, device: torch.device) -> dict[str, Tensor]:
        """The fields `(…)` of the null prompt of guidance; some pipelines make it otherwise than of the prompt ""."""
        return self.prompt_encoder(device)([""])[1]

    def prompt_encoder(self, device: torch.device) -> PromptEncoder:
        """The base model's text encoders, which are kept; raises `UserError` where they cannot be had."""
        if self._prompt_encoder is None or self._prompt_encoder.device != device:
            self._prompt_encoder = PromptEncoder(self, device)
        return self._prompt_encoder

    @property
    def network_class(self) -> type[nn.Module]:
        """diffusers' class of the network."""
        return self.parts[self.part]()

    def load_codec(self) -> LatentCodec:
        """The VAE and its normalisation, in fp32."""
        return LatentCodec(self.load("vae"), f"vae of {self.base}")

    def image_size(self, codec: LatentCodec) -> int:
        """The side in pixels of the images that the base model was made for."""
        return self.latent_shape(self.network_of_shapes()[0])[-1] * codec.down

    @cached_property
    def scheduler(self):
        """The base model's noise schedule; raises `UserError` unless it is one."""
        found = self.load("scheduler")
        kept = found.alphas_cumprod  # (T,)
        if not len(kept) or not ((kept >= 0) & (kept <= 1)).all():  # NaN is neither
            raise UserError(
                f"scheduler of {self.base} has no noise schedule (num_train_timesteps = {len(kept)}, alphas_cumprod must lie "
                "between 0 and 1): mend its scheduler_config.json"
            )
        return found

    @cached_property
    def own_output(self) -> str:
        """What the base model outputs, "epsilon" or "v"; raises `UserError` for anything else."""
        found = self.scheduler.config.prediction_type
        if found not in PREDICTION_TYPES:
            raise UserError(
                f"scheduler of {self.base} has prediction_type {found!r}; one of {', '.join(PREDICTION_TYPES)} was expected"
            )
        return PREDICTION_TYPES[found]

    def output_of(self, parameterization: str) -> str:
        """What the network outputs under the setting diffusion.parameterization: "auto" is the base model's own."""
        return self.own_output if parameterization == "auto" else parameterization

    def path(self, shape: Sequence[int] | None = None, settings: Mapping[str, object] | None = None) -> Path:
        """The path from data to noise of the base model's own noise schedule, for latents of `shape (C, …)`.

        `settings` are those of the config's section `diffusion`. Raises `UserError` for one that has no meaning on this path.
        """
        given = dict(settings or {})
        if idle := [name for name in FLOW_SETTINGS if given.pop(name, None) is not None]:
            raise UserError(
                f"diffusion.{idle[0]} is for flow matching, and {self.name} is a DDPM: leave it out"
            )
        output = self.output_of(given.pop("parameterization", "auto"))
        if given.get("prediction", "auto") == "auto":
            given["prediction"] = "v"  # the plan's
        return DiffusionPath(self.scheduler.alphas_cumprod, output=output, **given)

    def sampler_of(self, wanted: str) -> str:
        """The name of the sampler under the setting eval.sampler; raises `UserError` for one that is of no use here."""
        if wanted == "auto":
            return "ddim"
        if wanted not in SAMPLERS:
            raise UserError(
                f"eval.sampler = {wanted} is for flow matching; {self.name} has {', '.join(SAMPLERS)}"
            )
        return wanted

    def spacing(self, shape: Sequence[int], steps: int, sampler: str) -> dict[str, object]:
        """The further arguments of `set_steps`, of latents of `shape (C, …)`."""
        return {}

    def sampling_scheduler(self, output: str, sampler: str, steps: int, shape: Sequence[int]):
        """One of diffusers' samplers on the base model's noise schedule, for a network that outputs `output`.

        Raises `UserError` where it cannot go this number of steps. `shape (C, …)` is that of the latents.
        """
        levels = len(self.scheduler.alphas_cumprod)
        if steps > levels:
            raise UserError(
                f"eval.sampling_steps = {steps} are more than the {levels} noise levels of {self.base}"
            )
        if sampler == "ddim" and steps > 100 and levels % steps:
            fit = ", ".join(str(n) for n in range(101, levels + 1) if levels % n == 0)
            raise UserError(
                f"with {steps} steps diffusers' DDIM, which goes {levels} // steps indices at a time, drifts off its noise "
                f"levels: choose eval.sampling_steps = 100 or fewer, or {fit}, or eval.sampler=dpm++"
            )
        return SAMPLERS[sampler].from_config(
            self.scheduler.config,
            clip_sample=False,  # latents are no pixels in [-1, 1]; some bases leave this to a default of True
            timestep_spacing=SPACING,
            prediction_type=SCHEDULER_TYPES[output],
        )

    @property
    def pipeline_class(self):
        """diffusers' class of the whole pipeline."""
        return getattr(diffusers, self.pipeline)
