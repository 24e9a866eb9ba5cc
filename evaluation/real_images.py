"""Real pictures of a class: one folder per class, or a function that draws them."""

import hashlib
import inspect
import random
import re
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from evaluation.class_folders import name_folders
from evaluation.read_image import SUFFIXES, check_images
from prompt_datasets import TargetClass
from system.paths import find_path
from system.tensor_files import save_image
from system.terminal import print_warning
from utils import FUNCTION, UserError, import_function, join_lines, require, to_printable

NAMED = 5  # files that a warning names


def find_real_images(
    source: str,
    classes: list[TargetClass],
    runs: dict[TargetClass, Path],
    count: int,
    cache: Path,
) -> dict[TargetClass, list[Path]]:
    """The real pictures of every class in `runs` {class: the run's folder}.

    `source` is a folder with one folder per class (see `find_in_folder`), or the module:function of
    `plan_drawings`, which plans `count` files. `classes` are all that the classifier knows; the
    folder `cache` remembers which files were readable.

    Raises:
        UserError: neither of both, or a class that it does not have.
    """
    if is_function(source):
        require(
            re.fullmatch(FUNCTION, source),
            f"real_images '{source}' is neither a folder nor module:function",
        )
        return plan_drawings(source, runs, count)
    return find_in_folder(source, classes, list(runs), cache)


def is_function(source: str) -> bool:
    """Return whether `source` names a function, not a folder."""
    return ":" in source and find_path(source) is None


def plan_drawings(
    source: str, runs: dict[TargetClass, Path], count: int
) -> dict[TargetClass, list[Path]]:
    """Name `count` files under each run's folder, which `draw_missing_images` draws later.

    `source` is module:function, a function of a class's label and a random.Random that draws a
    picture.
    """
    name = f"{source.replace(':', '.')}_{find_version(source)}"
    planned = {}
    for target, run in runs.items():
        files = [run / "real" / name / f"{seed}.png" for seed in range(count)]
        if not files[0].exists():
            draw_real_image(source, target, files[0])  # an unknown label is found now
        planned[target] = files
    return planned


def find_version(source: str) -> str:
    """Return what changes when the function `source` draws other pictures.

    The VERSION of its module, or else a digest of the module's source.
    """
    module = inspect.getmodule(import_function(source, "real_images"))
    version = getattr(module, "VERSION", None)
    if version is not None:
        return str(version)
    try:
        code = inspect.getsource(module)
    except (OSError, TypeError) as error:
        raise UserError(
            f"real_images '{source}' has no source code by which to recognise its pictures"
        ) from error
    return hashlib.sha256(code.encode()).hexdigest()[:8]


def find_in_folder(
    source: str, classes: list[TargetClass], targets: list[TargetClass], cache: Path
) -> dict[TargetClass, list[Path]]:
    """Find the readable files, sorted, of these `targets` in a folder with one folder per class."""
    root = find_path(source)
    require(root and root.is_dir(), f"no real_images folder '{source}'")
    allowed = name_folders(root, classes)
    folders, found = {}, {}
    faults: dict[Path, str] = {}
    others: list[Path] = []
    # the bar is closed before an error is printed
    with tqdm(targets, desc="real pictures", unit="class", delay=2) as bar:
        for target in bar:
            folder = find_class_folder(root, target, allowed[target.index])
            files, more = list_pictures(folder)
            broken = check_images(files, cache / f"readable_{target.folder}.json")
            folders[target] = folder
            found[target] = [file for file in files if file not in broken]
            faults |= broken
            others += more
    pictures = len(faults) + sum(len(files) for files in found.values())
    warn_of_skipped(faults, others, pictures)
    for target, files in found.items():
        if files:
            continue
        if folders[target]:
            reason = f"there are none in '{folders[target].name}'"
        else:
            names = " or ".join(f"'{name}'" for name in allowed[target.index])
            reason = f"name their folder {names}"
        raise UserError(f"'{root}' has no readable pictures of class {target.title}: {reason}")
    return found


def find_class_folder(root: Path, target: TargetClass, allowed: list[str]) -> Path | None:
    """Find the one folder of `root` with an allowed name, if any."""
    folders = []
    for name in allowed:
        is_plain_name = "/" not in name and name not in ("", ".", "..")
        if is_plain_name and (root / name).is_dir():
            folders.append(root / name)
    names = " and ".join(f"'{folder.name}'" for folder in folders)
    require(len(folders) < 2, f"'{root}' has two folders of class {target.title}: {names}")
    return folders[0] if folders else None


def list_pictures(folder: Path | None) -> tuple[list[Path], list[Path]]:
    """List the pictures of a folder by suffix, sorted, and its other files except hidden ones."""
    if folder is None:
        return [], []
    pictures, others = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES and path.is_file():
            pictures.append(path)
        else:
            others.append(path)
    return pictures, others


def warn_of_skipped(faults: dict[Path, str], others: list[Path], pictures: int):
    """Name and count, in one line, pictures that cannot be read and files that are no pictures."""
    parts = []
    if faults:
        named = [f"{quote_path(file)} ({fault})" for file, fault in list(faults.items())[:NAMED]]
        parts.append(
            f"{len(faults)} of {pictures} real pictures, which cannot be read: {', '.join(named)}"
        )
    if others:
        named = [quote_path(file) for file in others[:NAMED]]
        parts.append(f"{len(others)} that are no pictures by their suffix: {', '.join(named)}")
    if parts:
        print_warning("skipped " + "; and ".join(parts))


def quote_path(path: Path) -> str:
    """Quote a path for a message."""
    return f"'{to_printable(str(path))}'"


def draw_missing_images(source: str | None, target: TargetClass, files: list[Path]) -> list[Path]:
    """Return `files`; missing ones are drawn if `source` is a function."""
    missing = [file for file in files if not file.exists()]
    for file in tqdm(missing, desc="drawing real pictures", unit="image", disable=not missing):
        save_image(draw_real_image(source, target, file), file)
    return files


def draw_real_image(source: str, target: TargetClass, file: Path) -> Image.Image:
    """Draw a class with the function `source`, which gets its label.

    Its number may belong to another list.

    Raises:
        UserError: whatever the function raises, such as a LookupError for an unknown label.
    """
    draw_image = import_function(source, "real_images")
    try:
        return draw_image(target.label, random.Random(f"{target.index} {file.stem}"))
    except Exception as error:  # a user's function raises what it raises
        raise UserError(
            f"real_images '{source}' cannot draw class {target.title} by its label "
            f"'{target.label}': {type(error).__name__} {join_lines(error)[:200]}; give "
            "--real_images none, or a folder or a function that has it"
        ) from error
