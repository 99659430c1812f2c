"""Commands that are run one after the other or side by side, recorded when they end well, and skipped the next time."""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import write_json

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stage:
    """A command of this repository, without its `python`, and the file that it writes last."""

    name: str
    command: str
    product: Path

    @property
    def pasted(self) -> str:
        return f"python {self.command}"


class Record:
    """Which stages ran to their end: a JSON list of {stage, command, seconds, …}."""

    def __init__(self, file: Path):
        self.file = file
        entries = json.loads(file.read_text()) if file.exists() else []
        self.entries = {entry["command"]: entry for entry in entries}

    def of(self, stage: Stage) -> dict | None:
        """What was recorded of this very command, if what it made is still there."""
        return self.entries.get(stage.pasted) if stage.product.exists() else None

    def add(self, stage: Stage, seconds: float, **more) -> None:
        entry = {"stage": stage.name, "command": stage.pasted, "seconds": round(seconds, 1)}
        self.entries[stage.pasted] = entry | more
        write_json(self.file, list(self.entries.values()))


def run_chains(
    chains: Sequence[Sequence[Stage]], *, jobs: int, logs: Path, ended: Callable[[Stage, float], None]
) -> None:
    """Run the stages of each chain in order, `jobs` chains side by side, one thread each.

    A single stage speaks to the terminal, several to files in `logs`. `ended(stage, seconds)` is called when a stage ended
    well, which means that what it makes is there. One that does not, Ctrl-C and SIGTERM ask the others to stop and wait until
    they have saved; the first raises `UserError`, the others `KeyboardInterrupt`.
    """
    shown = len(chains) == 1 and len(chains[0]) == 1
    live = not shown and sys.stderr.isatty()
    logs.mkdir(parents=True, exist_ok=True)
    waiting = deque(deque(chain) for chain in chains if chain)
    running: dict[Stage, tuple[subprocess.Popen, float, deque[Stage]]] = {}
    # Both raise KeyboardInterrupt.
    before = {
        name: signal.signal(name, signal.default_int_handler) for name in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                chain = waiting.popleft()
                stage = chain.popleft()
                running[stage] = (
                    start(stage, None if shown else log_of(stage, logs)),
                    time.monotonic(),
                    chain,
                )
            time.sleep(0.2)
            if live:
                said = "   ".join(last_line(log_of(stage, logs)) for stage in running)
                print(f"\r\x1b[K  {len(waiting)} waiting   {said}", end="", file=sys.stderr)
            for stage in [stage for stage, (process, *_) in running.items() if process.poll() is not None]:
                process, started, chain = running.pop(stage)
                if process.returncode or not stage.product.exists():
                    fail(stage, None if shown else log_of(stage, logs))
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
    output = None if log is None else open(log, "w")  # noqa: SIM115 (the child keeps it)
    # Two busy threads on a shared core are slower than one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script, *arguments = shlex.split(stage.command)
    # A session of its own: Ctrl-C reaches this process alone, which passes it on once; a second would stop the saving.
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments], stdout=output, stderr=output, env=environment,
        start_new_session=True, preexec_fn=die_with_parent,
    )  # fmt: skip


def die_with_parent() -> None:
    """On Linux: a child does not outlive a parent that was killed, and so cannot collide with the next one."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def fail(stage: Stage, log: Path | None) -> None:
    if log is not None:
        print("\n" + log.read_text()[-3000:], file=sys.stderr)
    raise UserError(
        f"stage '{stage.name}' did not come to its end ({stage.pasted}); once that is mended, the same command goes on"
    )


def log_of(stage: Stage, logs: Path) -> Path:
    return logs / f"{stage.name.replace(' ', '_').replace('/', '_')}.log"


def last_line(log: Path, width: int = 60) -> str:
    """The last thing a stage said, be it a progress bar."""
    said = [line for line in log.read_text().replace("\r", "\n").split("\n") if line.strip()]
    return said[-1].strip()[:width] if said else f"{log.stem} …"
