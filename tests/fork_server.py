"""Processes that start with every command imported: the imports of torch, diffusers and transformers take six seconds."""

import gc
import importlib
import multiprocessing
import os
import shlex
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent
COMMANDS = ("train", "evaluate", "export", "ablate", "demo")
SCRIPTS = {
    path.name[0]: f"preprocessing.{path.stem}"
    for path in sorted(TESTS.parent.glob("preprocessing/[0-9]_*.py"))  # of two names of script 4 the second
}


def fork_server():
    """The context that starts them, by forks of one server that serves this whole process."""
    # The server imports by the environment's path alone (CPython 3.11).
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["every_import"])
    return context


def context_of(method: str):
    """The context of a start method; that of "forkserver" has its imports done, and shares as little as "spawn"."""
    return fork_server() if method == "forkserver" else multiprocessing.get_context(method)


def collect_rarely() -> None:
    """Let garbage be collected a hundredth as often: modules make many objects and little garbage, a tenth of the time."""
    gc.set_threshold(100_000, 50, 1000)


def work_little() -> None:
    """From here on, place 40 points by t-SNE (800, as users see them, take seconds a picture) and draw 4 samples at once.

    Tests draw two to twenty samples, and on a CPU a forward always has the same rows.
    """
    importlib.import_module("metrics.embedding").TOKENS = 20
    importlib.import_module("method.sampler").CPU_ROWS = 4


def start(command: str, folder: Path, name: str = "", environment: dict[str, str] | None = None):
    """Start a command, as one would type it, with its working folder, in a session of its own.

    What it prints is in the files NAME.out and NAME.err of the folder (`said`).
    """
    process = fork_server().Process(
        target=_run, args=(shlex.split(command), str(folder), name, environment or {})
    )
    process.start()
    return process


def said(folder: Path, name: str = "") -> tuple[str, str]:
    """What a command of `start` has printed: to stdout, and to stderr."""
    out, err = ((folder / f"{name}.{stream}").read_text(errors="replace") for stream in ("out", "err"))
    return out, err


def run_both(command: str, folder: Path) -> list[int | None]:
    """Run a command in two ranks of one group, which print to 0.out, 0.err, 1.out and 1.err; returns their exit codes.

    They start again where they did not find each other, as those of `two_ranks`.
    """
    for last in (False, False, True):
        port = free_port()
        both = [start(command, folder, str(rank), rank_environment(rank, port)) for rank in (0, 1)]
        for process in both:
            process.join(120)
        if last or not any("connectFullMesh" in said(folder, str(rank))[1] for rank in (0, 1)):
            return [process.exitcode for process in both]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, port: int) -> dict[str, str]:
    """What a launcher tells one of two ranks on this machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def _run(words: list[str], folder: str, log: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ |= environment
    for stream, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{log}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    name, *arguments = words
    sys.argv = [str(TESTS.parent / f"{name}.py"), *arguments]
    code = 0
    try:
        from common.errors import run_script

        module = importlib.import_module(SCRIPTS.get(name, name))
        getattr(module, "run_ranks", run_script)(module.main)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def two_ranks(work: Callable, *args: object, clean: Callable[[], object] = lambda: None) -> None:
    """Run `work(rank, *args)` in two processes of this server, which form one gloo group.

    They start again, after `clean`, where they did not find each other, which two groups at once on a machine can bring about.
    """
    from torch.multiprocessing import start_processes
    from torch.multiprocessing.spawn import ProcessRaisedException

    fork_server()
    for last in (False, False, True):
        try:
            start_processes(work, args, nprocs=2, start_method="forkserver")
            return
        except ProcessRaisedException as error:
            if last or "connectFullMesh" not in str(error):
                raise
            clean()
