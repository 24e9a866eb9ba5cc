"""Ctrl-C and SIGTERM: what is in flight is finished first, so that nothing is lost and the same command goes on."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AT_ONCE = 1.0  # seconds: launchers pass on the signal that their processes have already
_flight: str | None = None  # what is in flight
_asked: tuple[int, float] | None = None  # the signal that waits for its end, and when it came


class Stopped(BaseException):
    """Somebody asked this process to stop; like KeyboardInterrupt no error, and so no Exception."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number  # 130 and 143, as shells count


def end_quietly():
    """A signal ends this process with one line, while the libraries load and while it goes down."""
    for number in SIGNALS:
        signal.signal(number, _end)


def _end(number: int, _frame):
    os.write(2, f"\nstopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


@contextmanager
def handled_by(handler) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` within this context; in the main thread alone, as Python's signals do."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def listening() -> Iterator[None]:
    """Within this context a signal raises Stopped: at once, or where `heed` is called after what is in flight.

    A second one, after AT_ONCE, does not wait and ends the process.
    """
    global _flight, _asked
    _flight = _asked = None
    with handled_by(_hear):
        yield


@contextmanager
def in_flight(what: str) -> Iterator[None]:
    """A piece of work that a signal does not interrupt, called `what` in the message."""
    global _flight
    _flight = what
    try:
        yield
    finally:
        _flight = None


def heed():
    """Raise Stopped where a signal came while something was in flight."""
    if _asked:
        raise Stopped(_asked[0])


def _hear(number: int, _frame):
    global _asked
    if _asked and time.monotonic() - _asked[1] > AT_ONCE:
        os._exit(128 + number)  # as a kill would: what is on the disk is whole
    if not _flight:
        raise Stopped(number)
    if not _asked:
        _asked = number, time.monotonic()
        line = f"\n{signal.Signals(number).name}: stopping after {_flight}; once more to stop at once\n"
        os.write(2, line.encode())  # print may be what was interrupted, and does not take a second call
