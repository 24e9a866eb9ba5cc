"""Real pictures of a class: one folder per class, or a world that draws its own."""

import hashlib
import inspect
import random
import re
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from evaluation.class_folders import name_folders
from evaluation.read_image import SUFFIXES, check_images
from prompt_datasets import TargetClass
from system.paths import find_path
from system.tensor_files import save_image
from utils import FUNCTION, UserError, import_function, join_lines, require, to_printable


def find_real_images(source: str, classes: list[TargetClass], runs: dict[TargetClass, Path],
                     count: int, cache: Path) -> dict[TargetClass, list[Path]]:
    """The readable files in `source`, sorted, of every class in `runs` {class: the run's folder}.

    `source` is a folder with one folder per class (class_folders.py), or a module:function of a class's label and a
    random.Random that draws a picture: then `count` files under the run's folder, which `draw_missing_images` fills
    later. The folder `cache` remembers what was readable.
    """
    if ":" in source and find_path(source) is None:
        require(re.fullmatch(FUNCTION, source), f"real_images '{source}' is neither a folder nor module:function")
        try:
            code = inspect.getsource(inspect.getmodule(import_function(source, "real_images")))
        except (OSError, TypeError) as error:
            raise UserError(f"real_images '{source}' has no source code to tell its pictures by") from error
        digest = hashlib.sha256(code.encode()).hexdigest()[:8]  # other code, other pictures
        drawn = {target: [run / "real" / f"{source.replace(':', '.')}_{digest}" / f"{seed}.png"
                          for seed in range(count)] for target, run in runs.items()}
        for target, files in drawn.items():
            if not files[0].exists():
                draw_real_image(source, target, files[0])  # a label that it does not know is found now
        return drawn
    root = find_path(source)
    require(root and root.is_dir(), f"no real_images folder '{source}'")
    allowed = name_folders(root, classes)
    found, faults, others = {}, {}, []
    with tqdm(runs, desc="real pictures", unit="class", delay=2) as bar:  # closed before an error is printed
        for target in bar:
            folder, files, more = list_class_files(root, target, allowed[target.index])
            broken = check_images(files, cache / f"readable_{target.folder}.json")
            found[target] = folder, [file for file in files if file not in broken]
            faults, others = faults | broken, others + more
    warn_of_skipped(faults, others, len(faults) + sum(len(files) for _, files in found.values()))
    for target, (folder, files) in found.items():
        require(files, f"'{root}' has no readable pictures of class {target.title}: "
                + (f"there are none in '{folder.name}'" if folder else
                   "name their folder " + " or ".join(f"'{name}'" for name in allowed[target.index])))
    return {target: files for target, (_, files) in found.items()}


def list_class_files(root: Path, target: TargetClass, allowed: list[str]) -> tuple[Path | None, list[Path], list[Path]]:
    """The one folder of `root` that bears an allowed name, its pictures, sorted, and what else is there but hidden."""
    folders = [root / name for name in allowed if "/" not in name and name not in ("", ".", "..")
               and (root / name).is_dir()]
    require(len(folders) < 2, f"'{root}' has two folders of class {target.title}: "
                              + " and ".join(f"'{folder.name}'" for folder in folders))
    paths = sorted(path for folder in folders for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    return (*folders, None)[0], files, sorted({*paths} - {*files})


def warn_of_skipped(faults: dict[Path, str], others: list[Path], pictures: int):
    """Name and count in one line the pictures that cannot be read, and the files whose suffix is no picture's."""
    parts = []
    if faults:
        named = [f"{quote_path(file)} ({fault})" for file, fault in list(faults.items())[:5]]
        parts.append(f"{len(faults)} of {pictures} real pictures, which cannot be read: {', '.join(named)}")
    if others:
        named = [quote_path(file) for file in others[:5]]
        parts.append(f"{len(others)} that are no pictures by their suffix: {', '.join(named)}")
    if parts:
        print("warning: skipped " + "; and ".join(parts), file=sys.stderr)


def quote_path(path: Path) -> str:
    return f"'{to_printable(str(path))}'"


def draw_missing_images(source: str, target: TargetClass, files: list[Path]) -> list[Path]:
    """`files`; those that are missing are drawn by the function `source` where it is one."""
    missing = [file for file in files if not file.exists()]
    for file in tqdm(missing, desc="drawing real pictures", unit="image", disable=not missing):
        save_image(draw_real_image(source, target, file), file)
    return files


def draw_real_image(source: str, target: TargetClass, file: Path) -> Image.Image:
    """What the function `source` draws of a class, which it knows by its label: its number may be another list's.

    Raises:
        UserError: whatever the function raises, such as a LookupError for a label that it does not know.
    """
    draw_image = import_function(source, "real_images")
    try:
        return draw_image(target.label, random.Random(f"{target.index} {file.stem}"))
    except Exception as error:  # a user's function raises what it raises
        raise UserError(f"real_images '{source}' cannot draw class {target.title} by its label '{target.label}': "
                        f"{type(error).__name__} {join_lines(error)[:200]}; give --real_images none, or a folder or a "
                        "function that has it") from error
