"""Taps on what comes next, and under what users do to a backbone: compile it, checkpoint it, add LoRA, hook it wrongly."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from conftest import ALL_TAPS, small_model, small_unet, thin_model
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from method.alignment import AlignHead, AlignmentLoss, token_loss
from models.taps import Tap, TapError, Taps


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class OfBlocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x).sin()
        return x


def test_a_tap_on_a_network_that_was_already_compiled_and_called_is_an_error():
    network, x = OfBlocks(), torch.ones(1, 2)
    network.compile(backend="eager")
    network(x)
    taps = Taps(network, {"first": Tap("blocks.0")})
    with pytest.raises(TapError, match="compiled and called before"), taps.recording():
        network(x)


@pytest.mark.thorough  # test_alignment_that_comes_and_goes_compiles_twice_and_no_more looks at the same
def test_a_compiled_forward_that_captures_nothing_stays_silent(batch):
    latents, timesteps, text, _ = batch
    model = thin_model("full")
    model.backbone.compile(backend="eager")
    for _ in range(2):
        model(latents, timesteps, text)
        assert set(model.taps.captured) == set(ALL_TAPS)
        model(latents, timesteps, text, capture=False)
        model.clear_hooks()
        model(latents, timesteps, text, capture=False)
        assert not model.taps.captured


@pytest.mark.parametrize(
    ("path", "refused"), [("mid_block.resnets.1", False), ("mid_block.resnets.1.conv2", True)]
)
def test_reentrant_checkpointing_detaches_a_tap_inside_a_block_and_is_refused(batch, path, refused):
    """What is inside is run without gradient, and again in backward; the block's own output gets its gradient afterwards."""
    latents, timesteps, text, _ = batch
    unet = small_unet().train()

    def reentrant(module, *args):
        return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=True)

    unet.enable_gradient_checkpointing(reentrant)
    taps = Taps(unet, {"mid": Tap(path)})
    with pytest.raises(TapError, match="re-entrant") if refused else nullcontext(), taps.recording():
        unet(latents, timesteps, text)


def test_the_graph_dies_with_the_step(batch):
    """A captured tensor would keep every activation before it alive into the next step."""
    model = small_model()
    latents, timesteps, text, teacher = batch
    model(latents, timesteps, text)
    feature = weakref.ref(model.taps.captured["mid"])
    token_loss(model.get_aligned_tokens()["mid"], teacher).backward()
    assert feature() is not None
    model.clear_hooks()
    gc.collect()
    assert feature() is None


def test_a_tap_returns_nothing_so_the_output_stays(batch):
    """The known-bad hook `lambda m, a, o: store.setdefault("mid", o)` returns what it stored, which replaces the output."""
    latents, timesteps, text, _ = batch
    expected = small_unet()(latents, timesteps, text).sample
    unet, store = small_unet(), {}
    unet.mid_block.resnets[-1].register_forward_hook(
        lambda module, args, output: store.setdefault("mid", output)
    )
    assert unet(latents, timesteps, text).sample.equal(expected)  # the first call stores its own output
    assert not unet(2 * latents, timesteps, text).sample.equal(
        small_unet()(2 * latents, timesteps, text).sample
    )
    unet = small_unet()
    taps = Taps(unet, {"mid": Tap("mid_block.resnets.1")})
    for scale in (1, 2):
        with torch.no_grad(), taps.recording():
            found = unet(scale * latents, timesteps, text).sample
        assert found.equal(small_unet()(scale * latents, timesteps, text).sample)


def tokens_as_map(tokens, grid):
    """Image tokens `(B, N, C)`, row by row, as a map `(B, C, h, w)`."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def flux():
    """Its double blocks return (text, image); its single blocks too, having joined them as text before image."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 12, 4),  # 3×4 cells
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.3, 0.9]),
        "img_ids": torch.stack(
            torch.meshgrid(torch.zeros(1), torch.arange(3.0), torch.arange(4.0), indexing="ij"), -1
        ).view(12, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, inputs, {"transformer_blocks.0": 1, "single_transformer_blocks.0": 1}


def sd3():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    torch.nn.init.normal_(model.transformer_blocks[0].norm1.linear.weight, std=0.1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 6, 8),  # 3×4 patches
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([300, 900]),
    }
    return model, inputs, {"transformer_blocks.0": 1}


@pytest.mark.parametrize("backbone", [flux, sd3])
def test_a_dit_needs_nothing_but_a_function_that_reads_its_blocks(backbone):
    """Tuples, text beside image tokens, a grid that is not square: the same taps, heads and losses."""
    model, inputs, blocks = backbone()
    model.train()
    for path, which in blocks.items():
        taps = Taps(
            model, {"block": Tap(path, lambda out, *_, which=which: tokens_as_map(out[which], (3, 4)))}
        )
        head = AlignHead(32, 64, kind="mlp", hidden=16)
        with taps.recording():
            model(**inputs)
        feature = taps.captured["block"]
        assert feature.shape == (2, 32, 3, 4)
        feature.retain_grad()
        terms = AlignmentLoss(manifold="both")({"block": head(feature, (6, 8))}, torch.randn(2, 48, 64))
        terms["loss_align"].backward()
        assert (feature.grad.abs().sum(1) > 0).all()
        assert model.x_embedder.weight.grad.abs().sum() > 0 if hasattr(model, "x_embedder") else True
        taps.remove()


def test_video_tokens_run_frame_by_frame_through_head_and_losses():
    """(f, h, w): features of a video block, teacher tokens of each frame."""
    feature = torch.randn(2, 16, 3, 2, 2, requires_grad=True)
    head = AlignHead(16, 32)
    terms = AlignmentLoss(manifold="both")({"t": head(feature, (4, 4))}, torch.randn(2, 3 * 16, 32))
    terms["loss_align"].backward()
    assert (feature.grad.abs().sum(1) > 0).all()
