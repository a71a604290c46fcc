"""Asking a training to stop: it saves first."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME = 1.0  # seconds within which launchers and batch systems send one request twice


class StopRequest:
    """Whether, and by which signal, the process was asked to end."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0

    def __call__(self, number: int) -> bool:
        """Take a signal; False: it is a second request."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = number, now
        return now - self._since < _SAME


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take SIGTERM and SIGINT as requests while the body runs; a second one, a second later or more, ends the process
    as it always would.

    Outside the main thread, which alone may take signals, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # what was to be ignored, as nohup and shells have it for jobs in the background, stays so
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def handle(number: int, frame: FrameType | None) -> None:
        if request(number):
            return
        for each, handler in before.items():
            signal.signal(each, handler)
        signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
