"""Every optimiser that `optim.name` can choose, one row each, and a step of any of them that can be undone.

A row takes the parameter groups, each with its own "lr", and the keywords `betas`, `eps` and `weight_decay`; it returns a
`torch.optim.Optimizer`. What changes from step to step must lie in `optimizer.state`, since checkpoints save nothing else of
it. An optimiser that keeps such values in its groups, as Prodigy and the schedule-free ones do, does not fit.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from common.errors import UserError
from training.optimizer_state import leaves


def _adamw8bit(groups: Iterable[dict], **options) -> Optimizer:
    """AdamW with both moments in 8 bits and one fp32 scale for each 256 values (https://arxiv.org/abs/2110.02861)."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optim.name = adamw8bit needs torchao ({error}): pip install torchao, or choose optim.name=adamw"
        ) from None
    optimizer = AdamW8bit(groups, **options)
    # torchao would do this at the first step, with the step counts on the host, which nothing could undo without waiting.
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": optimizer._new_buffer(parameter, True),
            "exp_avg_sq": optimizer._new_buffer(parameter, False),
        }
    return optimizer


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamw8bit": _adamw8bit,
}


def build_optimizer(
    name: str, groups: Iterable[dict], *, betas: tuple[float, float], eps: float, weight_decay: float
) -> Optimizer:
    """The optimiser of a row of the table; raises `UserError` for a name that is not in it or a library that is missing.

    Args:
        groups: dicts of "params" and "lr"; those without parameters are left out.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optim.name = {name} is no optimiser: choose one of {', '.join(OPTIMIZERS)}")
    filled = [group for group in groups if group["params"]]
    return OPTIMIZERS[name](filled, betas=betas, eps=eps, weight_decay=weight_decay)


@torch.no_grad()
def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """One step, of which nothing remains where `skip`, a scalar bool on the parameters' device, is true.

    Fused AdamW leaves weights, moments and step counts alone by itself. For all others weights and state are copied before the
    step and chosen after it, on the device. The host waits for `skip` only where no copy can help: a parameter has no state
    yet, or the optimiser keeps some of it on the host, such as PyTorch's step counts without `capturable`.
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
        torch.where(skip, old, new, out=new)  # no product, in which NaN would survive a factor of 0


def _heeds_found_inf(optimizer: Optimizer) -> bool:
    """Whether its kernel skips the step where `found_inf` is 1, as for GradScaler.

    Fused SGD does too, but would go on from momentum that was never written if the first step was skipped.
    """
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults["fused"])


def _lies_on(device: torch.device, state: dict | None) -> bool:
    """Whether a parameter's state exists and consists of tensors on the device alone."""
    return bool(state) and all(
        isinstance(value, Tensor) and value.device == device for _, value in leaves(state)
    )


def _held(optimizer: Optimizer, parameters: list[Tensor]) -> list[Tensor]:
    """The parameters and all tensors of their state, in a fixed order."""
    states = (value for p in parameters for _, value in leaves(optimizer.state[p]))
    return [*(p.detach() for p in parameters), *states]
