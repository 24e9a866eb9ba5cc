"""Paths and checkpoints as users write them: found, compared, stamped."""

import os
import re
from contextlib import suppress
from pathlib import Path

from utils import ROOT, require

CHECKPOINT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".json", ".txt"}


def expand_path(text: str, setting: str) -> str:
    """Expand ~ and $VARIABLES in a path, also after a prefix such as 'mean:'.

    Raises:
        UserError: an unknown user or variable, where no file bears that very name.
    """
    prefix, path = re.fullmatch(r"((?:[\w-]+:)*)(.*)", text, re.DOTALL).groups()
    full = os.path.expanduser(path)
    if full.startswith("~"):
        user = path.split("/")[0][1:]
        require(
            os.path.lexists(path),
            f"{setting} '{text}': there is no user '{user}'; ./{path} would be a folder",
        )
    unset = [name for name in re.findall(r"\$\{?(\w+)", full) if name not in os.environ]
    if unset:
        require(os.path.lexists(full), f"{setting} '{text}': the variable ${unset[0]} is not set")
    return prefix + os.path.expandvars(full)


def read_path(text: str) -> Path:
    """Read a path of a command line, with ~ and $VARIABLES expanded."""
    return Path(expand_path(text, "the path"))


def find_path(name: str) -> Path | None:
    """Find `name` as a path from here or from the repository; None if neither exists."""
    for path in (Path(os.path.expanduser(name)), ROOT / name):
        with suppress(OSError, ValueError):  # too long, or with a NUL: not a path
            if path.exists():
                return path
    return None


def check_output_path(path: str):
    """Raise UserError if nothing can be written to `path`, or to the folder it would be in."""
    output = Path(path).absolute()
    for folder in (output, output / "img", output / "pipeline_token"):
        parents = (folder, *folder.parents)
        there = next(parent for parent in parents if os.path.lexists(parent))
        require(there.is_dir(), f"output_path '{path}' cannot be a folder: '{there}' is a file")
        require(
            os.access(there, os.W_OK | os.X_OK),
            f"output_path '{path}': '{there}' may not be written to, or is on a read-only file "
            "system; give another folder",
        )


def split_revision(source: str) -> tuple[str, str | None]:
    """Split 'someone/model@v2' into ('someone/model', 'v2'); existing paths have no revision."""
    place, at, revision = source.rpartition("@")
    if not at or find_path(source):
        return source, None
    return place, revision


def is_same_source(name: str, other: str) -> bool:
    """Return whether two names stand for one checkpoint: one hub id, or two paths of one folder.

    If one of two revisions of a hub id is unknown, it is taken for the other.
    """
    place, revision = split_revision(name)
    other_place, other_revision = split_revision(other)
    if revision and other_revision and revision != other_revision:
        return False
    if place == other_place:
        return True
    path, other_path = find_path(place), find_path(other_place)
    return bool(path and other_path and path.resolve() == other_path.resolve())


def stamp_file(file: Path) -> list:
    """Return a stamp that tells whether a file was replaced: path, size and time of change."""
    found = file.stat()
    return [str(file), found.st_size, found.st_mtime_ns]


def list_checkpoint_files(source: str) -> dict[str, list[int]]:
    """Return {file: [size, time of change]} of a local checkpoint, to notice a replacement.

    Empty for a hub id, whose commit tells.
    """
    folder = find_path(source.removeprefix("local-dir:"))
    if folder is None:
        return {}
    stamps = {}
    for parent, _, names in os.walk(folder, followlinks=True):  # parts may be links to other disks
        for name in names:
            path = Path(parent, name)
            if path.suffix in CHECKPOINT_SUFFIXES:
                stamps[path.relative_to(folder).as_posix()] = stamp_file(path)[1:]
    return dict(sorted(stamps.items()))
