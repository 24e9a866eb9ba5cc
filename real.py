"""Real pictures of a class: a folder of a folder a class, or a world that draws its own."""

import random
import sys
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from prompt_datasets import class_folder, class_title
from utils import find_path, imported, replacing, require

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def real_pictures(source: str | None, index: int, name: str, label: str, drawn: Path, count: int) -> list[Path]:
    """The files of class `index` (from 0) in `source`, sorted; [] where `source` is None.

    `source` is a folder that holds a folder a class ('0283_tiger_cat', '283', the name or the label), or the
    module:function that draws one, such as miniature.world:draw; `count` pictures are then drawn into `drawn`, once.

    Raises:
        UserError: no such folder or function, or no picture of the class in it.
    """
    if source is None:
        return []
    if ":" in source and find_path(source) is None:
        return _drawn(source, index, drawn, count)
    root = find_path(source)
    require(root and root.is_dir(), f"no real_images folder '{source}'")
    names = dict.fromkeys((class_folder(index, name), str(index + 1), name, label))
    folders = [root / each for each in names if "/" not in each and (root / each).is_dir()]
    files = sorted(path for path in folders[0].iterdir() if path.suffix.lower() in KINDS) if folders else []
    require(files, f"'{source}' has no pictures of class {class_title(index, label)}: name their folder "
                   f"'{class_folder(index, name)}', '{index + 1}' or '{name}'")
    return files


def _drawn(source: str, index: int, folder: Path, count: int) -> list[Path]:
    draw = imported(source, "real_images")
    files = [folder / f"{seed}.png" for seed in range(count)]
    for seed, file in enumerate(files):
        if not file.exists():
            with replacing(file) as temporary:
                draw(index, random.Random(f"{index} {seed}")).save(temporary, format="PNG")
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
