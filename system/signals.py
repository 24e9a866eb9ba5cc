"""Ctrl-C and SIGTERM end a command at once, at the cost of `kill -9`. For entry points."""

import os
import signal
import socket
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ENDING = threading.Lock()  # held by the thread that ends the process


def end_on_signals():
    """End the process at SIGINT and SIGTERM, at once.

    Also inside a call that keeps Python's handlers waiting.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):
        # a child's signals are its own
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    for number in SIGNALS:
        signal.signal(number, end_process)
    threading.Thread(target=wait_for_signal, args=(reader, writer), daemon=True).start()


def wait_for_signal(reader: socket.socket, _writer: socket.socket):
    """End the process at a signal, whose number the system writes.

    Both sockets stay open meanwhile.
    """
    while True:
        (number,) = reader.recv(1)
        if number in SIGNALS:
            end_process(number)


def end_process(number: int, _frame=None):
    """End at once, with one line: every file is whole or not there."""
    if not ENDING.acquire(blocking=False):  # another thread is at it
        return
    try:
        os.write(
            2,
            f"\nstopped by {signal.Signals(number).name}: the same command resumes, or starts over "
            "where --skip_exists is False\n".encode(),
        )
    finally:  # also where nobody reads
        os._exit(128 + number)
