"""What a tap reads are the picture's own tokens, cell by cell, and what lies behind a mask of the text is nothing."""

import re
from contextlib import contextmanager

import pytest
import torch
from loaded import CPU, LONG, PROMPTS, prepared
from test_contract import noise_of, taps_of
from torch import nn

from models.aligned import AlignedModel, family_lora
from models.families.sd15 import SD15
from models.families.table import FAMILIES, family_of
from models.families.transformer import Transformer
from models.pipeline_parts import exact_weights

TRANSFORMERS = [name for name, kind in FAMILIES.items() if issubclass(kind, Transformer)]
TRIMMED = [name for name, kind in FAMILIES.items() if kind.trimmed_text]
VALUES = r"(to_v|to_v_t|add_v_proj|to_value)$"  # what attention mixes, for text and picture
# Their feed-forward is a convolution, so the neighbours of a cell move too.
CONVOLVED = ("sana", "sanavideo")


@contextmanager
def silenced(network: nn.Module):
    """The network with attention to nothing: each token sees itself alone."""

    def nothing(_module, _args, output):
        return torch.zeros_like(output)

    def no_values(_module, _args, output):  # of one projection to queries, keys, values and the feed-forward
        inner = network.config.num_attention_heads * network.config.attention_head_dim
        return torch.cat(
            [output[..., : 2 * inner], 0 * output[..., 2 * inner : 3 * inner], output[..., 3 * inner :]], -1
        )

    hooks = []
    for path, module in network.named_modules():
        if re.search(VALUES, path):
            hooks.append(module.register_forward_hook(nothing))
        elif path.endswith("to_qkv_mlp_proj"):
            hooks.append(module.register_forward_hook(no_values))
    assert hooks
    yield
    for hook in hooks:
        hook.remove()


def one_of_each_kind(family, network) -> list[str]:
    """The tap at a third of the depth, and the last block of each list: of two streams and of one."""
    paths = {path: tap for tap, path in family.blocks(network).items()}
    last = {path.rpartition(".")[0]: tap for path, tap in paths.items()}
    return list(dict.fromkeys([family.main_tap(network), *last.values()]))


@torch.no_grad()
def moved_cells(model, x_t, t, text, patch):
    """{(tap, cell): how far each cell (…) of the features moves when that cell of the latents does}."""
    model.predict(x_t, t, text, capture=True)
    before = dict(model.taps.captured)
    grid = next(iter(before.values())).shape[2:]
    found = {}
    for cell in torch.ones(grid).nonzero()[:: max(1, torch.Size(grid).numel() // 5)].tolist():
        place = tuple(slice(i * p, (i + 1) * p) for i, p in zip(cell, patch, strict=True))
        moved = x_t.clone()
        moved[(..., *place)] += 1
        model.predict(moved, t, text, capture=True)
        for tap, features in model.taps.captured.items():
            found[tap, tuple(cell)] = (features - before[tap]).abs().amax(1)
    return found


def check_tokens(family, tall=False):
    """With attention silenced a patch of the latents moves its own cell of every tap, and of another prompt's length alike."""
    network = family.load_network()
    x_t = noise_of(family)
    x_t = x_t.mT.contiguous() if tall else x_t
    text = family.encode_text([PROMPTS[0], LONG], CPU)
    t = family.path(x_t.shape[1:]).spread(2)
    model = AlignedModel(family, network, one_of_each_kind(family, network), 64, train="full").eval()
    with silenced(network):
        found = moved_cells(model, x_t, t, text, family.patch)
    grid = tuple(n // p for n, p in zip(x_t.shape[2:], family.patch, strict=True))
    for (tap, cell), moved in found.items():
        assert moved.shape[1:] == grid, tap
        for row in moved:
            assert row[cell] > 1e-4, (tap, cell)
            if type(family).pipeline in {FAMILIES[name].pipeline for name in CONVOLVED}:
                assert row[cell] == row.max(), (tap, cell)
            else:
                row[cell] = 0
                assert row.max() < 1e-6, (tap, cell)


@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_patch_of_the_latents_moves_its_own_cell_of_the_features_and_no_other(base_of, name, tall):
    check_tokens(prepared(family_of(base_of(name)), LONG), tall)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, kind in FAMILIES.items() if issubclass(kind, SD15)])
def test_the_features_of_a_unet_keep_height_and_width(base_of, name):
    family = prepared(family_of(base_of(name)))
    network = family.load_network()
    down = 2 ** (len(network.config.block_out_channels) - 1)
    x_t = torch.randn(1, 4, 8 * down, 4 * down, generator=torch.Generator().manual_seed(0))
    text = family.encode_text(PROMPTS[:1], CPU)
    model = AlignedModel(family, network, ["mid"], 64, train="full").eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):  # which sees the centre alone
            module.weight *= torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    with silenced(network):
        found = moved_cells(model, x_t, torch.tensor([500]), text, (down, down))
    for (_, cell), moved in found.items():
        assert moved.shape == (1, 8, 4)
        assert moved[0][cell] == moved.max(), cell  # the norms move all cells


def test_the_families_whose_text_is_trimmed():
    assert TRIMMED == ["sana", "pixart", "lumina2", "ltxvideo", "sanavideo"]


@torch.no_grad()
@pytest.mark.parametrize("name", TRIMMED)
def test_what_lies_behind_the_mask_of_the_text_moves_nothing_and_may_be_left_out(base_of, name):
    family = prepared(family_of(base_of(name)), LONG)
    network = family.load_network().eval()
    x_t = noise_of(family)
    t, text = family.path(x_t.shape[1:]).spread(2), family.encode_text([PROMPTS[0], LONG], CPU)
    whole = family.forward(network, x_t, t, text)
    longest = 0
    for field, mask in family.trimmed_text.items():
        behind = text[mask] == 0
        assert behind.any(1).all()
        longest = max(longest, int((~behind).sum(1).max()))
        garbage = text | {field: torch.where(behind[..., None], 7.0, text[field])}
        assert family.forward(network, x_t, t, garbage).equal(whole)
    cut = {*family.trimmed_text, *family.trimmed_text.values()}
    trimmed = {field: rows[:, :longest] if field in cut else rows for field, rows in text.items()}
    torch.testing.assert_close(family.forward(network, x_t, t, trimmed), whole, atol=1e-5, rtol=1e-5)


def test_text_that_the_network_reads_to_its_end_is_not_trimmed(base_of):
    """FLUX.1 attends to the padding too."""
    family = prepared(family_of(base_of("flux")))
    network, x_t = family.load_network().eval(), noise_of(family)
    t, text = family.path(x_t.shape[1:]).spread(2), family.encode_text(PROMPTS, CPU)
    with torch.no_grad():
        whole = family.forward(network, x_t, t, text)
        trimmed = text | {"prompt_embeds": text["prompt_embeds"][:, :64]}
        assert (family.forward(network, x_t, t, trimmed) - whole).abs().max() > 1e-3


def gradients(family, x_t, t, text, *, recompute: bool):
    model = AlignedModel(family, family.load_network(), taps_of(family), 64, train="full").train()
    if recompute:
        family.checkpoint(model.backbone)
    prediction = model.predict(x_t, t, text, capture=True)
    tokens = model.get_aligned_tokens((4, 4))
    loss = prediction.square().mean() + sum(x.square().mean() for x in tokens.values())
    loss.backward()
    return prediction, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_without_checkpointing(base_of, name):
    family = prepared(family_of(base_of(name)), LONG)
    x_t = noise_of(family)
    t, text = family.path(x_t.shape[1:]).spread(2), family.encode_text([PROMPTS[0], LONG], CPU)
    (prediction, plain), (again, recomputed) = (
        gradients(family, x_t, t, text, recompute=choice) for choice in (False, True)
    )
    torch.testing.assert_close(again, prediction, atol=1e-5, rtol=1e-5)
    assert plain.keys() == recomputed.keys()
    for parameter, gradient in plain.items():
        torch.testing.assert_close(
            recomputed[parameter], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}"
        )


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_prediction_is_the_same_in_train_mode(base_of, name):
    check_modes(prepared(family_of(base_of(name)), LONG))


@torch.no_grad()
def check_modes(family):
    network, x_t = family.load_network(), noise_of(family)
    t, text = family.path(x_t.shape[1:]).spread(2), family.encode_text(PROMPTS, CPU)
    found = [family.forward(network.train(mode), x_t, t, text) for mode in (True, False)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_hidreams_experts_are_trained_in_train_mode_alone(base_of):
    family = prepared(family_of(base_of("hidream")))
    x_t, text = noise_of(family), family.encode_text(PROMPTS, CPU)
    idle = {}
    for mode in (True, False):
        network = family.load_network().requires_grad_(True).train(mode)
        family.forward(network, x_t, family.path(x_t.shape[1:]).spread(2), text).square().mean().backward()
        idle[mode] = [name for name, p in network.named_parameters() if p.grad is None]
    assert not [name for name in idle[True] if "experts" in name]
    assert [name for name in idle[False] if "experts" in name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_in_bf16_with_what_its_class_keeps_in_fp32(base_of, name):
    family = prepared(family_of(base_of(name)))
    lora = family_lora(family, 4, 4, "auto")
    model = AlignedModel(family, family.load_network(), ["auto"], 64, train="lora", lora=lora)
    exact = exact_weights(model.backbone)
    model.to(torch.bfloat16).train()
    kinds = {x.dtype for n, x in model.backbone.named_parameters() if n not in exact}
    assert kinds == {model.dtype} == {torch.bfloat16}
    assert all(x.dtype == torch.float32 for x in exact.values())
    x_t, t, text = (
        noise_of(family),
        family.path(noise_of(family).shape[1:]).spread(2),
        family.encode_text(PROMPTS, CPU),
    )
    prediction = model.predict(x_t, t, text, capture=True)
    assert prediction.isfinite().all()
    prediction.float().square().mean().backward()
    model.clear_hooks()
