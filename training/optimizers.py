"""The table of optimisers for `optim.name`; for any of them, a step that can be undone, and a state that can be saved.

A row's `build` takes the parameter groups, each with its own "lr", and the keywords `betas`, `eps` and `weight_decay`; it
returns a `torch.optim.Optimizer`. Every value that changes from step to step must be in `optimizer.state`, because checkpoints
save only that. An optimiser that keeps such values in its groups, as Prodigy and the schedule-free ones do, does not fit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from common.errors import UserError


def _adamw8bit(groups: Iterable[dict], **options) -> Optimizer:
    """AdamW with both moments in 8 bits and one fp32 scale for each 256 values (https://arxiv.org/abs/2110.02861)."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optim.name = adamw8bit needs torchao ({error}): pip install torchao, or choose optim.name=adamw"
        ) from None
    optimizer = AdamW8bit(groups, **options)
    # torchao creates the state at the first step, with step counts on the host, which cannot be undone without waiting.
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": optimizer._new_buffer(parameter, True),
            "exp_avg_sq": optimizer._new_buffer(parameter, False),
        }
    return optimizer


class OptimizerRow(NamedTuple):
    build: Callable[..., Optimizer]
    state_bytes: float  # what the state of one trained weight takes, for `--plan`


OPTIMIZERS = {
    "adamw": OptimizerRow(partial(torch.optim.AdamW, fused=True), 8),
    "adamw8bit": OptimizerRow(
        _adamw8bit, 2 * (1 + 4 / 256)
    ),  # tensors of less than 4096 weights stay in fp32
}


def build_optimizer(
    name: str, groups: Iterable[dict], *, betas: tuple[float, float], eps: float, weight_decay: float
) -> Optimizer:
    """Build the optimiser of this name; raises `UserError` for a name not in the table or for a library that is missing.

    Args:
        groups: dicts of "params" and "lr"; those without parameters are left out.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optim.name = {name} is no optimiser: choose one of {', '.join(OPTIMIZERS)}")
    filled = [group for group in groups if group["params"]]
    return OPTIMIZERS[name].build(filled, betas=betas, eps=eps, weight_decay=weight_decay)


@torch.no_grad()
def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """Take an optimiser step, and undo it where `skip`, a scalar bool on the parameters' device, is true.

    Fused AdamW itself leaves weights, moments and step counts unchanged. For every other optimiser, weights and state are
    copied before the step, and after it the device keeps either the copies or the new values. The host waits for `skip` only
    where a copy cannot help: a parameter has no state yet, or the optimiser keeps some of its state on the host, such as
    PyTorch's step counts without `capturable`.
    """
    if _heeds_found_inf(optimizer):
        optimizer.found_inf = skip.float()
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not all(_lies_on(skip.device, optimizer.state.get(p)) for p in parameters):
        if not skip:
            optimizer.step()
        return
    before = [tensor.clone() for tensor in _held(optimizer, parameters)]
    optimizer.step()
    for old, new in zip(before, _held(optimizer, parameters), strict=True):
        torch.where(skip, old, new, out=new)  # multiplying by 0 would not remove NaN


def _heeds_found_inf(optimizer: Optimizer) -> bool:
    """Whether the optimiser's kernel skips the step where `found_inf` is 1, as it does for GradScaler.

    Fused SGD does so too, but if its first step is skipped, the next one uses momentum that was never written.
    """
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults["fused"])


def _lies_on(device: torch.device, state: dict | None) -> bool:
    """Whether a parameter's state exists and holds nothing but tensors on this device."""
    return bool(state) and all(
        isinstance(value, Tensor) and value.device == device for _, value in leaves(state)
    )


def _held(optimizer: Optimizer, parameters: list[Tensor]) -> list[Tensor]:
    """Return the parameters and all tensors of their state, in a fixed order."""
    states = (value for p in parameters for _, value in leaves(optimizer.state[p]))
    return [*(p.detach() for p in parameters), *states]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and plain values of nested dicts, lists and tuples, each with its keys, such as `/exp_avg/codes`.

    Of a tensor that wraps other tensors, as a quantised one does, these inner tensors are yielded.
    """
    if isinstance(tree, Tensor) and is_traceable_wrapper_subclass(tree):
        inner, _ = tree.__tensor_flatten__()
        tree = {name: getattr(tree, name) for name in inner}
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def flat_state(optimizer: Optimizer, parameters: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """Return the state of named parameters as (tensors, plain values), both by `name/key`.

    Parameters without a state have no entry.
    """
    held = {name: optimizer.state[p] for name, p in parameters.items() if p in optimizer.state}
    found = [leaf for name, state in held.items() for leaf in leaves(state, name)]
    return (
        {path: value for path, value in found if isinstance(value, Tensor)},
        {path: value for path, value in found if not isinstance(value, Tensor)},
    )


@torch.no_grad()
def load_flat_state(
    optimizer: Optimizer, parameters: dict[str, Tensor], tensors: dict[str, Tensor], values: dict
) -> None:
    """Load what `flat_state` returned.

    Where the optimiser has not created a parameter's state yet, a step with gradients of 0 makes it do so, and the values are
    then copied into it. Each tensor thus has the class, device and memory format that the optimiser chooses, which the fused
    kernel requires.
    Raises `UserError` where names, shapes or dtypes are not those of this optimiser.
    """
    with_state = {path.partition("/")[0] for path in (*tensors, *values)}
    for name in parameters.keys() - with_state:
        optimizer.state.pop(parameters[name], None)
    _create_state(optimizer, [parameters[name] for name in parameters if name in with_state])
    own, own_values = flat_state(optimizer, parameters)
    differing = (own.keys() ^ tensors.keys()) | (own_values.keys() ^ values.keys())
    differing |= {path for path in own.keys() & tensors.keys() if _form(own[path]) != _form(tensors[path])}
    if differing:
        raise UserError(
            f"the checkpoint is of another optimiser (for instance {min(differing)}): check optim.name"
        )
    for path, tensor in own.items():
        tensor.copy_(tensors[path])
    for name in with_state:
        optimizer.state[parameters[name]] = _with_values(optimizer.state[parameters[name]], values, name)


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _create_state(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Make the optimiser create the state of parameters that have none; the parameters keep their values."""
    missing = [p for p in parameters if not optimizer.state.get(p)]
    if not missing:
        return
    before = [p.detach().clone() for p in missing]
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch._foreach_copy_(missing, before)


def _with_values(tree: Any, values: dict, path: str) -> Any:
    """Return the tree with its tensors kept and its plain values replaced by those in `values`."""
    if isinstance(tree, Tensor):
        return tree
    if isinstance(tree, dict):
        return {key: _with_values(value, values, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_with_values(value, values, f"{path}/{i}") for i, value in enumerate(tree))
    return values[path]
