"""Ctrl-C and SIGTERM as a request that a loop honours where nothing is lost. Imports nothing of ours."""

import signal


class StopSignal:
    """While entered, SIGTERM and Ctrl-C only set `requested`, for the loop to end where that is safe; a second one stops it."""

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
    """For DataLoader workers: a signal to the whole process group must not end them before the parent has saved."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
