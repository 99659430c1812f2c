"""The one error that is meant for the user's eyes. Every floor may import it; it imports nothing of ours.

`UserError` is for what only the user can mend: a wrong path, an unknown key, half a cache. Scripts print it as a single
line. Everything else (a shape that contradicts a contract, say) is a bug and keeps its traceback.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something only the user can mend; the message is one line that says what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    A `UserError`, or an error of the file system, becomes one line on stderr and exit code 2; Ctrl-C becomes exit code 130.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:  # no permission, no space, a file where a folder should be
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise SystemExit(130) from None
