"""`UserError`, the one error that is written for the user. Every room may import this file; it imports nothing of ours.

`UserError` is for what only the user can fix: a wrong path, an unknown key, an incomplete cache. Scripts print it as a
single line. Every other error (a tensor of an unexpected shape, say) is a bug and keeps its traceback.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A problem that only the user can fix; the message is one line that says what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    A `UserError`, or an error of the file system, becomes one line on stderr and exit code 2; Ctrl-C becomes exit code 130.
    """
    try:
        main()
    except (UserError, OSError) as error:  # OSError: no permission, no space, a file where a folder should be
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise SystemExit(130) from None
