"""Turn an optimiser's state into named tensors and plain values, and load them back into the optimiser."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from common.errors import UserError


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
