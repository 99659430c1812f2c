"""`UserError`, the one error that is written for the user. Every room may import this; of ours it imports plain text alone.

`UserError` is for what only the user can fix: a wrong path, an unknown key, an incomplete cache. Scripts print it as a
single line. Every other error (a tensor of an unexpected shape, say) is a bug and keeps its traceback.
"""

import signal
import sys
from collections.abc import Callable

from common.plain_text import printable

# What torch, cuBLAS and cuDNN say, in lower case.
LACK_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
ENDING = (signal.SIGTERM, signal.SIGHUP)  # a terminal that is lost sends SIGHUP


class UserError(Exception):
    """A problem that only the user can fix; the message is one line that says what to do."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived where nothing else waits for them."""

    def __init__(self, number: int):
        self.number = number


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    A `UserError`, an error of the file system, or a lack of memory becomes one line on stderr and exit code 2. Ctrl-C, SIGTERM
    and SIGHUP become one line and the exit code that shells give them, 128 and the signal's number.
    """
    for name in ENDING:
        if signal.getsignal(name) is signal.SIG_DFL:  # nohup ignores SIGHUP, and so it stays
            signal.signal(name, _stop)
    try:
        main()
    except (UserError, OSError) as error:  # OSError: no permission, no space, a file where a folder should be
        _say(f"error: {one_line(error)}")
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        _say("error: memory does not suffice: lower the batch size or the sizes that the command names")
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        name = signal.Signals(stop.number).name if isinstance(stop, Stopped) else None
        _say(f"interrupted{f' by {name}' if name else ''}; the same command goes on where it stopped")
        raise SystemExit(128 + getattr(stop, "number", signal.SIGINT)) from None


def one_line(error: object) -> str:
    """Return a message without line breaks and without characters that a terminal would not show as they are."""
    return printable(" ".join(str(error).split()))


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out: Python's or NumPy's own, or torch's on a GPU or a CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in LACK_OF_MEMORY)


def is_mendable(error: BaseException) -> bool:
    """Return whether the user can mend what an error says: a `UserError`, one of the file system, or a lack of memory."""
    return isinstance(error, UserError | OSError) or is_lack_of_memory(error)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _stop(number: int, _frame) -> None:
    raise Stopped(number)
