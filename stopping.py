"""Ctrl-C and SIGTERM: what is in flight is finished first, so that nothing is lost and the same command goes on."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

AT_ONCE = 1.0  # seconds: launchers pass on the signal that their processes have already
_asked: list[tuple[int, float]] = []  # the signal that waits until what is in flight is done, and when it came
_flights: list[str] = []  # what is, innermost last


class Stopped(BaseException):
    """Somebody asked this process to stop; like KeyboardInterrupt no error, and so no Exception."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number  # 130 and 143, as shells count


@contextmanager
def listening() -> Iterator[None]:
    """Within this context SIGINT and SIGTERM raise Stopped: at once, or at the end of what is in flight.

    A second signal, after AT_ONCE, does not wait and ends the process. Works in the main thread alone, as signals do.
    """
    before = {number: signal.signal(number, _hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()
        _flights.clear()


@contextmanager
def in_flight(what: str) -> Iterator[None]:
    """A piece of work that a signal does not interrupt, called `what` in the message.

    Raises:
        Stopped: at its end, where a signal came meanwhile.
    """
    _flights.append(what)
    try:
        yield
    finally:
        _flights.remove(what)
    if _asked:
        raise Stopped(_asked[0][0])


def _hear(number: int, _frame):
    if not _flights:
        raise Stopped(number)
    if _asked and time.monotonic() - _asked[0][1] > AT_ONCE:
        os._exit(128 + number)  # as a kill would: what is on the disk is whole
    if _asked:
        return
    _asked.append((number, time.monotonic()))
    line = f"\n{signal.Signals(number).name}: stopping after {_flights[-1]}; once more to stop at once\n"
    os.write(2, line.encode())  # print may be what was interrupted, and does not take a second call
