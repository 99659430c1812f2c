"""Processes that start with every command imported: the imports of torch, diffusers and transformers take six seconds."""

import multiprocessing
import os
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
