"""What every experiment shares: its arguments, tokens and pictures that are made once, and the page of its result."""

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from config import RunConfig, names_deciding, parse_settings
from evaluation.accuracy import judge_images
from evaluation.images import Arm, Drawer
from evaluation.real_images import draw_missing_images, find_real_images
from evaluation.statistics import Proportion, count_right
from evaluation.tables import Table
from method.class_token import load_token
from method.losses import classifier_loss
from method.trainer import TrainingSettings
from models.classifiers import Classifier, load_classifier, load_labels
from models.generator import PRECISIONS, Generator, load_generator
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES, TargetClass, class_names, select_classes
from runs.folders import RunFolder
from runs.workers import Sweep, TrainingJob, choose_device, work_on_classes
from utils import (
    ROOT,
    UserError,
    exit_code,
    list_checkpoint_files,
    read_json,
    read_json_lines,
    replace_file,
    require,
    write_json,
    write_text,
)

Sets = dict[TargetClass, list[Path]]
MINIATURE, WORLD = "configs/miniature.yml", "miniature.world:draw"  # its settings, and its source of real pictures


class Lab(NamedTuple):
    """An experiment's settings and classes, its models, loaded when first needed, and its folders."""

    config: RunConfig
    labels: list[str]
    names: list[str]
    targets: list[TargetClass]
    work: Path  # tokens and pictures
    out: Path  # results
    get_generator: Callable[[], Generator]
    get_guide: Callable[[], Classifier]
    get_judge: Callable[[], Classifier]  # the evaluator, or the guide where the config has none
    drawer: Drawer
    flags: list[str]  # of the command, but for the folders


def build_parser(doc: str, class_index: str) -> argparse.ArgumentParser:
    """The arguments of every experiment; `class_index` names the classes of the miniature that it takes by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=MINIATURE, help="settings, such as configs/imagenet.yml (the miniature's)")
    parser.add_argument("--class_index", help=f"which classes, as for run.py (of the miniature: {class_index})")
    parser.add_argument("--work", type=Path, help="keeps tokens and pictures for the next call (img/results/<config>)")
    parser.add_argument("--out", type=Path, help="(docs/results; of another config its own folder in there)")
    parser.set_defaults(classes_of_miniature=class_index, parser=parser)
    return parser


def open_lab(arguments: argparse.Namespace, **changes) -> Lab:
    """The lab of `arguments`; `changes` are settings that the experiment itself decides.

    A UserError where settings cannot work, or training may have seen the seeds of `arguments.images`.
    """
    name, is_miniature = Path(arguments.config).stem, arguments.config == MINIATURE
    classes = arguments.class_index or (arguments.classes_of_miniature if is_miniature else "")
    work = arguments.work or Path("img/results", name)
    config, _ = parse_settings(["--config", arguments.config])
    config = replace(config, **{"class_index": classes, "train": True, "output_path": str(work), **changes})
    config.validate_settings()
    images = getattr(arguments, "images", 0)
    require(images <= config.seed, f"--images {images} would judge seeds that training uses, from {config.seed} on: "
                                   f"give {config.seed} or less")
    device = choose_device(config.device, config.mixed_precision, local_rank=-1)
    labels = load_labels(config.classifier)
    names = class_names(labels, config.class_names)
    get_generator = functools.cache(lambda: open_generator(config, device))
    drawn_by = {"weights": list_checkpoint_files(config.model),
                **config.pick(names_deciding("pictures"))}
    flags = [word for name, value in vars(arguments).items()
             if name not in ("work", "out") and value != arguments.parser.get_default(name)
             for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]
    return Lab(config, labels, names, select_classes(config.class_index, labels, names), work,
               arguments.out or ROOT / "docs/results" / ("" if is_miniature else name), get_generator,
               functools.cache(lambda: load_classifier(config.classifier, device)),
               functools.cache(lambda: load_classifier(config.evaluator or config.classifier, device)),
               Drawer(get_generator, sampling_settings(config), drawn_by, device, config.batch_size), flags)


def open_generator(config: RunConfig, device: str) -> Generator:
    generator = load_generator(config.model, device, PRECISIONS[config.mixed_precision],
                               config.gradient_checkpointing, config.torch_compile)
    generator.set_placeholder(config.placeholder_token)
    return generator


def sampling_settings(config: RunConfig, timesteps: list[int] | None = None) -> SamplingSettings:
    return SamplingSettings(config.height, config.width, config.guidance_scale, config.num_inference_steps,
                            timesteps and tuple(timesteps))


def judge_name(lab: Lab) -> str:
    """Who says what is right, for the notes under a table."""
    judge = lab.get_judge().name
    return f"the evaluator '{judge}'" if lab.config.evaluator else f"'{judge}', which also guided the training"


def choose_shown(lab: Lab) -> list[TargetClass]:
    """Four classes at most, for a figure."""
    return lab.targets[::max(1, len(lab.targets) // 4)][:4]


def learn_tokens(lab: Lab, exp_id: str, targets: list[TargetClass] | None = None,
                 **changes) -> dict[TargetClass, RunFolder]:
    """The run folders of these classes (of all), trained where they are not yet; `changes` to the lab's settings.

    A UserError where there are tokens of other settings, a class fails, or other processes are training some.
    """
    config = replace(lab.config, exp_id=exp_id, classes_at_once=8, **changes)
    config.validate_settings()
    folders = {target: RunFolder(config.output_path, config.classifier, target, exp_id)
               for target in targets or lab.targets}
    for folder in folders.values():
        try:
            folder.refuse_other_settings(asdict(config), names_deciding("token"))
        except UserError as error:
            raise UserError(f"{error} (here: another --work)") from error
    is_same = config.classifier == lab.config.classifier
    sweep = Sweep(list(folders.values()), lambda folder: folder.token_file.exists(), start_over=False)
    errors = work_on_classes(sweep, TrainingJob(
        lab.get_generator,
        lambda: classifier_loss(lab.get_guide() if is_same else load_classifier(config.classifier, config.device)),
        TrainingSettings(**config.pick(TrainingSettings._fields)),
        sampling_settings(config, config.train_timesteps), asdict(config), names_deciding("token"),
        config.classes_at_once, config.batch_size),
        evaluate_class=lambda folder: None)
    if errors:
        raise errors[0]
    others = [folder.target.title for folder in sweep.left_to_others()]
    require(not others, f"other processes are training class {', '.join(others)}: run this again when they are done")
    return folders


def load_vectors(folder: RunFolder) -> torch.Tensor:
    return load_token(folder.token_file).vectors


def read_updates(folder: RunFolder) -> list[dict]:
    return read_json_lines(folder.history_file)


def read_seconds(folder: RunFolder) -> float:
    return read_json(folder.cost_file, "seconds")["seconds"]


def cached_result(file: Path, settings: dict, make: Callable[[], object]):
    """What `make` returned in an earlier call with the same settings (as JSON stores it), or returns now."""
    found = read_json(file) if file.exists() else {}
    settings = json.loads(json.dumps(settings))
    if found.get("settings") != settings:
        found = {"settings": settings, "value": make()}
        write_json(file, found)
    return found["value"]


def list_settings(lab: Lab, **more) -> dict:
    """All settings that decide what is learned in a lab, and what an experiment adds to them."""
    return {**lab.config.pick((*names_deciding("token"), "real_images")), **more}


def draw_class(lab: Lab, target: TargetClass, name: str, vectors: torch.Tensor | None, images: int,
               template: str = TEMPLATES[0], phrase: str | None = None) -> list[Path]:
    """Seeds 0 to images - 1 of a class with vectors [K, D] or without (None), drawn where missing, in folder `name`.

    `phrase` takes the place of '<placeholder> <class name>' in the template.
    """
    phrase = phrase or (target.name if vectors is None else f"{lab.config.placeholder_token} {target.name}")
    folder = lab.work / "pictures" / target.folder
    lab.drawer.draw_arms([Arm(name, template.format(phrase), vectors, images)], folder, target.title)
    return [folder / name / f"{seed}.png" for seed in range(images)]


def load_real_images(lab: Lab, count: int) -> Sets:
    """`count` real pictures or more of every class, from the setting real_images, a folder or a world that draws them.

    A UserError where a class has fewer.
    """
    source = lab.config.real_images
    require(source, "this experiment needs real pictures: give --real_images a folder with one folder per class")
    found = find_real_images(source, lab.names, lab.labels,
                             {target: lab.work / "real" / target.folder for target in lab.targets}, count)
    few = [f"{target.title} {len(files)}" for target, files in found.items() if len(files) < count]
    require(not few, f"{count} real pictures per class are needed, and there are of class {', '.join(few)}")
    return {target: draw_missing_images(source, target, files) for target, files in found.items()}


def measure_accuracy(lab: Lab, sets: Sets) -> Proportion:
    """The share of all classes' pictures that the judge takes for their class."""
    return count_right(right for target, files in sets.items()
                       for right in judge_images(lab.get_judge(), files, target.index).right)


def publish_result(lab: Lab, name: str, claim: str, sentence: str, table: Table, data: dict, figure: str | None = None):
    """Write <name>.md and <name>.json, list all results in README.md beside them, and print the table and `sentence`.

    `data` goes into the JSON file and may hold Proportions.
    """
    command = shlex.join(["python", "-m", f"experiments.{name}", *lab.flags])
    paragraphs = (f"# {claim}", sentence, table.to_markdown(), table.note, f"![{claim}]({figure})" if figure else "",
                  f"`{command}`")
    write_text(lab.out / f"{name}.md", "\n\n".join(filter(None, paragraphs)) + "\n")
    result = {"claim": claim, "command": command, "found": sentence, "figure": figure, **data,
              "config": {**asdict(lab.config), "output_path": "."}}
    write_json(lab.out / f"{name}.json", json.loads(json.dumps(result, default=asdict)))
    index = Table(["claim", "command", "figure", "what we found", "paper"], [])
    for path in sorted(lab.out.glob("*.json")):
        found = read_json(path, "claim", "command", "figure", "found")
        index.rows.append([found["claim"], f"`{found['command']}`",
                           f"[{path.stem}]({found['figure'] or path.stem + '.md'})",
                           f"{found['found']} [more]({path.stem}.md)", ""])
    write_text(lab.out / "README.md", "# Results\n\nEach row is written by its command, with a page of its own beside "
               "it. 'Right' is by an evaluator that did not guide. The paper's column is empty: its tables are not at "
               f"hand.\n\n{index.to_markdown()}\n")
    print(table.to_markdown(), f"\n{sentence}")


def new_axes(width: float, height: float, columns: int = 1):
    """A figure (inches) and its axes, an array of them for several columns."""
    figure = Figure((width, height))
    axes = figure.subplots(1, columns, sharey=True)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, path: Path):
    """Write a PNG, with a legend of what is labelled in its first axes."""
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(frameon=False, fontsize=8)
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})


def run_script(main: Callable[[], None]):
    """Run an experiment; a user error is one line and exit code 2."""
    sys.exit(exit_code(main))
