"""The tokens and pictures of studies, made once and kept.

They are found again by a digest of everything that affects them: other settings, another folder.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from config import RunConfig, names_deciding
from evaluation.accuracy import judge_images
from evaluation.drawing import Condition, digest_json
from evaluation.real_images import draw_missing_images, find_real_images
from evaluation.sheets import draw_sheet
from evaluation.statistics import Proportion, count_right
from experiments.study import QUICK, Study
from models.labels import read_labels, resolve_name
from prompt_datasets import TEMPLATES, TargetClass
from runs.folders import RunFolder
from runs.session import Session
from runs.sweep import Sweep, work_on_classes
from system.paths import list_checkpoint_files, stamp_file
from system.text_files import read_json
from tokens.class_token import load_token, names_file
from utils import require, write_json

Sets = dict[TargetClass, list[Path]]  # pictures by class
Vectors = dict[TargetClass, torch.Tensor | None]  # [K, D] by class, None without a token
WORLD = "miniature.world:draw"  # the miniature's source of real pictures
SHEET_CLASSES = 4  # that a sheet shows at most


def digest_training(config: RunConfig, **more) -> str:
    """Name a folder by everything that affects what is learned: settings, weights, and `more`."""
    decisive = config.pick_settings((*names_deciding("token"), "real_images"))
    sources = (config.model, resolve_name(config.classifier)[1])
    weights = [list_checkpoint_files(source) for source in sources]
    if config.labels:
        more["labels"] = read_labels(config.labels)  # the file may have changed
    if names_file(config.initializer_token):
        more["initializer"] = stamp_file(Path(config.initializer_token))
    return digest_json([decisive, weights, more])[:12]


def stamp_sets(sets: Sets) -> dict[int, list]:
    """Return stamps that tell, by class number, whether pictures were replaced."""
    return {target.number: list(map(stamp_file, files)) for target, files in sets.items()}


def learn_tokens(
    study: Study, targets: list[TargetClass] | None = None, **changes
) -> dict[TargetClass, RunFolder]:
    """Return the run folders of these classes (of all), trained if they are not yet.

    `changes` are to the study's settings.

    Raises:
        UserError: a class that fails, or that another process is training.
    """
    numbers = [str(target.number) for target in targets or study.targets]
    settings = {"classes_at_once": 8, "class_index": ",".join(numbers), **changes}
    if study.options.quick:
        settings |= QUICK
    config = replace(study.config, **settings)
    loop = {"loop": study.loop} if study.loop else {}
    config.exp_id = digest_training(config, **loop)
    config.validate_settings()
    session = Session(config, study.session.shared)
    if study.change_loop:
        study.change_loop(session)
    sweep = Sweep(session)
    work_on_classes(session, sweep)
    if sweep.errors:
        raise sweep.errors[0]
    others = [folder.target.title for folder in sweep.left_to_others()]
    require(
        not others,
        f"other processes are training class {', '.join(others)}: run this again when they are "
        "done",
    )
    return session.folders


def load_vectors(folders: dict[TargetClass, RunFolder]) -> Vectors:
    """Load the vectors that these trainings learned."""
    return {target: load_token(folder.token_file).vectors for target, folder in folders.items()}


def measure_cost(folders: dict[TargetClass, RunFolder], key: str) -> float:
    """Return the mean 'updates' or 'seconds' of these trainings."""
    return mean(read_json(folder.cost_file, key)[key] for folder in folders.values())


def cached_result(study: Study, make: Callable[[], object], **settings):
    """Return what `make` returned in an earlier call with the same study and settings, or now.

    As JSON stores it.
    """
    file = study.work / "cached" / f"{digest_training(study.config, **settings)}.json"
    if not file.exists():
        write_json(file, {"settings": settings, "value": make()})
    return read_json(file, "value")["value"]


def draw_sets(
    study: Study,
    vectors: Vectors,
    images: int,
    template: str = TEMPLATES[0],
    phrase: str | None = None,
) -> Sets:
    """Draw seeds 0 to images - 1 of every class with its vectors or without, where missing.

    With vectors, `phrase` takes the place of '<placeholder> <class name>' in the template.
    """
    drawer = study.session.drawer
    sets = {}
    for target, of_class in vectors.items():
        words = target.name
        if of_class is not None:
            words = phrase or f"{study.config.placeholder_token} {target.name}"
        condition = Condition("", template.format(words), of_class, images)
        condition = condition._replace(
            folder=digest_json(drawer.describe_conditions([condition]))[:12]
        )
        folder = study.work / "pictures" / target.folder
        drawer.draw_conditions([condition], folder, target.title)
        sets[target] = [folder / condition.folder / f"{seed}.png" for seed in range(images)]
    return sets


def load_real_images(study: Study, count: int) -> Sets:
    """Load at least `count` real pictures of every class, from the setting real_images.

    Raises:
        UserError: a class that has fewer.
    """
    source = study.config.real_images
    require(
        source,
        "this experiment needs real pictures: give --real_images a folder with one folder per "
        "class",
    )
    folders = {target: study.work / "real" / target.folder for target in study.targets}
    cache = study.work / "cache"
    found = find_real_images(source, study.session.every_class(), folders, count, cache)
    few = []
    for target, files in found.items():
        if len(files) < count:
            few.append(f"{target.title} {len(files)}")
    require(
        not few,
        f"{count} real pictures per class are needed, but there are fewer of class "
        f"{', '.join(few)}",
    )
    return {target: draw_missing_images(source, target, files) for target, files in found.items()}


def measure_accuracy(study: Study, sets: Sets) -> Proportion:
    """Measure the judge's accuracy on all classes' pictures."""
    right = []
    for target, files in sets.items():
        right += judge_images(study.session.judge, files, target.index).right
    return count_right(right)


def show_sets(
    targets: list[TargetClass],
    conditions: dict[str, Sets],
    path: Path,
    title: str = "",
    count: int = 8,
):
    """Write a sheet of every condition's first pictures, of a few of the classes."""
    step = max(1, len(targets) // SHEET_CLASSES)
    rows = []
    for target in targets[::step][:SHEET_CLASSES]:
        for condition, sets in conditions.items():
            rows.append((f"{target.label}: {condition}", sets[target][:count]))
    draw_sheet(rows, path, cell=72, title=title)
