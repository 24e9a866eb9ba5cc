"""run.py in processes of their own, forked from one that has imported it already: an import takes
seconds.
"""

import multiprocessing
import os
import resource
import sys
import threading
import time
from pathlib import Path

import torch

import run
import runs.evaluation  # noqa: F401  # as run.py does later: they take seconds
import runs.session  # noqa: F401
from system.signals import end_on_signals

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
BARS = ("it/s", "%|", "update/s", "class/s", "image/s")


def run_command(argv: list[str], folder: Path, largest_file: int | None, out, err):
    """What `python run.py` does, on one thread; `largest_file` in bytes is as a full disk."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(folder)
    torch.set_num_threads(1)
    end_on_signals()
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    code = run.main(argv)
    sys.stdout.flush()
    os._exit(code)


class Process:
    """A started run.py, and what it has printed."""

    def __init__(self, argv: list[str], folder: Path, largest_file: int | None = None):
        folder.mkdir(exist_ok=True)
        (out_reader, out), (err_reader, err) = (
            CONTEXT.Pipe(duplex=False),
            CONTEXT.Pipe(duplex=False),
        )
        self.process = CONTEXT.Process(
            target=run_command, args=(argv, folder, largest_file, out, err)
        )
        self.process.start()
        out.close()
        err.close()
        self.printed = {"out": b"", "err": b""}
        self.threads = [
            threading.Thread(target=self.collect_output, args=pair)
            for pair in (("out", out_reader), ("err", err_reader))
        ]
        for thread in self.threads:
            thread.start()

    def collect_output(self, name: str, reader):
        with reader:
            while text := os.read(reader.fileno(), 65536):
                self.printed[name] += text

    def wait_for(self, folder: Path, pattern: str, count: int = 1):
        """Return as soon as there are so many files of this name, while the process works."""
        until = time.monotonic() + 120
        while len(list(folder.rglob(pattern))) < count:
            assert self.process.is_alive() and time.monotonic() < until, self.printed
            time.sleep(0.005)

    def send_signal(self, number: int):
        os.kill(self.process.pid, number)

    def finish(self) -> tuple[int, str, list[str]]:
        """Exit code (negative: killed by that signal), what was printed, and the lines on stderr
        but for bars'.
        """
        self.process.join(300)
        assert self.process.exitcode is not None, self.printed
        for thread in self.threads:
            thread.join()
        out, err = (self.printed[name].decode().replace("\r", "\n") for name in ("out", "err"))
        lines = [line.replace("\x1b[A", "") for line in err.splitlines()]
        return (
            self.process.exitcode,
            out,
            [line for line in lines if line.strip() and not any(sign in line for sign in BARS)],
        )


def finish_run(
    argv: list[str], folder: Path, largest_file: int | None = None
) -> tuple[int, str, list[str]]:
    return Process(argv, folder, largest_file).finish()
