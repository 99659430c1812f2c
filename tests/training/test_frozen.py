"""Frozen convolutions keep no input for backward, and give the bits of ordinary ones, eager and compiled."""

import pytest
import torch
from conftest import thin_model
from torch import nn
from torch._dynamo.utils import counters

from training.frozen import keep_no_inputs
from training.plan import saved_bytes


def gradients(batch, *, keeps, layout=torch.contiguous_format, compiled=False):
    """Gradients of a LoRA step by name, and the bytes that were kept for backward."""
    latents, timesteps, text, _ = batch
    model = thin_model("lora")
    if not keeps:
        keep_no_inputs(model.backbone)
    model.backbone.to(memory_format=layout)
    if compiled:  # one block, which has every kind of convolution: the whole network would take half a minute
        model.backbone.down_blocks[2].compile(backend="aot_eager", dynamic=False)
    losses = []

    def forward():
        losses.append(model(latents, timesteps, text).square().mean())
        model.clear_hooks()

    kept = 0 if compiled else saved_bytes(forward, list(model.parameters()))
    forward()
    losses[-1].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_keep_their_bits_and_less_is_kept(batch, layout, compiled):
    torch.compiler.reset()
    counters.clear()
    usual, plenty = gradients(batch, keeps=True, layout=layout, compiled=compiled)
    ours, less = gradients(batch, keeps=False, layout=layout, compiled=compiled)
    assert usual.keys() == ours.keys()
    assert all(torch.equal(usual[name], ours[name]) for name in usual)
    assert counters["stats"]["unique_graphs"] == 2 * compiled
    assert not counters["graph_break"]
    assert compiled or less < 0.95 * plenty
    torch.compiler.reset()


@pytest.mark.parametrize(
    "how", [{"stride": 2, "padding": 1}, {"padding": 1, "bias": False}, {"groups": 2, "dilation": 2}]
)
def test_a_frozen_convolution_keeps_its_weight_alone_and_a_trained_one_its_input(how):
    layer, x = nn.Conv2d(4, 6, 3, **how), torch.randn(2, 4, 9, 9, requires_grad=True)
    keep_no_inputs(layer)  # it is trained
    (expected,) = torch.autograd.grad(layer(x).exp().sum(), x)
    assert saved_bytes(lambda: layer(x), list(layer.parameters())) == x.numel() * 4
    layer.requires_grad_(False)
    keep_no_inputs(layer)
    assert saved_bytes(lambda: layer(x), list(layer.parameters())) == 0
    (found,) = torch.autograd.grad(layer(x).exp().sum(), x)
    assert torch.equal(found, expected)
    layer.requires_grad_(True)  # trained again
    assert torch.autograd.grad(layer(x).sum(), layer.weight)[0].any()
