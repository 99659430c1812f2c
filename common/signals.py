"""Turn Ctrl-C and SIGTERM into a request, so that a loop can save before it ends. This file imports nothing of ours."""

import signal


class StopSignal:
    """Inside the `with`, a first SIGTERM or Ctrl-C only sets `requested`, which the loop checks; a second one interrupts it."""

    requested = False

    def __enter__(self) -> "StopSignal":
        self._before = {name: signal.signal(name, self._request) for name in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _request(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_):
        for name, handler in self._before.items():
            signal.signal(name, handler)


def leave_signals_to_the_parent(_worker: int) -> None:
    """Ignore SIGTERM and Ctrl-C in a DataLoader worker, so that it does not end before its parent has saved."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
