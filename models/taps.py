"""Taps: named places in a backbone where hidden states are read by forward hooks.

    taps = Taps(network, {"early": Tap("blocks.7")})
    with taps.recording():
        network(...)
    features = taps.captured["early"]
    taps.clear()

A tap listens only while recording, that is during the forward call itself: recomputation under gradient checkpointing
happens later, in backward, and is not mistaken for a second firing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError


def _the_tensor(output: Any, _args: tuple, _kwargs: dict) -> Tensor:
    if not isinstance(output, Tensor):
        found = type(output).__name__
        raise TypeError(f"the tapped block returned {found}, not a tensor: give the tap a `read` function")
    return output


class TapError(UserError):
    """A tap that cannot be trusted: its block does not exist, it did not fire, fired twice, or carries no gradient."""


@dataclass(frozen=True)
class Tap:
    """A place to read: the path of a block, and how to get the hidden states out of what the block returned and was fed.

    `read(output, args, kwargs)` returns the hidden states; the default expects the output to be a tensor.
    """

    path: str
    read: Callable[[Any, tuple, dict], Tensor] = _the_tensor


class Taps:
    """Capture what the tapped blocks return during one forward.

    Raises `TapError` at construction when a path does not exist, and at the end of `recording()` when a tap did not fire,
    fired twice, or captured hidden states that carry no gradient while the backbone trains. A compiled backbone never calls
    hooks that were added after its first call: attach taps before.
    """

    def __init__(self, backbone: nn.Module, taps: Mapping[str, Tap]):
        self._backbone = backbone
        self._taps = dict(taps)
        self._recording = False
        self._handles = []
        self.captured: dict[str, Tensor] = {}
        for name, tap in self._taps.items():
            try:
                block = backbone.get_submodule(tap.path)
            except AttributeError:
                raise TapError(f"tap {name}: the backbone has no block {tap.path}") from None
            self._handles.append(block.register_forward_hook(self._hook(name, tap), with_kwargs=True))

    def _hook(self, name: str, tap: Tap):
        # Returns nothing: what a hook returns replaces the block's output.
        def capture(_module, args, kwargs, output) -> None:
            if not self._recording:
                return
            if name in self.captured:
                raise TapError(f"tap {name} ({tap.path}) fired twice in one forward")
            self.captured[name] = tap.read(output, args, kwargs)

        return capture

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Listen during the forward inside this block, then check what was heard."""
        self.clear()
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
        for name, tap in self._taps.items():
            if name not in self.captured:
                raise TapError(
                    f"tap {name} ({tap.path}) did not fire: the forward never reached that block, or the backbone was "
                    "compiled and called before the tap was attached"
                )
            if self._backbone.training and torch.is_grad_enabled() and not self.captured[name].requires_grad:
                raise TapError(
                    f"tap {name} ({tap.path}) carries no gradient: nothing before it is trained, or it is detached "
                    "(re-entrant gradient checkpointing does that)"
                )

    @property
    def paths(self) -> dict[str, str]:
        """The block that each tap reads."""
        return {name: tap.path for name, tap in self._taps.items()}

    def clear(self) -> None:
        """Forget what was captured; a stored tensor would keep its graph alive."""
        self.captured.clear()

    def remove(self) -> None:
        """Take the hooks off the backbone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()
