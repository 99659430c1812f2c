"""The check of a GPU runs on a CPU at its small size, every part of it, and its proofs can fail."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from small_runs import ROOT

from benchmarks import gpu_check, gpu_proofs, gpu_speed
from common.errors import UserError
from configs.loading import load_config
from training.state import TrainingState


def run(monkeypatch, folder, *arguments) -> int:
    """Run the command; returns its exit code."""
    argv = ["gpu_check.py", "--size", "small", "--dir", folder, "--results", folder, *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    try:
        gpu_check.main()
    except SystemExit as end:
        return end.code
    return 0


# What compiled networks compute, and what is compiled, is shown in test_compile.py too.
COMPILING = (
    gpu_proofs.losses_agree,
    gpu_proofs.one_graph_is_compiled,
    gpu_proofs.every_block_compiles_with_checkpointing,
)


@pytest.mark.parametrize(
    "proofs",
    [
        pytest.param(
            [proof for proof in gpu_proofs.PROOFS if proof not in COMPILING],
            id="most",
        ),
        pytest.param(gpu_proofs.PROOFS, id="all", marks=pytest.mark.thorough),
    ],
)
def test_every_proof_that_a_cpu_can_make_passes(proofs, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_proofs, "PROOFS", proofs)
    assert run(monkeypatch, tmp_path, "--part", "proof") == 0
    found = json.loads((tmp_path / "gpu_check_proof.json").read_text())
    notes = {row["proof"]: row.get("note") for row in found["rows"]}
    assert [name for name, note in notes.items() if note] == [
        "nothing waits for the device", "out of memory is one line",
    ]  # fmt: skip
    proven = {target["what"].partition(":")[0] for target in found["targets"]}
    assert proven == {name for name, note in notes.items() if note is None}
    assert len(proven) == len(proofs) - len(gpu_proofs.NEED_A_GPU)
    assert all(found[name] for name in ("machine", "command", "date"))
    assert not list(tmp_path.glob("benchmark-*"))


def test_what_is_measured_has_rows_and_nothing_breaks_off(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_speed, "STEPS", 1)
    monkeypatch.setattr(gpu_speed, "WINDOWS", 2)
    assert run(monkeypatch, tmp_path, "--part", "speed", "attention") == 0
    speed, attention = (
        json.loads((tmp_path / f"gpu_check_{part}.json").read_text())["rows"]
        for part in ("speed", "attention")
    )
    assert [row["what"] for row in speed] == [
        "sampling", "sampling, network alone", "vae", "dinov2", "step", "step",
    ]  # fmt: skip
    assert all(row["images/s"] > 0 and row["ours / bare"] > 0 for row in speed)
    assert all(row["planned GB"] > 0 for row in speed[-2:])
    assert "attention by math" in {row["what"] for row in attention}
    assert all(row["ms/step"] > 0 for row in attention)


def test_a_step_is_held_against_the_time_of_the_plan():
    row = {"train": "lora", "batch": 48, "compile": "default", "λ": 0.8, "ms/step": 240.0}
    others = [
        row | {"compile": "none", "planned ms": 10.0},
        row,
    ]  # eager, or on a card that the plan does not know
    found = [
        t["pass"]
        for ms in (210.0, 200.0, 290.0)
        for t in gpu_speed.time_targets([row | {"planned ms": ms}, *others])
    ]
    assert found == [True, False, False]


def test_the_plan_of_an_arm_has_its_time_where_the_card_is_known(monkeypatch):
    monkeypatch.setattr(gpu_speed, "card_of", lambda device: "H100")
    monkeypatch.setattr(gpu_speed, "shape_of_latents", lambda config: (4, 64, 64))
    config = load_config(ROOT / "configs" / "A.yaml", ["train.device=cpu"])
    assert 150 < gpu_speed.planned(config)["planned ms"] < 300


def test_a_proof_that_fails_or_breaks_off_ends_with_exit_code_1(tmp_path, monkeypatch):
    def breaks_off(bench):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(
        gpu_proofs, "PROOFS", (breaks_off, gpu_proofs.an_image_alone_is_encoded_as_among_others)
    )
    monkeypatch.setattr(gpu_proofs, "BATCHED", {"cpu": -1.0})
    assert run(monkeypatch, tmp_path, "--part", "proof") == 1
    targets = json.loads((tmp_path / "gpu_check_proof.json").read_text())["targets"]
    assert [target["pass"] for target in targets] == [False] * 3
    assert "RuntimeError: no such thing" in targets[0]["what"]


def test_a_proof_without_time_has_failed(monkeypatch):
    monkeypatch.setattr(gpu_proofs, "free_memory", lambda: None)  # nothing was allocated
    bench = SimpleNamespace(seconds=0, device=torch.device("cpu"))
    _, targets = gpu_proofs.prove(bench)
    assert len(targets) == 7
    assert not any(target["pass"] for target in targets)


def test_a_measurement_that_breaks_off_leaves_the_other_rows(tmp_path, monkeypatch):
    def breaks_off(bench):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(gpu_speed, "sampling_rows", breaks_off)
    monkeypatch.setattr(gpu_speed, "step_rows", lambda bench, ends: [])
    assert run(monkeypatch, tmp_path, "--part", "speed") == 1
    first, *others = json.loads((tmp_path / "gpu_check_speed.json").read_text())["rows"]
    assert "RuntimeError: no such thing" in first["note"]
    assert [row["what"] for row in others] == ["vae", "dinov2"]


def test_waiting_is_an_error_between_two_lines_of_the_log_only(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(TrainingState, "update", lambda state: modes.append(state.step))
    with gpu_proofs.watched_for_waiting(first=2, last=4):
        for step in range(1, 6):
            TrainingState.update(SimpleNamespace(step=step))
    assert modes == [1, 2, "error", 3, 4, "default", 5, "default"]
    with pytest.raises(RuntimeError), gpu_proofs.watched_for_waiting(first=2, last=4):
        raise RuntimeError
    assert modes[-1] == "default"


def test_arms_come_in_order_of_importance_and_those_without_time_are_named(monkeypatch):
    monkeypatch.setattr(gpu_speed, "matmul_rate", lambda device: 1.0)
    bench = SimpleNamespace(size="full", device=torch.device("cpu"), counts={"batch": 48})
    rows = gpu_speed.step_rows(bench, ends=0.0)
    assert len(rows) == 3 * 4 * 2 * 2
    first = {"what": "step", "train": "lora", "batch": 48, "compile": "default", "λ": 0.8}
    assert rows[0] == first | {"note": "left out: no time"}
    assert all(sum(row[key] != first[key] for key in first) == 1 for row in rows[1:8])


@pytest.mark.parametrize(
    ("message", "passed"), [("out of memory: lower it", True), ("out of memory:\nlower it", False)]
)
def test_out_of_memory_must_be_one_line(message, passed):
    def train(*_):
        raise UserError(message)

    bench = SimpleNamespace(train=train, counts={"too_large": 9})
    assert [target["pass"] for target in gpu_proofs.out_of_memory_is_one_line(bench)] == [passed]
    bench.train = lambda *_: None
    with pytest.raises(RuntimeError, match="9 images fitted"):
        gpu_proofs.out_of_memory_is_one_line(bench)
