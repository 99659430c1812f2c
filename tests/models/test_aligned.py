import pytest
import torch
import torch.nn.functional as F
from conftest import TEACHER_DIM, small_model, small_unet
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from common.errors import UserError
from method.alignment import token_loss
from models.families.sd15 import SD15
from models.sd15_unet_aligned import SD15UNetAligned, lora_config
from models.taps import Tap, TapError, Taps

ALL_TAPS = ("enc_last", "mid", "dec_first")


@pytest.fixture(scope="module")
def full_size():
    """SD-1.5's U-Net at full size without its memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, sample_size=64)


def test_lora_of_the_plan_is_22_modules_and_7462912_parameters(full_size):
    assert sum(p.numel() for p in full_size.parameters()) == 859_520_964
    with torch.device("meta"):
        model = SD15UNetAligned(full_size, [], train="lora", lora_config=lora_config(32, 32))
    trained = model.trained_parameters()
    places = sorted({name.split(".lora_")[0].removeprefix("backbone.") for name in trained})
    attention = [
        f"mid_block.attentions.0.transformer_blocks.0.{attn}.{layer}"
        for attn in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    convs = [
        f"{block}.resnets.{i}.{conv}"
        for block, count in (("down_blocks.3", 2), ("mid_block", 2), ("up_blocks.0", 3))
        for i in range(count)
        for conv in ("conv1", "conv2")
    ]
    assert places == sorted(attention + convs)
    assert len(places) == 22
    assert sum(p.numel() for p in trained.values()) == 7_462_912


def test_taps_are_the_last_resnets_at_the_lowest_resolution(full_size):
    taps = {name: SD15().tap(full_size, name) for name in SD15.blocks}
    assert {name: tap.path for name, tap in taps.items()} == {
        "enc_last": "down_blocks.3.resnets.1",
        "mid": "mid_block.resnets.1",
        "dec_first": "up_blocks.0.resnets.2",
    }


@pytest.mark.parametrize("train", ["lora", "partial", "full"])
def test_forward_equals_the_bare_unet_bit_for_bit(batch, train):
    latents, timesteps, text, _ = batch
    expected = small_unet().train()(latents, timesteps, text).sample
    model = small_model(ALL_TAPS, train)
    assert model(latents, timesteps, text).equal(expected)
    assert model(latents, timesteps, text, capture=False).equal(expected)


def test_tapped_features_are_those_of_the_named_blocks(batch):
    latents, timesteps, text, _ = batch
    model = small_model(ALL_TAPS)
    model(latents, timesteps, text)
    captured = dict(model.taps.captured)
    seen = {}
    for name, path in {
        "enc_last": "down_blocks.3.resnets.1",
        "mid": "mid_block",  # its last resnet is its output
        "dec_first": "up_blocks.0.resnets.2",
    }.items():
        model.backbone.get_submodule(path).register_forward_hook(
            lambda m, i, o, name=name: seen.update({name: o})
        )
    model(latents, timesteps, text)
    for name in ALL_TAPS:
        assert captured[name].shape == (3, 64, 2, 2)
        assert captured[name].equal(seen[name])


@pytest.mark.parametrize("train", ["lora", "partial", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_every_tapped_cell(batch, train, checkpointing):
    latents, timesteps, text, teacher = batch
    model = small_model(ALL_TAPS, train)
    if checkpointing:
        model.checkpoint()
    model(latents, timesteps, text)
    features = dict(model.taps.captured)
    for feature in features.values():
        feature.retain_grad()
    torch.stack([token_loss(x, teacher) for x in model.get_aligned_tokens().values()]).sum().backward()
    for name, feature in features.items():
        reached = feature.grad.abs().sum(1) > 0  # (B, h, w)
        assert reached.all(), f"{name}: only {reached.float().mean():.0%} of the cells"


def test_a_teacher_of_one_token_reaches_only_the_centre():
    """The known-bad alignment to a CLS vector: bilinear shrinking to one token reads four cells of an 8×8 grid."""
    feat = torch.randn(1, 4, 8, 8, requires_grad=True)
    shrunk = F.interpolate(feat, (1, 1), mode="bilinear", align_corners=False)
    shrunk.sum().backward()
    assert (feat.grad.abs().sum(1) > 0).sum() == 4


def test_gradients_are_the_same_with_and_without_checkpointing(batch):
    latents, timesteps, text, teacher = batch
    gradients = []
    for checkpointing in (False, True):
        model = small_model(ALL_TAPS)
        if checkpointing:
            model.checkpoint()
        out = model(latents, timesteps, text)
        loss = out.square().mean() + sum(token_loss(x, teacher) for x in model.get_aligned_tokens().values())
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("train", ["lora", "partial"])
def test_what_is_frozen_gets_no_gradient_and_stays_bit_identical(batch, train):
    latents, timesteps, text, teacher = batch
    model = small_model(train=train)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # LoRA's A only moves once its B has
        out = model(latents, timesteps, text)
        (out.square().mean() + token_loss(model.get_aligned_tokens()["mid"], teacher)).backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == set(model.trained_parameters())
    allowed = ("backbone.mid_block.", "backbone.down_blocks.3.", "backbone.up_blocks.0.", "heads.")
    assert all(name.startswith(allowed) for name in moved)


def test_heads_are_no_part_of_the_unet_state_dict():
    stock = set(small_unet().state_dict())
    assert set(small_model(ALL_TAPS).backbone.state_dict()) == stock


def test_exported_lora_holds_only_lora_and_its_alpha(tmp_path):
    file = small_model(ALL_TAPS, "lora").export(tmp_path)
    stored = load_file(file)
    assert stored
    assert all(name.startswith("unet.") and ".lora" in name for name in stored)


def test_building_a_model_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    small_model(ALL_TAPS, "lora", seed=3)
    assert torch.rand(1).equal(expected)


def test_seed_decides_the_initial_heads():
    weights = [small_model(seed=seed).heads["mid"].proj[0].weight for seed in (0, 0, 1)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_tokens_need_a_forward_that_captured(batch):
    latents, timesteps, text, _ = batch
    model = small_model()
    model(latents, timesteps, text)
    assert model.get_aligned_tokens()["mid"].shape == (3, 16, TEACHER_DIM)
    model.clear_hooks()
    with pytest.raises(RuntimeError, match="capture"):
        model.get_aligned_tokens()
    model(latents, timesteps, text, capture=False)
    with pytest.raises(RuntimeError, match="capture"):
        model.get_aligned_tokens()


def test_a_unet_of_another_architecture_is_refused():
    three_levels = UNet2DConditionModel(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=32,
    )
    with pytest.raises(UserError, match="3 levels"):
        SD15UNetAligned(three_levels, train="full")


def test_attention_only_lora_touches_the_mid_block_alone():
    unet = small_unet()
    SD15UNetAligned(unet, [], train="lora", lora_config=lora_config(4, 4, "attention"))
    places = {name.split(".")[0] for name, p in unet.named_parameters() if p.requires_grad}
    assert places == {"mid_block"}
    assert set(SD15.lora_targets) == {"attention+conv", "attention"}


class TestTaps:
    def test_a_path_that_does_not_exist_is_refused(self):
        with pytest.raises(TapError, match="no block nowhere"):
            Taps(torch.nn.Linear(2, 2), {"t": Tap("nowhere.0")})

    def test_a_tap_that_does_not_fire_is_an_error(self):
        net = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
        taps = Taps(net, {"t": Tap("idle")})
        with pytest.raises(TapError, match="did not fire"), taps.recording():
            net["used"](torch.ones(1, 2))

    def test_a_tap_that_fires_twice_in_one_forward_is_an_error(self):
        net = torch.nn.Sequential(torch.nn.Linear(2, 2))
        taps = Taps(net, {"t": Tap("0")})
        with pytest.raises(TapError, match="twice"), taps.recording():
            net(net(torch.ones(1, 2)))

    def test_a_detached_tap_is_an_error_while_training_only(self):
        net = torch.nn.Sequential(torch.nn.Linear(2, 2)).requires_grad_(False)
        taps = Taps(net, {"t": Tap("0")})
        with pytest.raises(TapError, match="no gradient"), taps.recording():
            net(torch.ones(1, 2))
        with torch.no_grad(), taps.recording():
            net(torch.ones(1, 2))

    def test_a_block_that_returns_a_tuple_is_read_by_its_function(self):
        class Pair(torch.nn.Module):
            def forward(self, x):
                return x, 2 * x

        net = torch.nn.Sequential(Pair())
        with pytest.raises(TypeError, match="read"), Taps(net, {"t": Tap("0")}).recording():
            net(torch.ones(1))
        net = torch.nn.Sequential(Pair())
        taps = Taps(net, {"t": Tap("0", read=lambda output, args, kwargs: output[1])})
        with torch.no_grad(), taps.recording():
            net(torch.ones(1))
        assert taps.captured["t"] == 2

    def test_removed_taps_hear_nothing(self):
        net = torch.nn.Sequential(torch.nn.Linear(2, 2))
        taps = Taps(net, {"t": Tap("0")})
        taps.remove()
        with pytest.raises(TapError, match="did not fire"), taps.recording():
            net(torch.ones(1, 2))
