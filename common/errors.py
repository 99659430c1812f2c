"""`UserError`, the one error that is written for the user. Every room may import this; of ours it imports plain text alone.

`UserError` is for what only the user can fix: a wrong path, an unknown key, an incomplete cache. Scripts print it as a
single line. Every other error (a tensor of an unexpected shape, say) is a bug and keeps its traceback.
"""

import signal
import sys
import threading
from collections.abc import Callable

from common.plain_text import printable

# What torch, cuBLAS and cuDNN say, in lower case.
LACK_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
# What the system says, also within what libraries raise that write files themselves; a quota or ulimit is a disk that is full.
NO_SPACE = ("no space left on device", "disk quota exceeded", "file too large")
LONGEST = 600  # characters of a line
ENDING = (signal.SIGTERM, signal.SIGHUP)  # a terminal that is lost sends SIGHUP


class UserError(Exception):
    """A problem that only the user can fix; the message is one line that says what to do."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived where nothing else waits for them."""

    def __init__(self, number: int):
        self.number = number


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    A `UserError`, an error of the file system, or a lack of memory or disk becomes one line on stderr and exit code 2. Ctrl-C,
    SIGTERM and SIGHUP become one line and the exit code that shells give them, 128 and the signal's number.
    """
    for name in ENDING:
        if signal.getsignal(name) is signal.SIG_DFL:  # nohup ignores SIGHUP, and so it stays
            signal.signal(name, _stop)
    threading.excepthook = _say_of_thread
    try:
        main()
    except Exception as error:
        if not is_mendable(error):
            raise
        print(f"error: {complaint(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        by = f" by {signal.Signals(stop.number).name}" if isinstance(stop, Stopped) else ""
        print(f"interrupted{by}; the same command goes on where it stopped", file=sys.stderr)
        raise SystemExit(128 + getattr(stop, "number", signal.SIGINT)) from None


def complaint(error: BaseException) -> str:
    """Return what is wrong and what to do, of an error that `is_mendable`."""
    if isinstance(error, UserError):
        return one_line(error)
    if is_lack_of_memory(error):
        return "memory does not suffice: lower the batch size or the sizes that the command names"
    if is_lack_of_space(error):
        where = getattr(error, "filename", None)
        whose = f" of {where}" if where else ""
        what = next(words for words in NO_SPACE if words in str(error).lower())
        return one_line(f"the disk{whose} is full ({what}): free some, and the same command goes on")
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError) and error.filename:
        place = error.filename if error.filename2 is None else error.filename2
        return one_line(f"{place} is in the way ({error.strerror}): move it away")
    return one_line(error)


def one_line(error: object) -> str:
    """Return a message without line breaks and without characters that a terminal would not show; a long one is cut inside."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 210]} … {text[-200:]}"


def is_lack_of_space(error: BaseException) -> bool:
    """Return whether an error says that a disk is full, whoever raised it."""
    return any(words in str(error).lower() for words in NO_SPACE)


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out: Python's or NumPy's own, or torch's on a GPU or a CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in LACK_OF_MEMORY)


def is_mendable(error: BaseException) -> bool:
    """Return whether the user can mend what an error says: a `UserError`, one of the file system, a lack of memory or disk."""
    return isinstance(error, UserError | OSError) or is_lack_of_memory(error) or is_lack_of_space(error)


def _say_of_thread(failed: threading.ExceptHookArgs) -> None:
    """A library's thread that cannot write ends in silence: whoever waits for it, or writes next, says so."""
    if not is_mendable(failed.exc_value):
        threading.__excepthook__(failed)


def _stop(number: int, _frame) -> None:
    raise Stopped(number)
