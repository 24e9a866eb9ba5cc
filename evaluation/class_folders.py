"""Which folder of real pictures belongs to which class.

Folders are named as ours, or as in ImageNet, CUB and iNaturalist.
"""

import difflib
import re
from collections import Counter, defaultdict
from pathlib import Path

from timm.data import ImageNetInfo

from prompt_datasets import TargetClass, class_name, plain_words
from utils import UserError, suggest_word, to_printable

OUR_DIGITS = len("0283")  # of a class's number in its folder
NAMED = 5  # folders that an error names


def name_folders(root: Path, classes: list[TargetClass]) -> list[list[str]]:
    """List the allowed names of every class's folder in `root`.

    Names of published data sets that are there are included.

    Raises:
        UserError: a folder that matches no class.
    """
    allowed = allowed_folder_names(classes)
    known = set()
    for spellings in allowed:
        known.update(spellings)
    present = set()
    for folder in root.iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            present.add(folder.name)
    others = sorted(present - known)
    published = match_published_names(others, classes)
    for name, index in published.items():
        allowed[index].append(name)
    unknown = [name for name in others if name not in published]
    if unknown:
        hint = suggest_folder(unknown[0], classes) or suggest_word(unknown[0], known)
        if not hint:
            hint = (
                f"name them such as '{classes[0].folder}', by the numbers and names of "
                "--list_classes"
            )
        shown = ", ".join(f"'{to_printable(name)}'" for name in unknown[:NAMED])
        raise UserError(f"'{root}' has folders that match no class: {shown}; {hint}")
    return allowed


def allowed_folder_names(classes: list[TargetClass]) -> list[list[str]]:
    """List what the folder of every class's real pictures may be called."""
    spellings = []
    owners = Counter()
    for target in classes:
        of_class = list(dict.fromkeys((str(target.number), target.name, target.label)))
        spellings.append(of_class)
        owners.update(of_class)
    allowed = []
    for target, of_class in zip(classes, spellings, strict=True):
        unique = [spelling for spelling in of_class if owners[spelling] == 1]
        allowed.append([target.folder, *unique])
    return allowed


def match_published_names(folders: list[str], classes: list[TargetClass]) -> dict[str, int]:
    """Match {folder: class from 0} for folders named as in a published data set.

    Such as ImageNet's n02123159, CUB's 001.Black_footed_Albatross, iNaturalist's
    00001_Animalia_..._Sabella_pavonina. Their numbers belong to other lists, so names decide, and
    exactly one class must match.
    """
    owners = find_owners(classes)
    synsets = number_synsets(classes)
    matched = {}
    for folder in folders:
        index = synsets.get(folder)
        if index is None:
            index = match_name(folder, owners)
        if index is not None:
            matched[folder] = index
    return matched


def match_name(folder: str, owners: dict[str, set[int]]) -> int | None:
    """Find the class whose name a numbered folder ends with."""
    numbered = re.fullmatch(r"\d+[._](.+)", folder)
    if not numbered:
        return None
    words = plain_words(numbered[1]).split()
    for start in range(len(words)):  # iNaturalist's begin with kingdom, phylum, class, ...
        indices = owners.get(" ".join(words[start:]), set())
        if len(indices) == 1:
            (index,) = indices
            return index
    return None


def find_owners(classes: list[TargetClass]) -> dict[str, set[int]]:
    """Map {name or label in plain words: the classes, from 0, with that name}."""
    owners = defaultdict(set)
    for target in classes:
        for name in (target.name, class_name(target.label), target.label):
            owners[plain_words(name)].add(target.index)
    return owners


def number_synsets(classes: list[TargetClass]) -> dict[str, int]:
    """Map {WordNet id: class from 0} if the classes are ImageNet's thousand, else nothing."""
    info = ImageNetInfo("imagenet-1k")
    if len(classes) != info.num_classes():
        return {}
    numbered = {}
    for target in classes:
        description = info.index_to_description(target.index)
        if plain_words(class_name(target.label)) != plain_words(class_name(description)):
            return {}
        numbered[info.index_to_label_name(target.index)] = target.index
    return numbered


def suggest_folder(folder: str, classes: list[TargetClass]) -> str:
    """A question that names the class folder whose name resembles this one's.

    By its number where that is all there is. An empty string for a name without a number: what is
    suggested then is spelled in the same way.
    """
    number, words = re.fullmatch(r"(\d*)[._]?(.*)", folder, re.DOTALL).groups()
    if not number:
        return ""
    by_name = {plain_words(target.name): target.folder for target in classes}
    by_number = {target.number: target.folder for target in classes}
    close = difflib.get_close_matches(plain_words(words), by_name, 1)
    if close:
        return f"did you mean '{by_name[close[0]]}'?"
    if words and len(number) != OUR_DIGITS:  # numbered by another list
        return ""
    if int(number) not in by_number:
        return f"the classes are numbered 1 to {len(classes)}"
    return f"did you mean '{by_number[int(number)]}'?"
