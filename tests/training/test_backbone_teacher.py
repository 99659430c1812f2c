"""A deeper block of the network as the teacher: detached, in the same forward, without a cache and an encoder."""

import pytest
import torch
import torch.nn.functional as F
from conftest import demo_overrides
from peft import LoraConfig
from small_runs import assert_same_run, stopped_at, train

import train as train_script
from common.errors import UserError
from configs.loading import load_config
from evaluation.heldout import heldout_images
from method.alignment import token_loss
from method.objective import Objective
from miniature.families import make_pipeline
from models.aligned import AlignedModel
from models.families.table import family_of
from models.taps import Taps
from training.parts import build_parts, check_neighbours
from training.plan import print_plan
from training.run_folder import RunFolder

CONFIG = "configs/demo.yaml"
OWN = ["teacher.source=backbone", "teacher.block=dec_first", "data.tokens=null"]
TAPS = {"sd3": ("block0", "block1"), "sdxl": ("mid", "dec_first")}
CPU = torch.device("cpu")


def config_of(miniature, run, *more):
    return load_config(CONFIG, demo_overrides(miniature, run, *OWN, *more))


@pytest.fixture(params=TAPS)
def taught(request, tmp_path):
    """A transformer and a U-Net: (model, x_t, t, text, path of the teacher's block)."""
    make_pipeline(request.param, tmp_path / "base")
    family = family_of(str(tmp_path / "base"))
    tap, block = TAPS[request.param]
    model = AlignedModel(
        family, family.load_network(), [tap], 7, teacher_block=block, head="linear", train="full"
    ).train()
    shape = family.latent_shape(model.backbone)
    x_t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    path = family.path(shape)
    return (
        model,
        path,
        x_t,
        family.encode_text(["a one", "a two"], CPU),
        family.tap(model.backbone, block).path,
    )


def test_the_teacher_is_what_the_block_puts_out_and_heads_map_to_its_width(taught):
    model, path, x_t, text, place = taught
    with torch.no_grad():
        expected = model.predict(x_t, path.spread(2), text)
        block = Taps(model.backbone, {"t": model.family.tap(model.backbone, model.teacher_block)})
        with block.recording():
            assert model.predict(x_t, path.spread(2), text, capture=True).equal(expected)
        feature = model.family.features(block.captured["t"], x_t.shape, text, model.teacher_block)
        tokens, grid = model.get_teacher_tokens()
        (x,) = model.get_aligned_tokens((1, 1)).values()  # the block's grid is taken
    assert place == model.taps.paths[model.teacher_block]
    assert grid == feature.shape[2:]
    torch.testing.assert_close(tokens, F.normalize(feature.flatten(2).transpose(1, 2).float(), dim=-1))
    assert x.shape == tokens.shape


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_reaches_the_teachers_block(taught, checkpointing):
    model, path, x_t, text, place = taught
    if checkpointing:
        model.family.checkpoint(model.backbone)
    terms = Objective(path, align_coeff=1.0, manifold_coeff=0)(
        model, x_t, None, text, generator=torch.Generator().manual_seed(0)
    )
    assert terms["loss_token"] > 0
    terms["loss_align"].backward()
    behind = dict(model.backbone.get_submodule(place).named_parameters())
    assert behind
    assert all(p.grad is None or not p.grad.any() for p in behind.values())
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.heads.parameters())
    assert not model.taps.captured


def test_the_loss_is_that_towards_constant_tokens(taught):
    model, path, x_t, text, _ = taught
    model.predict(x_t, path.spread(2), text, capture=True)
    teacher, grid = model.get_teacher_tokens()
    assert not teacher.requires_grad
    (x,) = model.get_aligned_tokens(grid).values()
    own = Objective(path, align_coeff=1.0, manifold_coeff=0).alignment({"t": x}, teacher, grid)
    assert own["loss_align"].equal(token_loss(x, teacher))


@pytest.mark.parametrize(
    ("tap", "block", "said"),
    [
        ("block1", "block1", "must lie behind the tap block1"),
        ("block1", "block0", "must lie behind the tap block1"),
        ("block0", "block9", "teacher.block has 'block9'"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_line(tmp_path, tap, block, said):
    make_pipeline("sd3", tmp_path / "base")
    family = family_of(str(tmp_path / "base"))
    with pytest.raises(UserError, match=said):
        AlignedModel(
            family, family.load_network(), [tap], 7, teacher_block=block, lora=LoraConfig(), head="linear"
        )


def test_a_training_needs_no_tokens_and_is_compared_with_an_outside_teacher_of_held_out_images(
    miniature, tmp_path, capsys
):
    overrides = demo_overrides(miniature, tmp_path / "run", *OWN, "align.manifold=relation")
    train_script.main(["--config", CONFIG, *overrides])
    said = capsys.readouterr().out
    assert "dec_first of the network itself, (4, 64), without gradient" in said
    assert "cells reached 100%" in said
    run = RunFolder(tmp_path / "run")
    lines = run.metrics()
    assert all(0 < line["loss_token"] < 2 and line["loss_manifold"] > 0 for line in lines)
    held = heldout_images(run.config)
    assert held.teacher.shape == (len(held.latents), 16, 64)
    bare = run.config.model_copy(update={"eval": run.config.eval.model_copy(update={"tokens": None})})
    with pytest.raises(UserError, match=r"eval\.tokens, those of an outside teacher"):
        heldout_images(bare)


def test_a_stopped_training_goes_on_bit_for_bit(miniature, tmp_path, monkeypatch):
    own = [*OWN, "align.similarity_threshold=0.99", "align.similarity_ema_decay=0.5"]
    unbroken = train(miniature, tmp_path / "unbroken", *own)
    stopped_at(3, miniature, tmp_path / "stopped", monkeypatch, *own)
    assert_same_run(unbroken, train(miniature, tmp_path / "stopped", *own))


def test_the_plan_counts_neither_an_encoder_nor_a_cache_of_tokens(miniature, tmp_path, capsys):
    print_plan(config_of(miniature, tmp_path / "run"))
    said = capsys.readouterr().out
    assert "latents " in said
    assert "tokens " not in said
    assert "online teacher" not in said


def test_lambda_0_listens_to_no_block(miniature, tmp_path):
    parts = build_parts(config_of(miniature, tmp_path / "run", "align.coeff=0"))
    assert parts.model.teacher_block is None
    assert not parts.model.taps.paths


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["teacher.block=null"], "needs teacher.block"),
        (["teacher.source=cached"], "teacher.block is for"),
        (["teacher.decoder=x"], "teacher.decoder is for"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(miniature, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        config_of(miniature, tmp_path / "run", *more)


@pytest.mark.parametrize(
    ("shape", "neighbours", "said"),
    [
        ((4, 8, 8), 1, "of images"),
        ((4, 5, 8, 8), 5, "5 frames"),
        ((4, 1, 8, 8), 1, "of images"),
        ((4, 5, 8, 8), 4, None),
    ],
)
def test_neighbours_that_no_frame_has_are_refused(miniature, tmp_path, shape, neighbours, said):
    align = config_of(miniature, tmp_path / "run", f"align.neighbours={neighbours}").align
    if said is None:
        check_neighbours(align, shape)
        return
    with pytest.raises(UserError, match=said):
        check_neighbours(align, shape)
