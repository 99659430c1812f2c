"""Convolutions with frozen weights that do not keep their input for backward, which needs the weight alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ConvolveFrozen(torch.autograd.Function):
    """F.conv2d whose only gradient is that of its input; PyTorch's own keeps the input for the gradient of the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, *how) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, how
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.how
        shaped = grad.new_empty(1).expand(ctx.shape)  # of the input, only the shape is looked at
        wanted = True, False, False
        found = torch.ops.aten.convolution_backward(
            grad, shaped, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return found[0], None, None, None, None, None, None


class _FrozenConv2d(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.requires_grad and not weight.requires_grad:
            return _ConvolveFrozen.apply(
                x, weight, bias, self.stride, self.padding, self.dilation, self.groups
            )
        return super()._conv_forward(x, weight, bias)


def keep_no_inputs(network: nn.Module) -> None:
    """Let the frozen 2D convolutions of a network keep nothing for backward; results and gradients keep their bits."""
    for module in network.modules():
        plain = (
            type(module) is nn.Conv2d and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
        )
        if plain and not any(parameter.requires_grad for parameter in module.parameters()):
            module.__class__ = _FrozenConv2d
