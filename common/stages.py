"""Run commands in order or side by side, record those that succeed, and skip them the next time."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field

from common.errors import ENDING, UserError
from common.files import write_json
from common.reading import JsonRecord, read_record

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stage:
    """A command of this repository, written without `python`, and the file that the command writes last."""

    name: str
    command: str
    product: Path

    @property
    def pasted(self) -> str:
        return f"python {self.command}"


class StageEntry(JsonRecord):
    """A stage that has finished; `config` is the demo's, and so is `group`, the number of those that ran side by side."""

    stage: str
    command: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    group: NotRequired[int]
    config: NotRequired[str]


class Record:
    """The record of the stages that have finished, kept as a JSON list of {stage, command, seconds, …}."""

    def __init__(self, file: Path):
        self.file = file
        remedy = f"remove {file}: then all stages are looked at again"
        entries = read_record(file, list[StageEntry], remedy) if file.exists() else []
        self.entries = {entry["command"]: entry for entry in entries}

    def of(self, stage: Stage) -> dict | None:
        """Return the entry of a stage's command; None if the command was not recorded or its product no longer exists."""
        return self.entries.get(stage.pasted) if stage.product.exists() else None

    def add(self, stage: Stage, seconds: float, **more) -> None:
        entry = {"stage": stage.name, "command": stage.pasted, "seconds": round(seconds, 1)}
        self.entries[stage.pasted] = entry | more
        write_json(self.file, list(self.entries.values()))


def wall_seconds(entries: Iterable[StageEntry]) -> float:
    """Return how long stages took in all; of a group, which ran side by side, only the longest counts."""
    longest: dict = {}
    for number, entry in enumerate(entries):
        group = entry.get("group", f"stage {number}")
        longest[group] = max(longest.get(group, 0), entry["seconds"])
    return sum(longest.values())


def run_chains(
    chains: Sequence[Sequence[Stage]], *, jobs: int, logs: Path, ended: Callable[[Stage, float], None]
) -> None:
    """Run the stages of each chain in order, `jobs` chains side by side, one thread each.

    A single stage prints to the terminal; several stages write to files in `logs`. `ended(stage, seconds)` is called for each
    stage that succeeded, which means that it returned 0 and its product exists. When a stage fails, or at Ctrl-C or SIGTERM,
    the running stages are asked to stop, and this function waits until they have saved. A failed stage then raises
    `UserError`; Ctrl-C and SIGTERM raise `KeyboardInterrupt`.
    """
    shown = len(chains) == 1 and len(chains[0]) == 1
    live = not shown and sys.stderr.isatty()
    logs.mkdir(parents=True, exist_ok=True)
    log = {stage: None if shown else log_of(stage, logs) for chain in chains for stage in chain}
    waiting = deque(deque(chain) for chain in chains if chain)
    running: dict[Stage, tuple[subprocess.Popen, float, deque[Stage]]] = {}
    # Let both signals raise KeyboardInterrupt.
    before = {name: signal.signal(name, signal.default_int_handler) for name in ENDING}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                chain = waiting.popleft()
                stage = chain.popleft()
                running[stage] = start(stage, log[stage]), time.monotonic(), chain
            time.sleep(0.2)
            if live:
                said = "   ".join(last_line(log[stage]) for stage in running)
                print(f"\r\x1b[K  {len(waiting)} waiting   {said}", end="", file=sys.stderr)
            for stage in [stage for stage, (process, *_) in running.items() if process.poll() is not None]:
                process, started, chain = running.pop(stage)
                if process.returncode or not stage.product.exists():
                    fail(stage, log[stage])
                ended(stage, time.monotonic() - started)
                if chain:
                    waiting.appendleft(chain)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
        if live:
            print("\r\x1b[K", end="", file=sys.stderr)


def start(stage: Stage, log: Path | None) -> subprocess.Popen:
    """Start a stage; its output goes to the terminal, or to its log."""
    output = None if log is None else open(log, "w")  # noqa: SIM115 (the child process keeps it open)
    # Two busy threads on a shared core are slower than one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script, *arguments = shlex.split(stage.command)
    # The child gets a session of its own, so that Ctrl-C reaches only this process, which passes it on once. A second signal
    # would stop the child's saving.
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments], stdout=output, stderr=output, env=environment,
        start_new_session=True, preexec_fn=die_with_parent,
    )  # fmt: skip


def die_with_parent() -> None:
    """On Linux, end this child when its parent is killed, so that it cannot collide with the children of the next parent."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def fail(stage: Stage, log: Path | None) -> None:
    if log is not None:
        print("\n" + log.read_text()[-3000:], flush=True)
    what = f"stage '{stage.name}' did not come to its end ({stage.pasted})"
    raise UserError(f"{what}; once that is mended, the same command goes on")


def log_of(stage: Stage, logs: Path) -> Path:
    return logs / f"{stage.name.replace(' ', '_').replace('/', '_')}.log"


def last_line(log: Path, width: int = 60) -> str:
    """Return the last line of a log that is not empty, or the last state of a progress bar, cut to `width`."""
    said = [line for line in log.read_text().replace("\r", "\n").split("\n") if line.strip()]
    return said[-1].strip()[:width] if said else f"{log.stem} …"
