"""A training killed at random moments, resumed each time by the same command, against an undisturbed one: equal bit for bit?

    OMP_NUM_THREADS=1 python benchmarks/kills.py             # 20 kills, a small network on a CPU, minutes

Kills are SIGKILL, which no process can prepare for, at moments spread from the imports to beyond the next checkpoints.
"""

import importlib
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import torch
from safetensors.torch import load_file

from benchmarks.report import ROOT, benchmark_parser, publish, target, temporary_folder
from benchmarks.synthetic_run import make_synthetic
from training.meter import RATES
from training.run_folder import RunFolder


def main() -> None:
    parser = benchmark_parser(__doc__, kills=(20, "of the training"), steps=(400, "of the training"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    with temporary_folder(args.dir) as folder:
        train = [
            "--config", "configs/A.yaml", *make_synthetic(folder, "small", images=64), f"train.steps={args.steps}",
            "model.train=full", "data.batch_size=8", "optim.accumulate=2", "train.log_every=7", "train.checkpoint_every=20",
            "train.preview_every=0", "align.warmup_steps=30", "align.similarity_threshold=0.9",
        ]  # fmt: skip
        whole, killed = (folder / name for name in ("whole", "killed"))
        # Each process imports anew, and may be killed while it does.
        spawn = multiprocessing.get_context("spawn")
        finish(spawn, [*train, f"run={whole}"])
        steps = list(kill_again_and_again(spawn, [*train, f"run={killed}"], killed, args.kills, args.seed))
        rows = differences(RunFolder(killed), RunFolder(whole))
    rows.append({"what": "kills", "entries": len(steps)})
    print("killed with the newest checkpoint at step", *steps)
    differing = sum(row.get("differing", 0) for row in rows)
    publish(args, rows, [target("entries that differ", float(differing), at_most=0)], killed_at=steps)


def kill_again_and_again(context, argv: Sequence[str], run: Path, kills: int, seed: int) -> Iterator[int]:
    """Start a training, kill it at a random moment, and so on; then let it end. Gives the newest checkpoint at each kill.

    `context` of multiprocessing says how its process starts.
    """
    moments = random.Random(seed)
    for _ in range(kills):
        before = newest(run)
        process, started = start(context, argv), time.monotonic()
        if moments.random() < 0.35:  # while it imports, reads, or tests itself
            time.sleep(moments.uniform(0, 6))
        else:  # after it has gone on
            while newest(run) == before and process.is_alive():
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 0.3 * (time.monotonic() - started)))
        process.kill()
        process.join()
        yield newest(run)
    finish(context, argv)


def start(context, argv: Sequence[str]):
    """A process of its own that trains."""
    process = context.Process(target=_train_quietly, args=(argv,))
    process.start()
    return process


def finish(context, argv: Sequence[str]) -> None:
    """Train to the end, in a process of its own; raises where that fails."""
    process = start(context, argv)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"train.py {' '.join(argv)} failed: run it by hand to see why")


def _train_quietly(argv: Sequence[str]) -> None:
    os.chdir(ROOT)
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    importlib.import_module("train").main(argv)


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=0)


def differences(a: RunFolder, b: RunFolder) -> list[dict]:
    """For each kind of thing two finished runs leave, how many there are and how many differ."""
    rows = []
    for file in ("trained.safetensors", "ema.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(run.newest_checkpoint() / file) for run in (a, b))
        names = ours.keys() | theirs.keys()
        equal = sum(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())
        rows.append({"what": f"tensors of {file}", "entries": len(names), "differing": len(names) - equal})
    lines = [[{k: v for k, v in line.items() if k not in RATES} for line in run.metrics()] for run in (a, b)]
    most, equal = max(map(len, lines)), sum(x == y for x, y in zip(*lines, strict=False))
    rows.append({"what": "lines of metrics.jsonl", "entries": most, "differing": most - equal})
    return rows


if __name__ == "__main__":
    main()
