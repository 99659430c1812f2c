"""What may go wrong in a long training: values that are not finite, damaged checkpoints, changed settings, kills."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import demo_overrides
from fork_server import fork_server
from small_runs import CONFIG, FILES, assert_same_run, equal, stop_after, stopped_at, tensors, train

import export
import train as train_script
from benchmarks.kills import differences, kill_again_and_again
from cache.dataset import AlignedDataset
from common.errors import UserError
from training import checkpoint
from training.guard import Guard
from training.run_folder import RunFolder


def poison(monkeypatch, batches):
    """Let one image of the given batches (counted from 0 in a process) be NaN; returns the ids that were poisoned."""
    monkeypatch.setattr(train_script, "self_test", lambda *_, **__: None)  # would find it
    read, poisoned, count = AlignedDataset.read_batch, [], iter(range(10**6))

    def read_and_poison(dataset, indices, raw):
        read(dataset, indices, raw)
        if next(count) in batches:
            raw["latent"][1].view(torch.float16).fill_(float("nan"))
            poisoned.append(dataset.ids[indices[1]])

    monkeypatch.setattr(AlignedDataset, "read_batch", read_and_poison)
    return poisoned


ONE_READER = ["data.read_threads=0", "train.checkpoint_every=1", "train.keep_checkpoints=10"]


def test_a_step_with_a_nan_changes_nothing_and_names_the_image(miniature, tmp_path, monkeypatch, capsys):
    poisoned = poison(monkeypatch, {3})
    run = train(
        miniature,
        tmp_path / "run",
        *ONE_READER,
        "align.similarity_threshold=0.99",
        "align.similarity_ema_decay=0.5",
    )
    for file in (FILES[0], FILES[2]):
        assert equal(tensors(run, 3, file), tensors(run, 4, file))
    assert not equal(tensors(run, 4), tensors(run, 5))
    (line,) = run.skipped.read()
    assert line == {"step": 4, "loss_finite": False, "images": poisoned}
    assert len(poisoned) == 1
    assert all(value == value for line in run.metrics() for value in line.values())
    assert [line.get("skipped") for line in run.metrics()] == [None, 1, 1]
    assert "skipped.jsonl" in capsys.readouterr().out


def test_what_was_skipped_is_remembered_after_a_stop(miniature, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, {2, 3})
        stop_after(patch, 4)
        train(miniature, tmp_path / "run", *ONE_READER)
    with monkeypatch.context() as patch:
        poison(patch, {0})
        with pytest.raises(UserError, match="the last 3 steps"):
            train(miniature, tmp_path / "run", *ONE_READER, "train.max_skipped=3")
    run = train(miniature, tmp_path / "run", *ONE_READER)
    assert [line["step"] for line in run.skipped.read()] == [3, 4]
    assert run.metrics()[-1]["skipped"] == 2


def test_a_gradient_that_is_not_finite_blames_the_whole_batch(miniature, tmp_path, monkeypatch):
    loss_of, steps = train_script.loss_of, iter(range(10**6))

    def explode(*args):
        terms = loss_of(*args)
        if next(steps) == 2:
            zero = terms["loss"] - terms["loss"].detach()
            terms["loss"] = terms["loss"] + zero.sqrt()  # whose slope at 0 is infinite
        return terms

    monkeypatch.setattr(train_script, "loss_of", explode)
    run = train(miniature, tmp_path / "run", *ONE_READER)
    assert equal(tensors(run, 2), tensors(run, 3))
    (line,) = run.skipped.read()
    assert line["loss_finite"]
    assert len(line["images"]) == 4


def test_too_many_in_a_row_end_the_training_and_leave_the_checkpoint(miniature, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(2, 100)))
    knobs = ["data.read_threads=0", "train.max_skipped=3", "train.steps=20"]
    with pytest.raises(UserError, match=r"the last 4 steps .*skipped\.jsonl"):
        train(miniature, tmp_path / "run", *knobs)
    run = RunFolder(tmp_path / "run")
    assert run.checkpoint_steps() == [
        2,
        4,
    ]  # of step 4, after two skipped ones, it is as good as that of step 2
    assert equal(tensors(run, 2), tensors(run, 4))
    assert [line["step"] for line in run.skipped.read()] == [3, 4, 5, 6]


def test_a_guard_counts_in_a_row_and_starts_anew_after_a_good_step():
    guard = Guard(limit=2)
    for step, norm in enumerate([1.0, float("nan"), 1.0, float("inf")], start=1):
        guard.judge(step, torch.tensor(norm), torch.tensor(norm), [7, 8], torch.tensor([1.0, float("nan")]))
    assert [line["step"] for line in guard.report()] == [2, 4]
    assert (guard.skipped, guard.in_a_row, guard.report()) == (2, 1, [])
    guard.check(Path("log"))
    guard.judge(5, torch.tensor(float("nan")), torch.tensor(1.0), [7, 8], torch.tensor([1.0, 1.0]))
    assert guard.report() == [{"step": 5, "loss_finite": True, "images": [7, 8], "broken": []}]
    with pytest.raises(UserError, match="last 2 steps"):
        guard.check(Path("log"))


def test_of_several_ranks_only_the_broken_images_are_blamed():
    fine = {"loss_finite": True, "images": ["a", "b"], "broken": []}
    ill = {"loss_finite": False, "images": ["c", "d"], "broken": ["d"]}
    found = Guard.merged([{"step": 3} | fine, {"step": 5} | fine, {"step": 3} | ill, {"step": 5} | fine])
    assert found == [
        {"step": 3, "loss_finite": False, "images": ["d"]},
        {"step": 5, "loss_finite": True, "images": ["a", "b", "a", "b"]},
    ]


@pytest.fixture(scope="module")
def unbroken(miniature, tmp_path_factory):
    return train(miniature, tmp_path_factory.mktemp("safety") / "unbroken")


def flip_a_bit(file):
    """In the middle of a tensor, which every library would read."""
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "flipped": lambda folder: flip_a_bit(folder / "optimizer.safetensors"),
    "short": lambda folder: (folder / "ema.safetensors").write_bytes(
        (folder / "ema.safetensors").read_bytes()[:-99]
    ),
    "missing": lambda folder: (folder / "trained.safetensors").unlink(),
    "state cut": lambda folder: (folder / "state.json").write_text((folder / "state.json").read_text()[:-99]),
    "state edited": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"ema_step": 4', '"ema_step": 3')
    ),
    "state null": lambda folder: (folder / "state.json").write_text("null"),
    "state missing": lambda folder: (folder / "state.json").unlink(),
    "renamed": lambda folder: folder.rename(folder.with_name("step-0000005")),
}


def killed_after_4(unbroken, folder, damage) -> RunFolder:
    """A run as a kill between its checkpoints of steps 4 and 6 leaves it, with damage to that of step 4."""
    run = RunFolder(shutil.copytree(unbroken.path, folder))
    shutil.rmtree(run.checkpoint_folder / "step-0000006")
    DAMAGES[damage](run.checkpoint_folder / "step-0000004")
    shutil.copytree(run.checkpoint_folder / "step-0000002", run.checkpoint_folder / "step-0000002-mine")
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(unbroken, tmp_path, capsys, damage):
    run = killed_after_4(unbroken, tmp_path / "run", damage)
    assert checkpoint.newest_whole(run.checkpoint_folder).name == "step-0000002"
    assert f"step-000000{5 if damage == 'renamed' else 4} is damaged" in capsys.readouterr().out
    assert run.checkpoint_steps() == [2]


def test_a_run_whose_newest_checkpoint_is_damaged_equals_the_undisturbed_one(
    miniature, unbroken, tmp_path, capsys
):
    run = killed_after_4(unbroken, tmp_path / "run", "flipped")
    resumed = train(miniature, run.path)
    assert "steps 2 to 6" in capsys.readouterr().out
    assert_same_run(resumed, unbroken)
    assert resumed.checkpoint_steps() == [2, 4, 6]


def test_a_run_without_a_whole_checkpoint_does_not_start_anew(miniature, unbroken, tmp_path):
    run = RunFolder(shutil.copytree(unbroken.path, tmp_path / "run"))
    for step in run.checkpoint_steps():
        flip_a_bit(run.checkpoint_folder / f"step-{step:07d}" / "trained.safetensors")
    before = run.metrics()
    for _ in range(2):  # also when the command is repeated
        with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
            train(miniature, run.path)
    assert run.metrics() == before
    assert run.checkpoint_steps() == [2, 4, 6]


def test_a_disk_that_cannot_be_read_for_now_is_no_damage(miniature, unbroken, tmp_path, monkeypatch):
    run = RunFolder(shutil.copytree(unbroken.path, tmp_path / "run"))

    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "fingerprint", fail)
    with pytest.raises(UserError, match="Input/output error; nothing was"):
        train(miniature, run.path)
    assert run.checkpoint_steps() == [2, 4, 6]


def test_damaged_weights_are_not_used_elsewhere(miniature, unbroken, tmp_path):
    run = RunFolder(shutil.copytree(unbroken.path, tmp_path / "run"))
    flip_a_bit(run.checkpoint_folder / "step-0000006" / "ema.safetensors")
    with pytest.raises(UserError, match=r"step-0000006 is damaged \(ema"):
        train(miniature, tmp_path / "new", flags=["--init-from", str(run.path)])
    with pytest.raises(UserError, match=r"step-0000006 is damaged \(ema"):
        export.main([str(run.path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (run.checkpoint_folder / "step-0000004" / "state.json").write_text("null")
    with pytest.raises(UserError, match=r"step-0000004 is damaged \(state"):
        export.main([str(run.path), "--checkpoint", "4"])


def test_what_a_crash_left_in_the_log_does_not_stop_a_run(miniature, unbroken, tmp_path):
    run = RunFolder(shutil.copytree(unbroken.path, tmp_path / "run"))
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'\0\0\0\n{"step": 7, \n"half\n[1]\n')
    assert run.metrics() == unbroken.metrics()
    train(miniature, run.path)
    assert (run.path / "metrics.jsonl").read_text() == (unbroken.path / "metrics.jsonl").read_text()


def test_some_checkpoints_are_kept_for_good(miniature, tmp_path):
    run = train(
        miniature, tmp_path / "run", "train.checkpoint_every=1", "train.keep_checkpoints=1", "train.keep_every=2",
    )  # fmt: skip
    assert run.checkpoint_steps() == [2, 4, 6]


def test_a_changed_setting_is_refused_with_its_name_and_taken_by_its_name(miniature, tmp_path, monkeypatch):
    run = stopped_at(2, miniature, tmp_path / "run", monkeypatch)
    with pytest.raises(UserError, match=r"optim.lr: 0.002 -> 0.1.*--allow-change optim.lr"):
        train(miniature, run.path, "optim.lr=0.1")
    with pytest.raises(UserError, match=r"align.coeff: 0.8 -> 0.1.*--allow-change align.coeff$"):
        train(miniature, run.path, "optim.lr=0.1", "align.coeff=0.1", flags=["--allow-change", "optim.lr"])
    changed = train(miniature, run.path, "optim.lr=0.1", flags=["--allow-change", "optim.lr"])
    assert changed.config.optim.lr == 0.1
    (note,) = json.loads((run.path / "run.json").read_text())["changes"]
    assert (note["from_step"], note["changed"]) == (2, ["optim.lr: 0.002 -> 0.1"])
    assert len(changed.commands()) == 2


def test_an_allowed_change_takes_effect_and_a_refused_one_leaves_no_trace(miniature, tmp_path, monkeypatch):
    knobs = ["train.steps=8", "train.log_every=1"]
    run = stopped_at(4, miniature, tmp_path / "run", monkeypatch, *knobs)
    before = {name: (run.path / name).read_text() for name in ("config.yaml", "run.json")}
    for setting, message in (
        ("data.batch_size=6", "took 4 images a step"),
        ("train.steps=3", "is at step 4 already, beyond train.steps=3"),
        ("model.train=partial", "was written by another model"),
    ):
        allow = ["--allow-change", setting.partition("=")[0]]
        with pytest.raises(UserError, match=message):
            train(miniature, run.path, *knobs, setting, flags=allow)
    assert before == {name: (run.path / name).read_text() for name in before}
    more = ["optim.lr=1e-4", "align.similarity_threshold=0.9", "align.similarity_ema_decay=0.5"]
    allow = [word for knob in more for word in ("--allow-change", knob.partition("=")[0])]
    train(miniature, run.path, *knobs, *more, flags=allow)
    fresh = train(miniature, tmp_path / "fresh", *knobs, "optim.lr=1e-4")
    assert [line["lr"] for line in run.metrics()[4:]] == [line["lr"] for line in fresh.metrics()[4:]]


def test_other_images_under_the_same_name_are_refused(miniature, tmp_path, monkeypatch):
    samples = tmp_path / "list.csv"
    lines = (miniature / "train.csv").read_text().splitlines(keepends=True)
    samples.write_text("".join(lines))
    run = stopped_at(2, miniature, tmp_path / "run", monkeypatch, f"data.csv={samples}")
    samples.write_text("".join(lines[:-1]))
    with pytest.raises(
        UserError, match=rf"trained on {len(lines) - 1} images, now there are {len(lines) - 2}"
    ):
        train(miniature, run.path, f"data.csv={samples}")
    train(miniature, run.path, f"data.csv={samples}", flags=["--allow-change", "data.csv"])
    (note,) = json.loads((run.path / "run.json").read_text())["changes"]
    assert note["changed"] == [f"data: {len(lines) - 1} images, now there are {len(lines) - 2}, or others"]


def test_another_number_of_images_a_step_is_refused(miniature, tmp_path, monkeypatch):
    run = stopped_at(2, miniature, tmp_path / "run", monkeypatch)
    allow = ["--allow-change", "data.batch_size", "--allow-change", "optim.accumulate"]
    with pytest.raises(UserError, match="took 4 images a step, now it would be 6 on 1"):
        train(miniature, run.path, "data.batch_size=6", flags=allow)
    train(miniature, run.path, "data.batch_size=2", "optim.accumulate=2", flags=allow)


@pytest.mark.parametrize("source", ["run", "checkpoint", "file"])
def test_a_new_run_starts_from_the_weights_of_another(miniature, unbroken, tmp_path, monkeypatch, source):
    where = {
        "run": unbroken.path,
        "checkpoint": unbroken.checkpoint_folder / "step-0000004",
        "file": unbroken.checkpoint_folder / "step-0000004" / "trained.safetensors",
    }[source]
    expected = tensors(unbroken, 6 if source == "run" else 4, FILES[0 if source == "file" else 1])
    seen = {}
    monkeypatch.setattr(
        train_script, "self_test", lambda parts, **_: seen.update(
            {name: p.detach().clone() for name, p in parts.model.trained_parameters().items()}
        ),
    )  # fmt: skip
    train(miniature, tmp_path / "run", "train.steps=1", flags=["--init-from", str(where)])
    assert equal(seen, expected)


def test_weights_of_another_kind_or_from_nowhere_are_refused(miniature, unbroken, tmp_path):
    for more, message in (
        (["model.train=lora", "model.lora_rank=4"], "holds other weights than model.train=lora trains"),
        (["model.train=partial"], "holds other weights than model.train=partial trains"),
    ):
        with pytest.raises(UserError, match=message):
            train(miniature, tmp_path / "run", *more, flags=["--init-from", str(unbroken.path)])
    lora = ["model.train=lora", "model.lora_rank=4", "train.steps=1"]
    other = train(miniature, tmp_path / "lora", *lora, "model.lora_alpha=8")
    with pytest.raises(UserError, match=r"trained with model\.lora_alpha=8"):
        train(
            miniature, tmp_path / "run", *lora, "model.lora_alpha=80", flags=["--init-from", str(other.path)]
        )
    with pytest.raises(UserError, match="is no run, no checkpoint"):
        train(miniature, tmp_path / "run", flags=["--init-from", str(tmp_path)])
    # A baseline may start from an aligned run: its heads stay behind.
    train(
        miniature,
        tmp_path / "run",
        "align.coeff=0",
        "train.steps=1",
        flags=["--init-from", str(unbroken.path)],
    )


def test_a_run_killed_at_random_moments_equals_the_undisturbed_one(miniature, tmp_path):
    """The long form is benchmarks/kills.py."""
    knobs = ["train.steps=15", "train.checkpoint_every=5", "train.log_every=3"]
    whole = train(miniature, tmp_path / "whole", *knobs)
    overrides = demo_overrides(miniature, tmp_path / "run", *knobs)
    argv = ["--config", str(CONFIG), *overrides]
    steps = list(kill_again_and_again(fork_server(), argv, tmp_path / "run", kills=2, seed=0))
    assert steps == sorted(steps)
    run = RunFolder(tmp_path / "run")
    assert_same_run(run, whole, 15)
    assert not any(row["differing"] for row in differences(run, whole))
