"""Names of classifiers and their classes, read from files alone. Imports nothing slow.

So a misspelt class is answered before torch is imported, which takes seconds.
"""

import json
import re
from pathlib import Path

from models.hub import find_cached_file
from prompt_datasets import class_name
from system.paths import find_path, split_revision
from system.text_files import read_text
from utils import WITHOUT_GPU_OR_NETWORK, join_lines, require, suggest_word, to_printable

REGISTRY = {
    "inet": "google/vit-large-patch16-224",
    "inat": "mean:vesteinn/vit-mae-inat21",
    "cub": "mean:vesteinn/vit-mae-cub",
    "miniature": "miniature/weights/classifier",
    "miniature_evaluator": "miniature/weights/evaluator",
}
KINDS = ("timm", "mean", "zero-shot")
IMAGENET_LABELS = Path(__file__).with_name("imagenet_labels.txt")


def resolve_name(name: str) -> tuple[str, str]:
    """Resolve a name into its kind ('timm', 'mean', 'zero-shot' or '') and its source.

    The source is a folder, a hub id or timm's own name; the last two keep the revision in the name.
    """
    place, revision = split_revision(name)
    spec = REGISTRY.get(place, place)
    if revision is not None:
        spec = f"{spec}@{revision}"
    prefix, colon, rest = spec.partition(":")
    kind, source = (prefix, rest) if colon and prefix in KINDS else ("", spec)
    if kind == "timm":
        return kind, source
    return kind, str(find_path(source) or source)


def list_alternatives(name: str) -> str:
    """List what to give instead of a classifier that cannot be opened."""
    known = suggest_word(name, [*REGISTRY, "inception"])
    return f"{known} or take one of {', '.join(REGISTRY)}, {WITHOUT_GPU_OR_NETWORK}".strip()


def folder_name(name: str) -> str:
    """Return a classifier's name as a folder name: 'timm:resnet50' -> 'timm_resnet50'.

    Of a path, the last two parts. The revision is left out: runs of two revisions have different
    settings, and so different exp_ids.
    """
    name, _ = split_revision(name)
    last_parts = "/".join(name.rstrip("/").split("/")[-2:])
    return re.sub(r"[^\w.-]+", "_", last_parts).strip("._")[-80:] or "classifier"


def find_labels(name: str, labels_file: str | None = None) -> list[str]:
    """Find the labels of the classifier `name` where a folder has them; else an empty list.

    Does not load the classifier. `labels_file` is that of zero-shot classifiers. ImageNet's labels
    come with this package.

    Raises:
        UserError: labels that are not numbered from 0, or a broken `labels_file`.
    """
    kind, source = resolve_name(name)
    folder = find_path(source)
    if kind == "zero-shot":
        return read_labels(labels_file)
    if kind != "timm" and folder:
        return read_config_labels(folder / "config.json", source)
    is_imagenet = split_revision(name)[0] == "inet"
    return IMAGENET_LABELS.read_text(encoding="utf-8").splitlines() if is_imagenet else []


def find_downloaded_labels(name: str) -> list[str]:
    """Find the labels of a classifier that was downloaded from the hub; see `find_labels`."""
    kind, source = resolve_name(name)
    file = find_cached_file(source, "config.json") if kind in ("", "mean") else None
    return read_config_labels(file, source) if file else []


def read_config_labels(file: Path, source: str) -> list[str]:
    """Read the labels of a transformers config.json.

    None if it is missing or broken: loading it says more about that.
    """
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    id2label = config.get("id2label") if isinstance(config, dict) else None
    if not isinstance(id2label, dict) or not id2label or not all(i.isdecimal() for i in id2label):
        return []
    check_problem_type(config.get("problem_type"), source)
    return labels_of_config(id2label, source)


def check_problem_type(problem_type: str | None, source: str):
    """Raise UserError for a multi-label classifier or a regression."""
    require(
        problem_type in (None, "single_label_classification"),
        f"the config.json of '{source}' is for {problem_type} (problem_type): a classifier must "
        "give one label per picture, by a softmax over its classes",
    )


def labels_of_config(id2label: dict, source: str) -> list[str]:
    """Return the labels of a transformers config in the order of their classes, each on one line.

    Raises:
        UserError: classes that are not numbered from 0 on.
    """
    labels = {int(i): join_lines(to_printable(str(label))) for i, label in id2label.items()}
    missing = next((i for i in range(len(labels)) if i not in labels), None)
    require(labels, f"the config.json of '{source}' names no classes (id2label)")
    require(
        missing is None,
        f"the config.json of '{source}' numbers its classes from 0 on (id2label), but has no "
        f"class {missing}, and {len(labels)} classes up to {max(labels)}",
    )
    return [labels[i] for i in range(len(labels))]


def read_labels(path: str | None) -> list[str]:
    """Read the labels of a text file, one per line; blank lines do not count.

    Raises:
        UserError: no file, no text, fewer than two labels, or one twice (in upper or lower case).
    """
    require(
        path, "a zero-shot classifier needs --labels names.txt, a text file with one label per line"
    )
    labels, lines = [], {}
    for number, line in enumerate(read_text(str(path)).split("\n"), 1):
        label = join_lines(line)
        if not label:
            continue
        require(label.isprintable(), f"'{path}' line {number} has unprintable characters")
        first = lines.setdefault(label.casefold(), number)
        require(first == number, f"'{path}' line {number}: '{label}' is already on line {first}")
        require(
            class_name(label), f"'{path}' line {number}: '{label}' has no name before its comma"
        )
        labels.append(label)
    found = "1 label" if labels else "no labels"
    require(
        len(labels) > 1,
        f"'{path}' holds {found}: a classifier needs two or more, one per line",
    )
    return labels
