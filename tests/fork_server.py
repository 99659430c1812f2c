"""Processes that start with every command imported: the imports of torch, diffusers and transformers take six seconds."""

import multiprocessing
import os
from pathlib import Path

TESTS = Path(__file__).parent
COMMANDS = ("train", "evaluate", "export", "ablate", "demo")
SCRIPTS = {
    path.name[0]: f"preprocessing.{path.stem}" for path in TESTS.parent.glob("preprocessing/[0-9]_*.py")
}


def fork_server():
    """The context that starts them, by forks of one server that serves this whole process."""
    # The server imports by the environment's path alone (CPython 3.11).
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["every_import"])
    return context
