"""Two processes on one machine (gloo), as `accelerate launch` starts them."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands import accelerate_cli
from conftest import demo_overrides
from fork_server import free_port, rank_environment, run_both, said, start, two_ranks
from small_runs import CONFIG, ROOT, assert_same_run, equal, tensors, train

import train as train_script
from cache.order import StepSampler
from training.ranks import Ranks
from training.run_folder import RunFolder
from training.state import TrainingState

KNOBS = ["data.batch_size=2", "train.steps=8", "train.log_every=1"]


def together(work, *args):
    """Run `work(rank, *args)` in two processes of one group."""
    two_ranks(_member, free_port(), work, args)


def _member(rank, port, work, args):
    os.environ |= rank_environment(rank, port)
    torch.set_num_threads(1)
    work(rank, *args)


def train_in_turn(rank, *jobs):
    """Several trainings, each an (argv, note) and perhaps the step after which one rank is told to stop."""
    for job in jobs:
        train_and_note(rank, *job)


def train_and_note(rank, argv, note, stop_at=None):
    """Train; write down the weights that this rank ends with and the seeds it drew from, and stop it when a step is done."""
    states, seeds, update, loss_of = [], [], TrainingState.update, train_script.loss_of

    def loss_of_and_note(parts, batch, generator, *args):
        seeds.append(generator.initial_seed())
        return loss_of(parts, batch, generator, *args)

    def update_and_keep(state):
        update(state)
        states[:] = [state]
        if rank == 1 and state.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    TrainingState.update, train_script.loss_of = update_and_keep, loss_of_and_note
    train_script.AGREE_EVERY = 2
    try:
        train_script.main(argv)
    finally:
        TrainingState.update, train_script.loss_of = update, loss_of
    Path(f"{note}.{rank}.seeds").write_text(" ".join(map(str, seeds)))
    if states:
        torch.save({name: p.detach() for name, p in states[0].parameters.items()}, f"{note}.{rank}.pt")


def arguments(miniature, run, *more):
    return ["--config", str(CONFIG), *demo_overrides(miniature, run, *KNOBS, *more)]


def weights_of(note, rank):
    return torch.load(f"{note}.{rank}.pt", weights_only=True)


# The stop, at step 4, falls between two lines of the log.
WARM_UP = ["align.warmup_steps=3", "train.log_every=3"]
SIMILARITY = [
    "align.similarity_threshold=-0.5", "align.similarity_ema_decay=0.5", "align.threshold_mode=recoverable",
    "align.similarity_every=2",
]  # fmt: skip
SCHEDULES = {
    "warm-up and similarity": [*WARM_UP, *SIMILARITY],
    "warm-up and cutoff": [*WARM_UP, "align.cutoff_step=6"],
    "similarity": SIMILARITY,
}


@pytest.mark.parametrize(
    "schedule",
    [name if "and sim" in name else pytest.param(name, marks=pytest.mark.thorough) for name in SCHEDULES],
)
def test_ranks_stay_equal_where_alignment_comes_and_goes_and_resume_exactly(miniature, tmp_path, schedule):
    """λ is 0 at the first step, or from a step on: heads have no gradient there, which would hang or end other trainers."""
    knobs = [*SCHEDULES[schedule], "align.gather=true", "train.checkpoint_every=100"]
    undisturbed = (arguments(miniature, tmp_path / "whole", *knobs), tmp_path / "whole_weights")
    resumed = (arguments(miniature, tmp_path / "run", *knobs), tmp_path / "run_weights")
    together(train_in_turn, undisturbed, (*resumed, 3), resumed)
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    assert equal(weights_of(tmp_path / "whole_weights", 0), weights_of(tmp_path / "whole_weights", 1))
    assert equal(weights_of(tmp_path / "whole_weights", 0), tensors(whole, 8))
    seeds = [Path(f"{tmp_path}/whole_weights.{rank}.seeds").read_text().split() for rank in (0, 1)]
    assert len(set(seeds[0] + seeds[1])) == 16  # no noise is drawn twice, nor by both
    coeffs = [line["coeff"] for line in whole.metrics()]
    assert 0 in coeffs and max(coeffs) > 0  # noqa: PT018
    assert 4 in run.checkpoint_steps()  # one rank was told to stop after step 3, both did after 4
    assert 4 not in whole.checkpoint_steps()
    assert_same_run(run, whole, 8)


def test_gradients_of_two_ranks_are_those_of_one_process_with_all_their_images(miniature, tmp_path):
    """Without noise of their own; the mean over ranks of the mean over images is the mean over all."""
    together(_gradients, arguments(miniature, tmp_path / "two"), tmp_path / "two", 2)
    _gradients(0, arguments(miniature, tmp_path / "one"), tmp_path / "one", 1)
    two, one = (torch.load(f"{tmp_path / name}.0.pt", weights_only=True) for name in ("two", "one"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-6)


def _gradients(rank, argv, note, world):
    from configs.loading import load_config
    from training.parts import build_parts

    parts = build_parts(load_config([argv[1]], argv[2:]))
    assert parts.ranks.world == world
    state = TrainingState(parts.config, parts.masters, parts.coefficient, parts.ranks, {})
    images = torch.arange(4) if world == 1 else torch.arange(4)[rank::2]
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))[images]
    text, timesteps = torch.zeros(4, 5, 32)[images], torch.tensor([1, 300, 600, 900])[images]
    errors = parts.model.predict(latents, timesteps, {"prompt_embeds": text}).square().flatten(1).mean(1)
    state.backward({"loss": errors.mean()}, images.tolist(), errors)
    state.gradient_mean.finish()
    torch.save({n: p.grad for n, p in state.parameters.items() if p.grad is not None}, f"{note}.{rank}.pt")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_sent_during_backward_are_the_plain_mean_bit_for_bit(miniature, tmp_path, precision):
    """Of two batches a step, heads without a gradient on one rank and weights without one on any: nothing waits for them."""
    knobs = [f"train.precision={precision}", "optim.accumulate=2", "train.channels_last=true"]
    together(_overlapped, arguments(miniature, tmp_path / "run", *knobs))


def _overlapped(rank, argv):
    from configs.loading import load_config
    from training import gradient_mean
    from training.parts import build_parts

    gradient_mean.BUCKET = 2**15  # many buckets, as a large network has
    parts = build_parts(load_config([argv[1]], argv[2:]))
    state = TrainingState(parts.config, parts.masters, parts.coefficient, parts.ranks, {})
    masters, mean = parts.masters.masters, state.gradient_mean
    heads = [n for n, name in enumerate(state.parameters) if name.startswith("heads.")]
    idle = heads[-1]  # without a gradient on both ranks
    parts.masters.working[idle].requires_grad_(False)
    sent = []  # buckets, when backward is over

    def step(backward):
        for n in range(2):
            torch.manual_seed(10 * rank + n)
            latents, text, t = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 32), torch.tensor([1, 600])
            output = parts.model.predict(latents, t, {"prompt_embeds": text}, capture=True).float()
            loss = output.square().mean()
            if rank == 0:
                loss = loss + sum(x.square().mean() for x in parts.model.get_aligned_tokens((4, 4)).values())
            parts.model.clear_hooks()
            backward(loss)
        found = [master.grad for master in masters]
        for master in masters:
            master.grad = None
        return found

    def plain(loss):
        (loss / 2).backward()
        parts.masters.collect()

    expected = step(plain)
    for n, grad in enumerate(expected):
        own = torch.zeros_like(masters[n]) if grad is None else grad
        parts.ranks.sum([own])
        expected[n] = None if n == idle else own / 2

    def overlapped(loss):
        state.backward({"loss": loss}, [0, 1], loss.detach().expand(2))
        sent.append(mean._sent if len(state._losses) == 2 else 0)
        if len(state._losses) == 2:
            mean.finish()
            state._losses.clear()

    for _ in range(2):
        found = step(overlapped)
        assert found[idle] is expected[idle] is None
        for n, (a, b) in enumerate(zip(found, expected, strict=True)):
            if n != idle:
                assert torch.equal(a, b), n
                assert a.stride() == masters[n].stride()
    count = len(mean._buckets)
    assert count > 5
    # The first step shows the order; in the second, backward itself sends all but the last bucket, which waits for the heads.
    assert sent == [0, 0, 0, count - 1]


def launch(monkeypatch, folder, processes: int) -> dict[str, str]:
    """What `accelerate launch` tells a script on a CPU that it is asked to start in so many processes."""
    (folder / "script.py").write_text(
        "import json, os, pathlib, sys\npathlib.Path(sys.argv[1]).write_text(json.dumps(dict(os.environ)))\n"
    )
    words = [
        "accelerate",
        "launch",
        "--cpu",
        "--num_processes",
        processes,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
    ]
    words += ["--dynamo_backend", "no", folder / "script.py", folder / "told.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    accelerate_cli.main()
    return json.loads((folder / "told.json").read_text())


def test_a_launcher_that_starts_one_process_of_two_is_found_out(miniature, tmp_path, monkeypatch):
    """Which is what accelerate does on a CPU, without a word."""
    command = shlex.join(["train_sd15", *arguments(miniature, tmp_path / "run"), "--self-test"])
    alone, pair = (start(command, tmp_path, str(n), launch(monkeypatch, tmp_path, n)) for n in (1, 2))
    for process in (alone, pair):
        process.join(60)
    assert (alone.exitcode, pair.exitcode) == (0, 2)
    assert "started one, as it does where it sees no second GPU: use torchrun" in said(tmp_path, "2")[1]


def by_torchrun(words, folder):
    """Run train_sd15.py by the launcher itself; returns what both ranks print to stdout."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ]
    found = subprocess.run(
        [*command, "train_sd15.py", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def by_fork_server(words, folder):
    """Run it in two ranks with a launcher's environment, without the launcher's and their imports."""
    assert run_both(shlex.join(["train_sd15", *words]), folder) == [0, 0], said(folder, "0")[1]
    return "".join(said(folder, str(rank))[0] for rank in (0, 1))


@pytest.mark.parametrize("launched", [by_fork_server, pytest.param(by_torchrun, marks=pytest.mark.thorough)])
def test_the_launched_script_logs_once_and_refuses_in_one_line(miniature, tmp_path, launched):
    run = tmp_path / "run"
    printed = launched(arguments(miniature, run), tmp_path)
    assert printed.count("self-test") == printed.count("is complete") == 1
    assert "4 images each, 2 processes" in printed
    assert [line["step"] for line in RunFolder(run).metrics()] == list(range(1, 9))
    assert (run / "export" / "ema").is_dir()
    codes = run_both(shlex.join(["train_sd15", *arguments(miniature, run, "optim.lr=0.5")]), tmp_path)
    assert all(codes)
    errors = "".join(said(tmp_path, str(rank))[1] for rank in (0, 1))
    assert errors.count("error: ") == 1
    assert "optim.lr: 0.002 -> 0.5" in errors


def test_a_step_reads_the_same_images_in_whatever_shares(tmp_path):
    def steps(batch, accumulate, world):
        shares = [
            list(
                StepSampler(
                    50,
                    batch_size=batch,
                    seed=3,
                    first_step=2,
                    last_step=9,
                    accumulate=accumulate,
                    ranks=(rank, world),
                )
            )
            for rank in range(world)
        ]
        of_step = [
            [
                i
                for share in shares
                for part in share[step * accumulate : (step + 1) * accumulate]
                for i in part
            ]
            for step in range(7)
        ]
        assert all(len(set(images)) == batch * accumulate * world for images in of_step)
        return [set(images) for images in of_step]

    assert steps(8, 1, 1) == steps(4, 2, 1) == steps(4, 1, 2) == steps(2, 2, 2) == steps(1, 8, 1)


def test_a_run_goes_on_with_another_number_of_ranks_when_a_step_takes_as_many_images(miniature, tmp_path):
    argv = arguments(miniature, tmp_path / "run", "train.steps=4")
    together(train_and_note, argv, tmp_path / "w", 2)
    run = RunFolder(tmp_path / "run")
    assert run.checkpoint_steps()[-1] in (2, 4)
    flags = ["--allow-change", "data.batch_size"]
    alone = train(miniature, run.path, *KNOBS, "train.steps=4", "data.batch_size=4", flags=flags)
    assert [line["step"] for line in alone.metrics()] == [1, 2, 3, 4]


def test_one_process_is_a_group_of_one():
    ranks = Ranks(cpu=True)
    tensor = torch.ones(3)
    ranks.sum([tensor])
    assert (ranks.rank, ranks.world, ranks.main, ranks.gather([1])) == (0, 1, True, [1])
    assert torch.equal(tensor, torch.ones(3))
    assert ranks.on_main(lambda: 5) == 5
    assert ranks.any(True, torch.device("cpu"))
