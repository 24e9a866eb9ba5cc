"""What a command prints: progress, and one line for an error.

Imports nothing slow.
"""

import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress

from utils import UserError, error_message, is_out_of_memory


class OptionalOutput(io.FileIO):
    """Output that is dropped once its reader has gone."""

    def write(self, data) -> int:
        with suppress(BrokenPipeError):
            return super().write(data)
        return len(data)


class LinesOutput(io.TextIOWrapper):
    """Output for a log instead of a terminal: states of a progress bar are lines."""

    unfinished = ""  # the line so far

    def write(self, text: str) -> int:
        """Write whole lines; a traceback arrives in pieces."""
        *lines, self.unfinished = re.split(r"[\r\n]", self.unfinished + text.replace("\x1b[A", ""))
        for line in lines:
            self.write_line(line)
        return len(text)

    def write_line(self, line: str):
        if line.strip():
            super().write(line.rstrip() + "\n")

    def flush(self):
        """Write the last line too: a progress bar flushes its states."""
        line, self.unfinished = self.unfinished, ""
        self.write_line(line)
        super().flush()


def choose_progress(quiet: bool):
    """Choose bars on a terminal, a line per minute in a log, nothing if quiet.

    Call it before tqdm is imported. Of a launcher's processes one shows progress.
    """
    if quiet or os.environ.get("LOCAL_RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"
    elif sys.stderr is None or not sys.stderr.isatty():
        os.environ.update(
            TQDM_DELAY="60", TQDM_MININTERVAL="60", TQDM_MAXINTERVAL="60", TQDM_NCOLS="100"
        )


def show_step(text: str):
    """Show a line on a terminal during a step that takes seconds; a log needs none."""
    if sys.stderr is None or not sys.stderr.isatty():
        return nullcontext()
    from tqdm import tqdm  # here: it reads what `choose_progress` sets when it is imported

    return tqdm(desc=text, bar_format="{desc} ...", leave=False)


def print_warning(text: str):
    """Print on stderr what does not stop a command."""
    print(f"warning: {text}", file=sys.stderr)


def guard_output():
    """Keep a closed stream, an absent reader or a missing letter from ending the program."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # None: closed
        if stream is getattr(sys, f"__{name}__"):  # no test's
            file = OptionalOutput(
                stream.fileno() if stream else os.devnull, "w", closefd=not stream
            )
            kind = LinesOutput if name == "stderr" and not file.isatty() else io.TextIOWrapper
            setattr(
                sys,
                name,
                kind(
                    io.BufferedWriter(file),
                    stream.encoding if stream else "utf-8",
                    "backslashreplace",
                    line_buffering=True,
                ),
            )


def exit_code(work: Callable[[], None], debug: bool = False) -> int:
    """Do an entry point's work; return 0, or 2 after one line for a user error.

    `debug` also shows the traceback.
    """
    guard_output()
    try:
        work()
    except (UserError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        if debug:
            traceback.print_exc()
        from tqdm import tqdm  # here: it reads what `choose_progress` sets when it is imported

        tqdm.write(f"error: {error_message(error)}", file=sys.stderr)
        return 2
    return 0


def run_script(main: Callable[[], None]):
    """Run a script's `main`; a user error is one line and exit code 2."""
    code = exit_code(main)
    if code:
        sys.exit(code)
