"""What every experiment shares: its options, tokens and pictures that are made once, and the page of its result.

What was made is found again by a digest of all that decides it: other settings, another folder.
"""

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

from command_line import parse_settings
from config import RunConfig, names_deciding
from evaluation.accuracy import judge_images
from evaluation.images import Arm, Drawer, digest_json
from evaluation.pictures import draw_sheet
from evaluation.real_images import draw_missing_images, find_real_images
from evaluation.statistics import Proportion, count_right
from evaluation.tables import Table
from method.class_training import TrainingSettings
from method.losses import build_loss
from models.classifiers import Classifier, load_classifier, load_evaluator, load_labels
from models.generator import PRECISIONS, Generator, load_generator
from models.labels import read_labels, resolve_name
from models.sampling import SamplingSettings
from prompt_datasets import TEMPLATES, TargetClass, class_names, select_classes
from runs.folders import RunFolder
from runs.start import pin_checkpoints
from runs.sweep import Sweep, TrainingJob, choose_device, work_on_classes
from system.paths import list_checkpoint_files, read_path, stamp_file
from system.terminal import exit_code
from system.text_files import read_json
from tokens.class_token import load_token, names_file
from utils import ROOT, require, write_json, write_text

Sets = dict[TargetClass, list[Path]]  # pictures by class
Vectors = dict[TargetClass, torch.Tensor | None]  # [K, D] by class, None without a token
load_once = functools.cache(load_classifier)
EXPLORATORY, TESTED, SHOWN = "exploratory", "tested", "shown"  # kinds of studies, as protocol.md says
MINIATURE = "configs/miniature_guided.yml"  # the studies' settings
WORLD = "miniature.world:draw"  # the miniature's source of real pictures
QUICK = {"num_train_epochs": 2, "epoch_size": 4, "num_inference_steps": 3, "test_size": 2}
HELP = {  # of the flags of single experiments
    "images": "held-out pictures per class", "seeds": "trainings, each with noise or pictures of its own",
    "epoch_size": "pictures per update", "updates": "of a training, at most", "steps": "of the training",
    "real_images": "a folder of real pictures instead of the config's", "k": "real pictures per class to learn from",
    "trained": "for which k the costly arms run too", "test": "real pictures per class for the test",
    "inversion_steps": "of textual inversion", "nearest_k": "neighbours of coverage",
    "truth": "real pictures per class to be covered", "drawings": "new drawings to train on",
    "guide_steps": "of the guides' training", "other": "the other generator (the run's own, trained further)"}


class Lab(NamedTuple):
    """An experiment's settings and classes, its models, loaded when first needed, and its folders."""

    options: argparse.Namespace
    config: RunConfig
    labels: list[str]
    targets: list[TargetClass]
    work: Path  # tokens and pictures
    out: Path  # results
    get_generator: Callable[[], Generator]
    get_guide: Callable[[], Classifier]
    get_judge: Callable[[], Classifier]  # the evaluator, or the guide where the config has none
    drawer: Drawer
    loop: tuple = ()  # what an experiment changes in the loop itself


def parse_options(doc: str, argv: list[str] | None, class_index: str, quick: dict | None = None,
                  **flags) -> argparse.Namespace:
    """The options of an experiment, of the miniature's classes by default; its own `flags` with their defaults.

    `quick` are those under --quick.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=MINIATURE, help="settings, such as configs/imagenet.yml (the miniature's)")
    parser.add_argument("--class_index", help=f"which classes, as for run.py (of the miniature: {class_index})")
    parser.add_argument("--work", type=read_path, help="keeps what is made for the next call (a folder in img/)")
    parser.add_argument("--out", type=read_path, help="where results go (in docs/)")
    parser.add_argument("--quick", action="store_true", help="whether it runs, not what it finds: two classes, two "
                        "updates and a few pictures, all in img/results/quick")
    for name, default in flags.items():
        kind = {"type": str} if default is None else {"type": int, "nargs": "+" if isinstance(default, list) else None}
        parser.add_argument(f"--{name}", default=default, help=f"{HELP.get(name, name)} ({default})", **kind)
    options = parser.parse_args(argv)
    if options.quick:
        parser.set_defaults(**{"class_index": "7,8", **(quick or {})})
        options = parser.parse_args(argv)
    options.given = ["--quick"] * options.quick + [
        word for name, value in vars(options).items()
        if name not in ("work", "out", "quick") and value != parser.get_default(name)
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]
    options.class_index = options.class_index or (class_index if options.config == MINIATURE else "")
    return options


def open_lab(options: argparse.Namespace, **changes) -> Lab:
    """The lab of `options`; `changes` are settings that the experiment itself decides.

    A UserError where settings cannot work, or training may have seen the seeds of `options.images`.
    """
    given, name = vars(options), Path(options.config).stem
    if given.get("real_images"):
        changes["real_images"] = options.real_images
    work = options.work or Path("img/results", "quick" if options.quick else name)
    config, _ = parse_settings(["--config", options.config])
    config = replace(config, **{"class_index": options.class_index, "train": True, "output_path": str(work), **changes,
                                **(QUICK if options.quick else {})})
    config.validate_settings()
    config = pin_checkpoints(config)
    images, seed = given.get("images", 0), config.seed
    require(images <= seed, f"--images {images} would judge seeds that training uses, from {seed} on: give fewer")
    choose_device(config.device, config.mixed_precision, local_rank=-1)
    labels = load_labels(config.classifier, config.labels)
    targets = select_classes(config.class_index, labels, class_names(labels, config.class_names))
    get_generator = functools.cache(lambda: open_generator(config))
    drawn_by = {"weights": list_checkpoint_files(config.model), **config.pick_settings(names_deciding("pictures"))}
    sampling = SamplingSettings(**config.sampling_settings())
    results = work / "docs" if options.quick else ROOT / "docs/results" / ("" if options.config == MINIATURE else name)
    return Lab(options, config, labels, targets, work, options.out or results, get_generator,
               functools.partial(load_once, config.classifier, config.device, labels_file=config.labels),
               functools.cache(lambda: load_judge(config, labels)),
               Drawer(get_generator, sampling, drawn_by, config.device, config.batch_size))


def load_judge(config: RunConfig, labels: list[str]) -> Classifier:
    """The evaluator, which must know the guide's classes, `labels`; or the guide where the config has none."""
    if not config.evaluator:
        return load_once(config.classifier, config.device, labels_file=config.labels)
    return load_evaluator(config.evaluator, labels, config.device, labels_file=config.labels)


def open_generator(config: RunConfig) -> Generator:
    generator = load_generator(config.model, config.device, PRECISIONS[config.mixed_precision],
                               config.gradient_checkpointing, config.torch_compile)
    generator.set_placeholder(config.placeholder_token)
    training_sampling = method_settings(config)[1]
    generator.check_sampling(training_sampling, is_training=True)
    for mismatch in generator.describe_mismatches(training_sampling):
        print(f"warning: '{config.model}': {mismatch}", file=sys.stderr)
    return generator


def method_settings(config: RunConfig) -> tuple[TrainingSettings, SamplingSettings]:
    """What training takes of a config."""
    return (TrainingSettings(**config.pick_settings(TrainingSettings._fields)),
            SamplingSettings(**config.sampling_settings(training=True)))


def digest_training(config: RunConfig, **more) -> str:
    """A folder's name for all that decides what is learned: settings, weights, and what an experiment adds."""
    decisive = config.pick_settings((*names_deciding("token"), "real_images"))
    weights = [list_checkpoint_files(source) for source in (config.model, resolve_name(config.classifier)[1])]
    if config.labels:
        more["labels"] = read_labels(config.labels)  # the file may have changed
    if names_file(config.initializer_token):
        more["initializer"] = stamp_file(Path(config.initializer_token))
    return digest_json([decisive, weights, more])[:12]


def stamp_sets(sets: Sets) -> dict[int, list]:
    """What tells by number that pictures of a class were replaced."""
    return {target.number: [stamp_file(file) for file in files] for target, files in sets.items()}


def learn_tokens(lab: Lab, targets: list[TargetClass] | None = None, **changes) -> dict[TargetClass, RunFolder]:
    """The run folders of these classes (of all), trained where they are not yet; `changes` to the lab's settings.

    A UserError where a class fails, or other processes are training some.
    """
    config = replace(lab.config, **{"classes_at_once": 8, **changes, **(QUICK if lab.options.quick else {})})
    config.exp_id = digest_training(config, **({"loop": lab.loop} if lab.loop else {}))
    config.validate_settings()
    folders = {target: RunFolder(config.output_path, config.classifier, target, config.exp_id, asdict(RunConfig()))
               for target in targets or lab.targets}
    sweep = Sweep(list(folders.values()), lambda folder: folder.token_file.exists(), start_over=False)
    errors = work_on_classes(sweep, TrainingJob(
        lab.get_generator, lambda: build_loss(
            config.loss, load_once(config.classifier, config.device, labels_file=config.labels), lab.get_generator()),
        *method_settings(config), asdict(config), names_deciding("token"), config.classes_at_once, config.batch_size),
        evaluate_class=lambda folder: None)
    if errors:
        raise errors[0]
    others = [folder.target.title for folder in sweep.left_to_others()]
    require(not others, f"other processes are training class {', '.join(others)}: run this again when they are done")
    return folders


def load_vectors(folders: dict[TargetClass, RunFolder]) -> Vectors:
    return {target: load_token(folder.token_file).vectors for target, folder in folders.items()}


def measure_cost(folders: dict[TargetClass, RunFolder], key: str) -> float:
    """The mean 'updates' or 'seconds' of these trainings."""
    return mean(read_json(folder.cost_file, key)[key] for folder in folders.values())


def cached_result(lab: Lab, make: Callable[[], object], **settings):
    """What `make` returned in an earlier call with the same lab and settings (as JSON stores it), or returns now."""
    file = lab.work / "cached" / f"{digest_training(lab.config, **settings)}.json"
    if not file.exists():
        write_json(file, {"settings": settings, "value": make()})
    return read_json(file, "value")["value"]


def draw_sets(lab: Lab, vectors: Vectors, images: int, template: str = TEMPLATES[0], phrase: str | None = None) -> Sets:
    """Seeds 0 to images - 1 of every class with its vectors or without, drawn where missing.

    With vectors, `phrase` takes the place of '<placeholder> <class name>' in the template.
    """
    sets = {}
    for target, of_class in vectors.items():
        words = phrase or f"{lab.config.placeholder_token} {target.name}"
        arm = Arm("", template.format(target.name if of_class is None else words), of_class, images)
        arm = arm._replace(folder=digest_json(lab.drawer.describe_arms([arm]))[:12])
        folder = lab.work / "pictures" / target.folder
        lab.drawer.draw_arms([arm], folder, target.title)
        sets[target] = [folder / arm.folder / f"{seed}.png" for seed in range(images)]
    return sets


def load_real_images(lab: Lab, count: int) -> Sets:
    """`count` real pictures or more of every class, from the setting real_images, a folder or a world that draws them.

    A UserError where a class has fewer.
    """
    source = lab.config.real_images
    require(source, "this experiment needs real pictures: give --real_images a folder with one folder per class")
    found = find_real_images(source, select_classes("all", lab.labels, class_names(lab.labels, lab.config.class_names)),
                             {target: lab.work / "real" / target.folder for target in lab.targets}, count,
                             lab.work / "cache")
    few = [f"{target.title} {len(files)}" for target, files in found.items() if len(files) < count]
    require(not few, f"{count} real pictures per class are needed, and there are of class {', '.join(few)}")
    return {target: draw_missing_images(source, target, files) for target, files in found.items()}


def measure_accuracy(lab: Lab, sets: Sets) -> Proportion:
    """The share of all classes' pictures that the judge takes for their class."""
    return count_right(right for target, files in sets.items()
                       for right in judge_images(lab.get_judge(), files, target.index).right)


def show_sets(lab: Lab, arms: dict[str, Sets], path: Path, title: str = "", count: int = 8):
    """Write a sheet of every arm's first pictures, of four classes at most."""
    shown = lab.targets[::max(1, len(lab.targets) // 4)][:4]
    draw_sheet([(f"{target.label}: {arm}", sets[target][:count]) for target in shown for arm, sets in arms.items()],
               path, cell=72, title=title)


def publish_result(lab: Lab, name: str, kind: str, claim: str, sentence: str, header: list[str], rows: list[list],
                   note: str, data: dict, paper: str = ""):
    """Write <name>.md, which shows <name>.png, and <name>.json, list all results in README.md, and print the table.

    `kind` is one of protocol.md's, `paper` what the authors say to it. `data` goes into the JSON file and may hold
    Proportions.
    """
    command, table = shlex.join(["python", "-m", f"experiments.{name}", *lab.options.given]), Table(header, rows)
    judge = f"{'the evaluator' if lab.config.evaluator else 'the guide itself,'} '{lab.get_judge().name}'"
    write_text(lab.out / f"{name}.md",
               f"# {claim}\n\n{sentence}\n\n{table.to_markdown()}\n\n{note} Judged by {judge}. A study of the kind "
               f"'{kind}': see the [protocol](README.md#protocol).\n\n![{claim}]({name}.png)\n\n`{command}`\n")
    result = {"claim": claim, "kind": kind, "command": command, "found": sentence, "figure": f"{name}.png",
              "paper": paper, **data, "config": {**asdict(lab.config), "output_path": "."}}
    write_json(lab.out / f"{name}.json", json.loads(json.dumps(result, default=asdict)))
    index = Table(["claim", "kind", "command", "figure", "what we found", "the paper"], [])
    for path in sorted(lab.out.glob("*.json")):
        found = read_json(path, "claim", "kind", "command", "figure", "found", "paper")
        index.rows.append([found["claim"], found["kind"], f"`{found['command']}`",
                           f"[{path.stem}]({found['figure']})", f"{found['found']} [more]({path.stem}.md)",
                           found["paper"]])
    protocol = (ROOT / "experiments/protocol.md").read_text(encoding="utf-8")
    write_text(lab.out / "README.md", f"{protocol}\n## Studies\n\nThe paper's column holds what its project page "
               f"says; the paper's tables are not at hand.\n\n{index.to_markdown()}\n")
    print(table.to_markdown(), f"\n{sentence}")


def run_script(main: Callable[[], None]):
    """Run an experiment; a user error is one line and exit code 2."""
    if code := exit_code(main):
        sys.exit(code)
