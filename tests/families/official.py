"""The official pipelines of diffusers: what they hand to their networks, and what they draw from text that is given to them."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

NULL = "negative_"


def size_of(family, shape) -> dict[str, int]:
    """The arguments of a pipeline's call that say the size of latents `(…, h, w)`."""
    down = family.load_codec().down
    return {"height": shape[-2] * down, "width": shape[-1] * down}


def call_arguments(
    family, noise: Tensor, text: Mapping[str, Tensor], null: Mapping[str, Tensor], cfg: float
) -> dict:
    """The arguments of the pipeline's own call for first noise `(B, C, h, w)`, text fields `(B, …)` and null fields `(…)`."""
    found = dict(text)
    if cfg > 1:
        found |= {NULL + name: row.expand(len(noise), *row.shape) for name, row in null.items()}
    return found | size_of(family, noise.shape) | {"latents": noise, "guidance_scale": cfg}


def arguments_in(given: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of arguments, those inside of dicts too; without those that say nothing."""
    for name, value in given.items():
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
            # A pipeline hands over one timestep for all rows.
            value = value.expand(mine[name].shape).to(mine[name].dtype)
            torch.testing.assert_close(mine[name], value, atol=1e-5, rtol=1e-5, msg=name)


@contextmanager
def as_oracle(pipeline, family, x_0: Tensor) -> Iterator[None]:
    """The pipeline's network puts out the training target of known x_0 `(B, C, h, w)`, whatever it is given."""
    network, path = getattr(pipeline, family.part), family.path()
    forward, names = network.forward, inspect.signature(network.forward)

    def oracle(*args, **kwargs):
        given = names.bind(*args, **kwargs).arguments
        x_t = given["sample"]  # (B, C, h, w)
        t = given["timestep"].long().expand(len(x_t))  # (B,)
        alpha, sigma = path.schedule.at(t)
        again, target, _ = path(x_0, (x_t - alpha * x_0) / sigma, t)
        torch.testing.assert_close(again, x_t, atol=1e-3, rtol=1e-3)
        return (target,)

    network.forward = oracle
    try:
        yield
    finally:
        network.forward = forward
