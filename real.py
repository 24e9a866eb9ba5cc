"""Real pictures of a class: a folder of a folder a class, or a world that draws its own."""

import hashlib
import inspect
import random
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from config import FUNCTION
from prompt_datasets import class_folder, class_title
from utils import UserError, did_you_mean, find_path, imported, printable, read_image, replacing, require

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def real_pictures(source: str, names: list[str], labels: list[str], runs: dict[int, Path],
                  count: int) -> dict[int, list[Path]]:
    """The readable files in `source`, sorted, of every class in `runs` {class from 0: the run's folder}.

    `source` is a folder that holds a folder a class ('0283_tiger_cat', '283', or the name or label where no other
    class goes by it too), or the module:function that draws one, such as miniature.world:draw: then `count` files under
    the run's folder, which `drawn` fills later.

    Raises:
        UserError: no such folder or function, a folder of no class, or no readable picture of one of these classes.
    """
    if ":" in source and find_path(source) is None:
        require(re.fullmatch(FUNCTION, source), f"real_images '{source}' is neither a folder nor module:function")
        try:
            code = inspect.getsource(inspect.getmodule(imported(source, "real_images")))  # other code, other pictures
        except (OSError, TypeError) as error:
            raise UserError(f"real_images '{source}' has no source code to tell its pictures by") from error
        folder = f"{source.replace(':', '.')}_{hashlib.sha256(code.encode()).hexdigest()[:8]}"
        return {index: [run / "real" / folder / f"{seed}.png" for seed in range(count)] for index, run in runs.items()}
    root = find_path(source)
    require(root and root.is_dir(), f"no real_images folder '{source}'")
    allowed = folder_names(names, labels)
    known = [name for each in allowed for name in each]
    there = [folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    strays = sorted(set(there) - set(known))
    require(not strays, f"'{source}' has folders that are no class: {', '.join(map(repr, strays[:5]))}; "
                        + (did_you_mean("".join(strays[:1]), known) or
                           f"call them such as '{known[0]}', by the numbers and names of --list_classes"))
    return {index: pictures_in(root, index, allowed[index], labels[index])
            for index in tqdm(runs, desc="real pictures", unit="class", delay=2)}


def folder_names(names: list[str], labels: list[str]) -> list[list[str]]:
    """What every class's folder of real pictures may be called."""
    spellings = [dict.fromkeys((str(index + 1), name, label))
                 for index, (name, label) in enumerate(zip(names, labels, strict=True))]
    owners = Counter(spelling for each in spellings for spelling in each)
    return [[class_folder(index, names[index]), *(spelling for spelling in each if owners[spelling] == 1)]
            for index, each in enumerate(spellings)]


def pictures_in(root: Path, index: int, allowed: list[str], label: str) -> list[Path]:
    """The readable pictures in the first folder of `root` that bears one of the `allowed` names."""
    folders = [root / name for name in allowed if "/" not in name and name not in ("", ".", "..")
               and (root / name).is_dir()]
    require(len(folders) < 2, f"'{root}' has two folders of class {class_title(index, label)}: "
                              + " and ".join(f"'{folder.name}'" for folder in folders))
    files = readable(sorted(path for path in folders[0].iterdir() if path.suffix.lower() in KINDS)) if folders else []
    require(files, f"'{root}' has no readable pictures of class {class_title(index, label)}: "
                   + (f"there are none in '{folders[0].name}'" if folders else
                      "name their folder " + " or ".join(f"'{name}'" for name in allowed)))
    return files


def drawn(source: str, index: int, files: list[Path]) -> list[Path]:
    """`files`, those that are missing drawn by the function `source` where it is one."""
    missing = [file for file in files if not file.exists()]
    if missing:
        draw = imported(source, "real_images")
        for file in tqdm(missing, desc="drawing real pictures", unit="image"):
            with replacing(file) as temporary:
                draw(index, random.Random(f"{index} {file.stem}")).save(temporary, format="PNG")
    return files


def readable(files: list[Path]) -> list[Path]:
    """Those files that hold a picture; the others are named in a warning."""
    good, broken = [], []
    for file in files:
        try:
            read_image(file)
            good.append(file)
        except UserError:
            broken.append(file)
    if broken:
        print(f"warning: skipped {len(broken)} of {len(files)} real pictures, which cannot be read: "
              + printable(", ".join(map(str, broken[:5]))), file=sys.stderr)
    return good
