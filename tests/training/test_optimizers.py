"""One row for each optimiser: any of them skips a step without a finite gradient, and is restored as it was saved."""

import sys
from typing import get_args

import pytest
import torch
from small_runs import FILES, assert_same_run, equal, stopped_at, tensors, train
from torch.testing._internal.two_tensor import TwoTensor

import train as train_script
from common.errors import UserError
from configs.sections import Optim
from training.optimizers import (
    OPTIMIZERS,
    OptimizerRow,
    build_optimizer,
    flat_state,
    load_flat_state,
    step_unless,
)

OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}


class Odd(torch.optim.Optimizer):
    """Momentum whose state is a number on the host, a list of vectors, and a tensor that wraps two others."""

    def __init__(self, groups, **_):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"count": 0, "flag": None, "pair": TwoTensor(torch.zeros_like(p), p.clone())}
                    state["sums"] = [torch.zeros(p.shape[0]), torch.zeros(3, dtype=torch.float64)]
                state["count"] += 1
                state["pair"].a.mul_(0.9).add_(p.grad)
                state["sums"][0] += p.grad.flatten(1).sum(1)
                state["sums"][1] += p.sum()
                change = state["pair"].a + state["sums"][0].mean() + state["sums"][1][0]
                p -= group["lr"] / state["count"] * change


# As a row of the table would build it; none but the last heeds `found_inf`.
BUILD = {
    "momentum": lambda groups, betas, eps, weight_decay: torch.optim.SGD(
        groups, momentum=betas[0], dampening=0.5, weight_decay=weight_decay
    ),
    "fused momentum": lambda groups, betas, eps, weight_decay: torch.optim.SGD(
        groups, momentum=betas[0], dampening=0.5, fused=True
    ),
    "plain AdamW": lambda groups, **options: torch.optim.AdamW(groups, **options),
    "Adafactor": lambda groups, betas, eps, weight_decay: torch.optim.Adafactor(
        groups, weight_decay=weight_decay
    ),
    "odd": Odd,
}
ROWS = {name: OptimizerRow(build, state_bytes=0) for name, build in BUILD.items()}
ROWS["adamw"] = OPTIMIZERS["adamw"]


@pytest.fixture(params=ROWS)
def row(request, monkeypatch):
    """Another row of the table, by its name."""
    monkeypatch.setitem(OPTIMIZERS, request.param, ROWS[request.param])
    return request.param


def problem(name):
    """Parameters by name, one of them channels last, and their optimiser."""
    torch.manual_seed(0)
    values = {"heads.a": torch.randn(5, 7), "unet.b": torch.randn(4, 6, 3, 3)}
    values["unet.b"] = values["unet.b"].to(memory_format=torch.channels_last)
    parameters = {key: torch.nn.Parameter(value) for key, value in values.items()}
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters.values(), (0.1, 0.01), strict=True)]
    return parameters, build_optimizer(name, [*groups, {"params": [], "lr": 1.0}], **OPTIONS)


def step(parameters, optimizer, number, *, broken=False, only=None):
    """A step from gradients that depend on `number` alone; a broken one holds a NaN."""
    for index, (name, p) in enumerate(parameters.items()):
        if only in (None, name):
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * number + index))
            p.grad = torch.empty_like(p).copy_(drawn)
            if broken:
                p.grad[0] = float("nan")
    step_unless(torch.tensor(broken), optimizer)
    optimizer.zero_grad(set_to_none=True)


def held(parameters, optimizer):
    """Copies of parameters and state by name, numbers as tensors."""
    found, values = flat_state(optimizer, parameters)
    numbers = {name: torch.tensor(float(value or 0)) for name, value in values.items()}
    return {name: t.detach().clone() for name, t in (parameters | found | numbers).items()}


def test_configs_allow_the_rows_of_the_table():
    assert get_args(Optim.model_fields["name"].annotation) == tuple(OPTIMIZERS)
    assert Optim().name == "adamw"


def test_a_name_without_a_row_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"^optim.name = lion .*: choose one of adamw, adamw8bit$"):
        build_optimizer("lion", [], **OPTIONS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_says_how_many_bytes_a_weight_its_state_takes(name):
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    p = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = build_optimizer(name, [{"params": [p], "lr": 1e-2}], **OPTIONS)
    with torch.compiler.set_stance("force_eager"):
        step({"unet.p": p}, optimizer, 0)
    tensors, _ = flat_state(optimizer, {"unet.p": p})
    vectors = sum(t.nbytes for name, t in tensors.items() if not name.endswith(("/step", "/qmap")))
    assert vectors / p.numel() == OPTIMIZERS[name].state_bytes


def test_a_missing_library_is_one_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"^[^\n]*pip install torchao[^\n]*$"):
        problem("adamw8bit")


def test_adamw_is_pytorchs_fused_one_bit_for_bit():
    parameters, optimizer = problem("adamw")
    others, _ = problem("adamw")
    groups = [{"params": [p], "lr": lr} for p, lr in zip(others.values(), (0.1, 0.01), strict=True)]
    reference = torch.optim.AdamW(groups, **OPTIONS, fused=True)
    for number in range(4):
        step(parameters, optimizer, number)
        for p, other in zip(parameters.values(), others.values(), strict=True):
            other.grad = p.grad
        step(others, reference, number)
    assert equal(held(parameters, optimizer), held(others, reference))
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults == reference.defaults


@pytest.mark.parametrize("broken", [{0}, {1}, {0, 1, 4}])
def test_a_step_with_a_nan_leaves_no_trace_in_weights_and_state(row, broken):
    """Also the first one, after which a parameter must be as if it had never had a gradient."""
    parameters, optimizer = problem(row)
    others, reference = problem(row)
    for number in range(6):
        before = held(parameters, optimizer)
        step(parameters, optimizer, number, broken=number in broken)
        if number not in broken:
            step(others, reference, number)
        elif row != "adamw" or 0 not in broken:  # its kernel leaves zeros, which are a state without a step
            assert equal(held(parameters, optimizer), before)
    assert equal(held(parameters, optimizer), held(others, reference))


def test_the_host_waits_for_nothing_where_the_state_is_on_the_device(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "momentum", ROWS["momentum"])
    parameters, optimizer = problem("momentum")
    step(parameters, optimizer, 0)

    def wait(*_):
        raise AssertionError("waited")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    for number, broken in enumerate([True, False], start=1):
        step(parameters, optimizer, number, broken=broken)


def test_a_restored_state_goes_on_as_the_saved_one(row):
    parameters, optimizer = problem(row)
    for number in range(3):
        step(parameters, optimizer, number, only="unet.b")  # heads have no gradient while λ is 0
    saved, values = flat_state(optimizer, parameters)
    saved = {name: t.detach().clone().contiguous() for name, t in saved.items()}
    others, again = problem(row)
    for name, p in others.items():
        p.data.copy_(parameters[name])
    load_flat_state(again, others, saved, dict(values))
    assert equal(held(others, again), held(parameters, optimizer))
    assert others["heads.a"] not in again.state
    for key, value in optimizer.state[parameters["unet.b"]].items():
        assert type(again.state[others["unet.b"]][key]) is type(value)
        if isinstance(value, torch.Tensor):
            assert again.state[others["unet.b"]][key].stride() == value.stride()
    for number in range(3, 6):
        step(parameters, optimizer, number)
        step(others, again, number)
    assert equal(held(others, again), held(parameters, optimizer))


def test_the_state_of_another_optimiser_is_refused(monkeypatch):
    for name in ("momentum", "Adafactor"):
        monkeypatch.setitem(OPTIMIZERS, name, ROWS[name])
    parameters, optimizer = problem("Adafactor")
    step(parameters, optimizer, 0)
    others, other = problem("momentum")
    with pytest.raises(UserError, match=r"another optimiser \(for instance heads.a/.*check optim.name"):
        load_flat_state(other, others, *flat_state(optimizer, parameters))


@pytest.mark.parametrize("name", [pytest.param("momentum", marks=pytest.mark.thorough), "Adafactor"])
def test_a_training_with_any_row_skips_a_nan_and_resumes_exactly(miniature, tmp_path, monkeypatch, name):
    """In the row of adamw, since configs know no other name."""
    monkeypatch.setitem(OPTIMIZERS, "adamw", ROWS[name])
    skips_and_resumes(miniature, tmp_path, monkeypatch)


def test_a_training_with_moments_in_8_bits_skips_a_nan_and_resumes_exactly(miniature, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):  # it compiles one kernel for each shape
        whole = skips_and_resumes(
            miniature, tmp_path, monkeypatch, "optim.name=adamw8bit", "model.train=full"
        )
    stored = tensors(whole, 6, FILES[2])
    assert {t.dtype for name, t in stored.items() if name.endswith("/codes")} == {torch.uint8}


def test_adamw_with_moments_in_8_bits_goes_where_adamw_goes():
    pytest.importorskip("torchao")
    found = {}
    for name in ("adamw", "adamw8bit"):
        p = torch.nn.Parameter(torch.zeros(64, 128))
        optimizer = build_optimizer(name, [{"params": [p], "lr": 1e-2}], **OPTIONS)
        with torch.compiler.set_stance("force_eager"):
            for number in range(10):
                step({"unet.p": p}, optimizer, number)
        found[name] = p.detach()
    assert torch.cosine_similarity(*(p.flatten() for p in found.values()), dim=0) > 0.99
    assert found["adamw8bit"].norm() / found["adamw"].norm() == pytest.approx(1, abs=0.02)


def skips_and_resumes(miniature, tmp_path, monkeypatch, *more):
    knobs = ["train.checkpoint_every=1", "train.keep_checkpoints=10", *more]
    loss_of = train_script.loss_of

    def broken_at_step_4(*args):
        terms = loss_of(*args)
        if step_number[0] == 4:
            terms["loss"] = terms["loss"] * float("nan")
        return terms

    step_number, update = [1], train_script.TrainingState.update

    def update_and_count(state):
        update(state)
        step_number[0] = state.step + 1

    monkeypatch.setattr(train_script, "loss_of", broken_at_step_4)
    monkeypatch.setattr(train_script.TrainingState, "update", update_and_count)
    whole = train(miniature, tmp_path / "whole", *knobs)
    for file in (FILES[0], FILES[2]):
        assert equal(tensors(whole, 3, file), tensors(whole, 4, file)), file
    assert not equal(tensors(whole, 4), tensors(whole, 5))
    step_number[0] = 1
    stopped_at(3, miniature, tmp_path / "run", monkeypatch, *knobs)
    assert_same_run(train(miniature, tmp_path / "run", *knobs), whole)
    return whole
