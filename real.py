"""Real pictures of a class: a folder of a folder a class, or a world that draws its own."""

import random
import sys
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from prompt_datasets import class_folder, class_title
from utils import find_path, imported, replacing, require

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def real_pictures(source: str, index: int, names: list[str], labels: list[str], run: Path, count: int) -> list[Path]:
    """The readable files of class `index` (from 0) in `source`, sorted.

    `source` is a folder that holds a folder a class ('0283_tiger_cat', '283', or the name or label where no other
    class has it too), or the module:function that draws one, such as miniature.world:draw: then `count` files under
    `run`, which `drawn` fills later.

    Raises:
        UserError: no such folder or function, or no readable picture of the class in it.
    """
    if ":" in source and find_path(source) is None:
        imported(source, "real_images")
        return [run / "real" / source.replace(":", ".") / f"{seed}.png" for seed in range(count)]
    root = find_path(source)
    require(root and root.is_dir(), f"no real_images folder '{source}'")
    its_own = [words[index] for words in (names, labels) if words.count(words[index]) == 1]
    allowed = list(dict.fromkeys((class_folder(index, names[index]), str(index + 1), *its_own)))
    folders = [root / each for each in allowed if "/" not in each and (root / each).is_dir()]
    files = readable(sorted(path for path in folders[0].iterdir() if path.suffix.lower() in KINDS)) if folders else []
    require(files, f"'{source}' has no readable pictures of class {class_title(index, labels[index])}: name their "
                   "folder " + " or ".join(f"'{each}'" for each in allowed))
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
            with Image.open(file) as image:
                image.convert("RGB")
            good.append(file)
        except (UnidentifiedImageError, OSError):
            broken.append(file)
    if broken:
        print(f"warning: {len(broken)} of {len(files)} real pictures cannot be read and are skipped: "
              + ", ".join(map(str, broken[:5])), file=sys.stderr)
    return good
