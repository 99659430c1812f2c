"""The official pipelines of diffusers: what they hand to their networks, and what they draw from text that is given to them."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from loaded import codec_of
from torch import Tensor

from method.sampler import is_flow
from models.families.sd15 import SD15
from models.families.table import FAMILIES

NULL = "negative_"


# Further arguments of a call: without these the pipeline would take another size, frame rate or scale.
OPTIONS = {
    "flux": {"guidance_scale": 3.5},
    "flux2": {"guidance_scale": 3.5},
    "sana": {"use_resolution_binning": False},
    "pixart": {"use_resolution_binning": False},
    "lumina2": {"cfg_normalization": False},
    "ltxvideo": {"frame_rate": 25},
    "sanavideo": {"use_resolution_binning": False},
}
SCALES = {
    "flux": "true_cfg_scale",
    "flux2": None,
}  # else guidance_scale; FLUX.2 has no guidance by a null prompt
TAKES_LATENTS_AS_THEY_ARE = ("flux2",)  # and packs them itself
# Text that a call wants and the network does not (AuraFlow), or in another type than the cache keeps it (Chroma).
NEEDS = {
    "auraflow": lambda text: {"prompt_attention_mask": torch.ones(len(text["prompt_embeds"]), 1)},
    "chroma": lambda text: {"prompt_attention_mask": text["prompt_attention_mask"].float()},
    "kandinsky5_video": lambda text: {
        "prompt_cu_seqlens": torch.tensor([0, text["prompt_embeds_qwen"].shape[1]])
    },
}


def name_of(family) -> str:
    return next(
        name
        for name, kind in FAMILIES.items()
        if isinstance(family, kind) and kind.pipeline == family.pipeline
    )


def size_of(family, shape) -> dict[str, int]:
    """The arguments of a pipeline's call that say the size of latents `(…, h, w)`."""
    codec = codec_of(family.base)
    size = {"height": shape[-2] * codec.down, "width": shape[-1] * codec.down}
    if len(shape) == 5:
        name = "frames" if name_of(family) == "sanavideo" else "num_frames"
        size[name] = (shape[2] - 1) * codec.frames + 1
    return size


def laid_out(family, x: Tensor) -> Tensor:
    """Latents `(B, C, h, w)` as the pipeline's call takes them."""
    if name_of(family) == "kandinsky5_video":  # with channels for a first frame
        x = x.movedim(1, -1)
        return torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[..., :1])], -1)
    return x if isinstance(family, SD15) or name_of(family) in TAKES_LATENTS_AS_THEY_ARE else family.pack(x)


def in_cells(family, latents: Tensor, shape) -> Tensor:
    """Latents that the pipeline returned, as `(B, C, h, w)`."""
    return latents if isinstance(family, SD15) else family.unpack(latents, shape)


def options_of(family, pipeline, shape, cfg: float) -> dict[str, object]:
    """The arguments of a pipeline's call about size and guidance; the pipeline is told to leave the size alone."""
    name = name_of(family)
    if name == "hidream":  # which rescales every size to this area
        pipeline.default_sample_size = math.sqrt(shape[-2] * shape[-1])
    scale = SCALES.get(name, "guidance_scale")
    return OPTIONS.get(name, {}) | size_of(family, shape) | ({} if scale is None else {scale: cfg})


def call_arguments(
    family, pipeline, noise: Tensor, text: Mapping[str, Tensor], null: Mapping[str, Tensor], cfg: float
):
    """The arguments of the pipeline's own call for first noise `(B, C, h, w)`, text fields `(B, …)` and null fields `(…)`."""

    def given(fields: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        fields = {**fields, **NEEDS.get(name_of(family), lambda _: {})(fields)}
        return {prefix + name: x.movedim(0, family.text_batch_dim.get(name, 0)) for name, x in fields.items()}

    found = given(text)
    if cfg > 1:
        found |= given({name: row.expand(len(noise), *row.shape) for name, row in null.items()}, NULL)
        found["negative_prompt"] = None
    return found | options_of(family, pipeline, noise.shape, cfg) | {"latents": laid_out(family, noise)}


def arguments_in(given: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of arguments, those inside of dicts too; without those that say nothing."""
    for name, value in given.items():
        if isinstance(value, list) and isinstance(value[0], Tensor):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from arguments_in(value, f"{above}{name}.")
        elif value is not None and name != "return_dict":
            yield f"{above}{name}", value.clone() if isinstance(value, Tensor) else value


@contextmanager
def recorded(network) -> Iterator[list[dict]]:
    """All arguments of each forward by name."""
    calls, names = [], inspect.signature(network.forward)

    def note(_, args, kwargs):
        calls.append(dict(arguments_in(names.bind(*args, **kwargs).arguments)))

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def assert_same_arguments(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.keys() == wanted.keys()
        for name, value in wanted.items():
            if not isinstance(value, Tensor):
                assert mine[name] == value, name
                continue
            if "mask" in name:  # attention adds one of floating-point numbers
                assert mine[name].is_floating_point() == value.is_floating_point(), name
            # A pipeline hands over one timestep for all rows.
            value = value.expand(mine[name].shape).to(mine[name].dtype)
            torch.testing.assert_close(mine[name], value, atol=1e-5, rtol=1e-5, msg=name)


@contextmanager
def as_oracle(pipeline, family, x_0: Tensor) -> Iterator[None]:
    """The pipeline's network puts out the training target of known x_0 `(B, C, h, w)`, whatever it is given.

    x_t and t are those of the pipeline's own sampler, not what the network is told, for the sampler decides what they are.
    """
    network, path, scheduler = getattr(pipeline, family.part), family.path(x_0.shape[1:]), pipeline.scheduler
    forward, names, flow = network.forward, inspect.signature(network.forward), is_flow(scheduler)

    def oracle(*args, **kwargs):
        given = names.bind(*args, **kwargs).arguments
        x_t = in_cells(family, given[getattr(family, "latent_argument", "sample")], x_0.shape)
        if flow:
            t = scheduler.sigmas[scheduler.step_index or 0].expand(len(x_t))  # (B,)
            alpha, sigma = (v.view(-1, *[1] * (x_0.ndim - 1)) for v in (1 - t, t))
        else:
            t = given["timestep"].long().expand(len(x_t))
            alpha, sigma = path.schedule.at(t)
        again, target, _ = path(x_0, (x_t - alpha * x_0) / sigma, t)
        torch.testing.assert_close(again, x_t, atol=1e-3, rtol=1e-3)
        output = laid_out_by_network(family, target)
        return (output,) if not kwargs.get("return_dict", True) else SimpleNamespace(sample=output)

    network.forward = oracle
    try:
        yield
    finally:
        network.forward = forward


NOISE_FIRST = ("lumina2", "hidream")  # their networks put out x_0 − ε


def laid_out_by_network(family, target: Tensor) -> Tensor:
    """A target `(B, C, h, w)` as the official network of a family would put it out."""
    name = name_of(family)
    if name == "pixart":  # with the variances behind
        return torch.cat([target, torch.zeros_like(target)], 1)
    if isinstance(family, SD15):
        return target
    return family.pack(-target if name in NOISE_FIRST else target)
