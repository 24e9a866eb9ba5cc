"""One-line errors and atomic file writes. Imports nothing slow: settings are checked with it."""

import difflib
import errno
import importlib
import json
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

# Before torch is imported: waiting threads sleep instead of spinning, which on a busy CPU takes
# many times as long (docs/speed.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Else transformers asks the owners of .bin files to convert them.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

ROOT = Path(__file__).parent
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TOKEN_SUFFIXES = (".safetensors", ".pt", ".bin")
FUNCTION = r"[A-Za-z_]\w*(\.\w+)*:\w+"  # module:function
WITHOUT_GPU_OR_NETWORK = (
    "or try --config configs/miniature.yml, which needs no download, no account and no GPU"
)


class UserError(Exception):
    """A user error; entry points print it as one line and exit with code 2."""


def require(condition, message: str):
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether this is torch's error, by its name: importing torch takes seconds."""
    return type(error).__name__ == "OutOfMemoryError"


def error_message(error: Exception) -> str:
    """Return one line for the user: our message, the system's about a file, or a full memory."""
    if is_out_of_memory(error):
        return (
            "not enough memory on the device: try --mixed_precision bf16, smaller models, "
            "or another --device"
        )
    if isinstance(error, UserError) or error.filename is None:
        return to_printable(str(error))
    message = f"'{error.filename}': {error.strerror}"
    if error.errno in DISK_FULL:
        message += (
            "; free some space: the files on disk are whole, and the command can be given again"
        )
    return to_printable(message)


def broken_file_error(path: Path, reason) -> UserError:
    """Make the error for a file of ours that cannot be read."""
    return UserError(
        f"'{path}' is broken ({join_lines(reason)}): remove it and run the same command again"
    )


def suggest_word(word: str, known: Iterable[str]) -> str:
    """Return a 'did you mean' question if `word` is close to one of `known`, else ''."""
    known = list(known)
    close = difflib.get_close_matches(word, known, 1)
    if not close or word in known:
        return ""
    return f"did you mean '{close[0]}'?"


def to_printable(text: str) -> str:
    """Remove the characters from untrusted text that move a terminal's cursor or end a line.

    A byte of a file name that is not UTF-8, which Python keeps as a surrogate, is shown as \\xe9.
    """
    shown = []
    for letter in text:
        if letter.isprintable():
            shown.append(letter)
        elif "\udc80" <= letter <= "\udcff":
            shown.append(f"\\x{ord(letter) - 0xDC00:02x}")
        else:
            shown.append(" ")
    return "".join(shown)


def join_lines(text) -> str:
    """Put text on one line, with single spaces."""
    return " ".join(str(text).split())


def import_function(reference: str, setting: str) -> Callable[..., Any]:
    """Import the function 'module:function', the value of `setting`.

    Raises:
        UserError: no such module or function, or a module that cannot be imported.
    """
    module_name, _, name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{setting}: no module '{error.name}', which '{reference}' needs"
        ) from error
    except Exception as error:  # a user's module raises what it raises
        reason = f"{type(error).__name__} {join_lines(error)[:200]}"
        raise UserError(
            f"{setting}: module '{module_name}' cannot be imported: {reason}"
        ) from error
    function = getattr(module, name, None)
    require(
        callable(function),
        f"{setting} '{reference}': module '{module_name}' has no function '{name}'",
    )
    return function


@contextmanager
def replace_file(path: Path):
    """Yield a temporary path beside `path`, which takes its place at the end.

    Whatever happens before, `path` stays as it was.
    """
    writer = f"{os.getpid()}.{threading.get_ident()}"  # two may write one file
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


def write_text(path: Path, text: str):
    """Write a text file in UTF-8, atomically.

    Bytes of a file name that are not UTF-8 become \\udce9, which JSON reads back as they were.
    """
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value):
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_yaml(path: Path, value: dict):
    """Write a YAML file, atomically, its keys in their order."""
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
