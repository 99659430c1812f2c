"""Turn Ctrl-C, SIGTERM and SIGHUP into a request, so that a loop can save before it ends. This file imports nothing of ours."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a terminal that is lost sends SIGHUP


class StopSignal:
    """Inside the `with`, a first of the signals only sets `requested`, which the loop checks; a second one interrupts it.

    A signal that was ignored before, as nohup does with SIGHUP, stays ignored.
    """

    requested = False

    def __enter__(self) -> "StopSignal":
        heeded = [name for name in SIGNALS if signal.getsignal(name) is not signal.SIG_IGN]
        self._before = {name: signal.signal(name, self._request) for name in heeded}
        return self

    def _request(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_):
        for name, handler in self._before.items():
            signal.signal(name, handler)


def leave_signals_to_the_parent(_worker: int) -> None:
    """Ignore these signals in a DataLoader worker, so that it does not end before its parent has saved."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
