"""What the config says reaches the objects that act: no knob is lost on the way."""

import json
import shutil

import pytest
import torch
from conftest import demo_overrides
from safetensors.torch import save_file

from cache.manifest import read_manifest, write_manifest
from common.errors import UserError
from common.files import write_json
from configs.align import Align
from configs.loading import load_config
from configs.sections import Model, Teacher
from method.alignment import MANIFOLD_LOSSES, AlignHead, manifold_gram_loss, spatial_norm, token_loss
from method.objective import squared_error
from models.families.table import family_of
from training import checkpoint
from training.parts import (
    build_coefficient,
    build_model,
    build_objective,
    build_path,
    check_fit,
    family_for,
    open_cache,
)  # fmt: skip

CONFIG = "configs/demo.yaml"


@pytest.fixture
def config(miniature, tmp_path):
    return lambda *more: load_config(CONFIG, demo_overrides(miniature, tmp_path / "run", *more))


def objective(config):
    return build_objective(config.align, build_path(config.diffusion, family_for(config), (4, 16, 16)))


def model_of(config):
    return build_model(config.model, config.align, config.teacher, config.seed, family_for(config))


def coefficient_of(config):
    return build_coefficient(config.align, config.train.steps)


def tokens(seed):
    return torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ((), lambda x, y: token_loss(x, y) + 3 * manifold_gram_loss(x, y)),
        (("align.manifold_coeff=0",), token_loss),
        (
            ("align.manifold_coeff=0", "align.spatial_norm=0.5"),
            lambda x, y: token_loss(x, spatial_norm(y, 0.5)),
        ),
        (
            ("align.upper_only=true",),
            lambda x, y: token_loss(x, y) + 3 * manifold_gram_loss(x, y, upper_only=True),
        ),
    ],
)
def test_the_options_of_the_alignment_decide_its_loss(config, knobs, expected):
    x, y = tokens(0), tokens(1)
    loss = objective(config(*knobs)).alignment({"mid": x}, y)["loss_align"]
    torch.testing.assert_close(loss, expected(x, y))


def test_gathering_is_asked_for(config, monkeypatch):
    asked = []
    loss = objective(config("align.gather=true")).alignment
    asks = lambda x, y, upper_only, gather, _: asked.append(gather) or x.sum()  # noqa: E731
    monkeypatch.setitem(MANIFOLD_LOSSES, loss.manifold, asks)
    loss({"mid": tokens(0)}, tokens(1))
    assert asked == [True]


def test_the_options_of_the_diffusion_loss_decide_it(config):
    x_0, noise, out = (torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    t = torch.tensor([10, 500, 990])
    knobs = [
        ("diffusion.parameterization=epsilon",),
        ("diffusion.parameterization=epsilon", "diffusion.v_weight_max=50"),
        ("diffusion.parameterization=epsilon", "diffusion.prediction=epsilon"),
        ("diffusion.parameterization=epsilon", "diffusion.snr_gamma=5"),
        ("diffusion.parameterization=v", "diffusion.snr_gamma=5"),
        ("diffusion.parameterization=v",),
    ]
    errors = []
    for changes in knobs:
        _, target, weight = objective(config(*changes)).path(x_0, noise, t)
        errors.append(squared_error(out, target, weight).mean().item())
    assert len(set(errors)) == len(knobs)


def test_a_model_is_built_of_its_own_sections(miniature):
    """Without a config around them, and with heads whose weights the seed alone decides."""
    base = Model(base=f"{miniature}/models/sd15-mini", train="full")
    family, align, teacher = family_of(base.base), Align(taps=("mid", "dec_first")), Teacher(dim=64)
    weights = [
        build_model(base, align, teacher, seed, family).trained_parameters()["heads.mid.proj.0.weight"]
        for seed in (0, 0, 1)
    ]
    assert weights[0].shape[0] == 64
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not build_model(base, Align(coeff=0), teacher, 0, family).heads


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv3x3"])
def test_the_head_is_the_one_that_is_asked_for(config, kind):
    model = model_of(config(f"align.head={kind}", "align.head_hidden=24"))
    expected = AlignHead(64, 64, kind, 24).state_dict()
    assert {k: v.shape for k, v in model.heads["mid"].state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }


def test_the_cutoff_is_the_one_that_is_asked_for(config):
    knobs = ["threshold=0.4", "ema_decay=0.75", "every=3"]
    cutoff = coefficient_of(
        config(*(f"align.similarity_{k}" for k in knobs), "align.threshold_mode=recoverable")
    ).cutoff
    assert (cutoff.threshold, cutoff.decay, cutoff.enough, cutoff.mode, cutoff.every) == (
        0.4,
        0.75,
        4,
        "recoverable",
        3,
    )
    assert coefficient_of(config()).cutoff is None


def test_the_schedule_is_the_one_that_is_asked_for(config):
    knobs = {
        "coeff": 0.5,
        "schedule": "polynomial",
        "warmup_steps": 1,
        "decay_steps": 2,
        "coeff_end": 0.1,
        "power": 3.0,
    }
    schedule = coefficient_of(
        config(*(f"align.{k}={v}" for k, v in knobs.items()), "align.cutoff_step=5")
    ).schedule
    assert [schedule(step) for step in range(6)] == pytest.approx([0, 0.5, 0.15, 0.1, 0.1, 0])


def test_a_tap_before_everything_that_is_trained_is_refused(config):
    only_attention = ["model.train=lora", "model.lora_targets=attention"]
    with pytest.raises(UserError, match="nothing before enc_last is trained"):
        model_of(config(*only_attention, "align.taps=[enc_last, mid]"))
    model_of(config(*only_attention, "align.taps=mid"))
    model_of(config(*only_attention, "align.taps=enc_last", "align.coeff=0"))


def test_a_run_of_before_is_refused_in_one_line(config, tmp_path):
    model = model_of(config())
    old = {name.replace("backbone.", "unet.", 1): value for name, value in model.trained_parameters().items()}
    save_file({name: value.detach() for name, value in old.items()}, tmp_path / "trained.safetensors")
    with pytest.raises(
        UserError, match=r"^[^\n]*written by an earlier version[^\n]*train the run again[^\n]*$"
    ):
        checkpoint._copy_into(model.trained_parameters(), tmp_path / "trained.safetensors")


def test_the_teacher_that_others_name_is_compared_with_the_tokens(miniature, config, tmp_path):
    """`urepa_model` and the image size are checks on the cache: they agree with its manifest, or one line says how not."""
    folder = tmp_path / "tokens"
    shutil.copytree(miniature / "cache/tokens", folder)
    source = {"model": "/x/dinov2_vitl14_pretrain.pth"}
    settings = json.loads((folder / "settings.json").read_text())
    write_json(folder / "settings.json", settings | {"source": settings["source"] | source})
    manifest = read_manifest(miniature / "cache/tokens", "tokens")
    write_manifest(folder, manifest | {"source": manifest["source"] | source})
    theirs = [f"data.tokens={folder}", "teacher.dim=64", "urepa_enabled=true", "urepa_encoder_image_size=56"]

    def opened(*more):
        settings = config(*theirs, *more)
        return open_cache(settings.data, settings.teacher, need_tokens=True)

    assert opened("urepa_model=dinov2_vitl14").tokens.spec.shape == (16, 64)
    with pytest.raises(UserError, match="run script 3 with --teacher facebook/dinov2-giant"):
        opened("urepa_model=dinov2_vitg14")
    with pytest.raises(UserError, match=r"set teacher\.dim and teacher\.grid"):
        opened("urepa_model=dinov2_vitl14", "urepa_encoder_image_size=518")


def test_text_of_which_only_the_longest_prompt_is_stored_fits_where_the_family_says_so(
    config, tmp_path, monkeypatch
):
    settings = config()
    dataset = open_cache(settings.data, settings.teacher, need_tokens=True)
    family = family_for(settings)
    network = family.load_network()
    dataset.text.null["prompt_embeds"] = dataset.text.null["prompt_embeds"][:20]
    with pytest.raises(
        UserError, match=r"holds prompt_embeds of shape \(20, 32\), .* reads \(77, 32\): run script 4"
    ):
        check_fit(settings.data, family, network, dataset)
    monkeypatch.setattr(type(family), "trimmed_text", {"prompt_embeds": "mask"})
    check_fit(settings.data, family, network, dataset)
    dataset.text.null["prompt_embeds"] = dataset.text.null["prompt_embeds"][:, :16]
    with pytest.raises(UserError, match="holds prompt_embeds of shape"):
        check_fit(settings.data, family, network, dataset)
