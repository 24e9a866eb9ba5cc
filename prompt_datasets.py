"""What the generator is asked for: class names, prompts, and the classes of a run."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from system.paths import find_path
from system.text_files import read_text, read_yaml
from utils import require, suggest_word

TEMPLATES = (
    "A photo of a {}",
    "a high resolution realistic image of a {}",
    "A close-up photo of a {}",
)


class TargetClass(NamedTuple):
    """A class as tensors, people and folders know it.

    Made only by `select_classes`, which converts between them.
    """

    index: int  # in tensors, from 0
    number: int  # on the command line, in files and messages, from 1
    name: str  # in prompts: 'tiger cat'
    label: str  # the classifier's own: 'tiger cat, Felis tigris'
    title: str  # in messages: '283 (tiger cat, Felis tigris)'
    folder: str  # '0283_tiger_cat'


class PromptDataset(Sequence):
    """One update's images of a class.

    Item i has its seed and the index of its prompt, i modulo the number of prompts.
    """

    def __init__(self, phrase: str, templates: tuple[str, ...], seeds: list[int]):
        self.prompts, self.seeds = [template.format(phrase) for template in templates], seeds

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, i):
        return {"prompt": i % len(self.prompts), "seed": self.seeds[i]}


def read_eval_prompts(given: list[str]) -> list[str]:
    """Read the prompts of --eval_prompts, or the lines of a text file.

    Leaves out the prompt that is always evaluated.
    """
    if len(given) == 1 and "{}" not in given[0]:
        file = find_path(given[0])
        require(
            file and file.is_file(),
            f"eval_prompts: '{given[0]}' is neither a file nor a prompt, which has a {{}} "
            "where the class goes, such as 'A painting of {}'",
        )
        given = [line.strip() for line in read_text(str(file)).splitlines() if line.strip()]
        require(given, f"eval_prompts: '{file}' holds no prompt, such as 'A painting of {{}}'")
    for template in given:
        require(
            template.count("{}") == 1 and not set(template.replace("{}", "")) & set("{}"),
            f"eval_prompts: '{template}' needs one {{}} where the class goes, such as 'A painting "
            "of {}'",
        )
    folders = [prompt_folder(template) for template in given]
    require(
        len(set(folders)) == len(folders),  # their pictures would share one
        "eval_prompts: two prompts have the same letters and digits, so leave one of them out: "
        f"{given}",
    )
    return [template for template in given if template != TEMPLATES[0]]


def class_name(label: str) -> str:
    """Return the name for prompts: 'tench, Tinca tinca' -> 'tench'.

    '001.Black_footed_Tern' -> 'Black footed Tern'.
    """
    return re.sub(r"^\d+\.", "", label.split(",")[0]).replace("_", " ").strip()


def class_names(labels: list[str], overrides: str | None = None) -> list[str]:
    """Return the name of every class, from its label or from a YAML file {number from 1: name}."""
    names = [class_name(label) for label in labels]
    if overrides is None:
        return names
    for number, name in read_yaml(overrides, "135: crane bird").items():
        is_number = re.fullmatch("[0-9]{1,9}", number) and 1 <= int(number) <= len(names)
        is_name = isinstance(name, str) and name.strip() and name.isprintable()
        require(
            is_number and is_name,
            f"'{overrides}': {number!r}: {name!r} must be a class number from 1 to {len(names)} "
            "and a name",
        )
        names[int(number) - 1] = name
    return names


def oracle_words(
    file: str | None, labels: list[str], targets: list[TargetClass]
) -> dict[TargetClass, str]:
    """Read {number from 1: better words}, which ask for a class without a token, from a YAML file.

    Returns None without a file.
    """
    if file is None:
        return {}
    names = class_names(labels, file)
    words, silent = {}, []
    for target in targets:
        words[target] = names[target.index]
        if words[target] == class_name(target.label):
            silent.append(target.title)
    require(
        not silent, f"oracle_names: '{file}' has no other words for class {', '.join(silent[:3])}"
    )
    return words


def class_number(index: int) -> int:
    """Return how people count class `index` (from 0): from 1.

    On the command line, in files and in messages.
    """
    return index + 1


def number_labels(labels: list[str]) -> str:
    """List the classes, a line each, with their numbers."""
    return "\n".join(f"{class_number(i):5d}  {label}" for i, label in enumerate(labels))


def distinguish_labels(labels: list[str]) -> list[str]:
    """Return what a page shows of each class: its label, with its number if others share it."""
    counts = Counter(labels)
    shown = []
    for i, label in enumerate(labels):
        is_unique = counts[label] == 1
        shown.append(label if is_unique else class_title(class_number(i), label))
    return shown


def class_folder(number: int, name: str) -> str:
    """Return the folder of a class, '0283_tiger_cat': number from 1, name in plain letters."""
    plain_name = re.sub(r"[^a-z0-9]+", "_", name.lower())[:80].strip("_")
    return f"{number:04d}_{plain_name}".rstrip("_")


def prompt_folder(template: str) -> str:
    """Return the folder of an evaluation prompt: 'A painting of {}' -> 'a_painting_of'."""
    folder = re.sub(r"[^a-z0-9]+", "_", template.lower()).strip("_")
    if len(folder) > 60 or not template.isascii():
        digest = hashlib.sha256(template.encode()).hexdigest()[:8]
        folder = f"{folder[:60]}_{digest}".lstrip("_")
    return folder or "class"


def class_title(number: int, label: str) -> str:
    """Return how messages name a class, its number counted from 1: '283 (tiger cat)'."""
    return f"{number} ({label})"


def target_class(index: int, name: str, label: str) -> TargetClass:
    """Make the class `index` (from 0) with its name and label."""
    number = class_number(index)
    title = class_title(number, label)
    return TargetClass(index, number, name, label, title, class_folder(number, name))


def select_classes(selection: str, labels: list[str], names: list[str]) -> list[TargetClass]:
    """Select the classes of '283', '1-12', '1,5,9', 'all', a name or a whole label.

    Numbers count from 1.
    """
    selection = selection.strip()
    if selection == "all":
        chosen = range(len(labels))
    elif re.fullmatch(r"[\d\s,-]+", selection):
        chosen = _select_numbers(selection, len(labels))
    else:
        chosen = _select_name(selection, labels, names)
    return [target_class(index, names[index], labels[index]) for index in chosen]


def plain_words(text: str) -> str:
    """Normalise words: 'jaguar, cat' and 'Jaguar_cat' -> 'jaguar cat'."""
    return " ".join(re.findall(r"\w+", text.lower().replace("_", " ")))


def _select_name(selection: str, labels: list[str], names: list[str]) -> list[int]:
    """Select the class with this label, else with this name; as typed, else word by word."""
    found = _find_spelling(selection, labels, names)
    hint = suggest_word(selection.lower(), [text.lower() for text in [*names, *labels]])
    if not hint:
        hint = "--list_classes shows its classes"
    require(found, f"class_index: the classifier has no class '{selection}'; {hint}")
    titles = [class_title(class_number(i), labels[i]) for i in found]
    require(
        len(found) == 1,
        f"class_index '{selection}' names {len(found)} classes: give a number, "
        f"{' or '.join(titles)}",
    )
    return found


def _find_spelling(selection: str, labels: list[str], names: list[str]) -> list[int]:
    """Find the classes, from 0, with this spelling; an empty list if there is none."""
    for spell in (str.lower, plain_words):
        wanted = spell(selection)
        if not wanted:
            continue
        for known in (labels, names):
            found = [i for i, text in enumerate(known) if spell(text) == wanted]
            if found:
                return found
    return []


def _select_numbers(selection: str, count: int) -> list[int]:
    """Select the classes, from 0, of numbers and ranges that count from 1."""
    numbers = []
    for part in selection.split(","):
        match = re.fullmatch(r"\s*(\d{1,1000})\s*(?:-\s*(\d{1,1000})\s*)?", part)
        require(
            match,
            f"class_index '{selection}' must be a number (283), a range (1-12) or a list (1,5,9)",
        )
        first = int(match[1])
        last = int(match[2] or match[1])
        require(first <= last, f"class_index {part.strip()} runs backwards: write {last}-{first}")
        require(
            first >= 1 and last <= count,
            f"class_index {part.strip()}: the classifier's classes are 1 to {count}",
        )
        numbers += range(first, last + 1)
    return [number - 1 for number in dict.fromkeys(numbers)]
