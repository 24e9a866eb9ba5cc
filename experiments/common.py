"""What every experiment shares: its arguments, tokens by run.py itself, pictures that are drawn once, its page."""

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch

import class_token
import run
from classifiers import Classifier, load_classifier, load_labels
from config import RunConfig, as_typed, parse, to_yaml
from diffusion import Components
from evaluation import Arm, drawing, generate, judge_images
from metrics import Proportion, wilson
from outputs import COST_FILE, is_trained, output_folders
from prompt_datasets import TEMPLATES, class_folder, class_names, class_title, select_classes
from real import drawn, real_pictures
from utils import ROOT, UserError, replacing, require, write_json, write_text

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

MINIATURE = "configs/miniature.yml"


class Lab(NamedTuple):
    """The models of an experiment, loaded when first needed, and where it works and writes its results."""

    config: RunConfig
    labels: list[str]
    names: list[str]
    classes: list[int]  # from 0
    work: Path
    out: Path
    generator: Callable[[], tuple[Components, int]]
    guide: Callable[[], Classifier]
    judge: Callable[[], Classifier]  # the evaluator, or the guide where the config has none
    draw_batch: Callable

    def title(self, index: int) -> str:
        return class_title(index, self.labels[index])

    @property
    def judged(self) -> str:
        """Who says what is right, for the notes under a table."""
        judge = self.judge().name
        return f"the evaluator '{judge}'" if self.config.evaluator else f"'{judge}', which also guided the training"


def parser(doc: str, class_index: str) -> argparse.ArgumentParser:
    """Arguments of every experiment; `class_index` is what it is about on the miniature where nothing is said."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config", default=MINIATURE, help="settings of the run (the miniature's); "
                                                               "configs/imagenet.yml, inat.yml, cub.yml")
    arguments.add_argument("--class_index", help=f"which classes, as for run.py (of the miniature: {class_index})")
    arguments.add_argument("--work", type=Path, help="keeps tokens and pictures, so that a killed experiment goes on "
                                                     "(img/results/<config>)")
    arguments.add_argument("--out", type=Path, help="(docs/results; of another config its own folder in there)")
    arguments.set_defaults(of_the_miniature=class_index)
    return arguments


def open_lab(arguments: argparse.Namespace, **changes) -> Lab:
    """The lab of `arguments`; `changes` to the settings are of the experiment.

    Raises:
        UserError: settings that cannot work, or `arguments.images` that training may have seen.
    """
    name = Path(arguments.config).stem
    out = ROOT / "docs/results" / ("" if arguments.config == MINIATURE else name)
    chosen = arguments.class_index or (arguments.of_the_miniature if arguments.config == MINIATURE else "")
    work = arguments.work or Path("img/results", name)
    flags = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
    config, _ = parse(["--config", arguments.config, "--class_index", chosen, "--train", "True",
                       "--output_path", str(work), *flags])
    config.validate()
    images = getattr(arguments, "images", 0)
    require(images <= config.seed, f"--images {images} would judge seeds that training uses, from {config.seed} on: "
                                   f"give {config.seed} or less")
    run.check_device(config.device, config.mixed_precision)
    labels = load_labels(config.classifier)
    names = class_names(labels, config.class_names)
    classes = select_classes(config.class_index, labels, names)
    return Lab(config, labels, names, classes, work, arguments.out or out,
               functools.cache(lambda: run.load_generator(config, [names[index] for index in classes])),
               functools.cache(lambda: load_classifier(config.classifier, config.device)),
               functools.cache(lambda: load_classifier(config.evaluator or config.classifier, config.device)),
               drawing(config))


def tokens(lab: Lab, exp_id: str, classes: list[int] | None = None, **changes) -> dict[int, Path]:
    """The run folders pipeline_token/... of these classes, trained by run.py where they are not yet.

    Raises:
        UserError: run.py failed, or there are tokens of other settings.
    """
    classes = lab.classes if classes is None else classes
    settings = lab.work / f"{exp_id}.yml"
    write_text(settings, to_yaml(lab.config))
    command = ["--config", str(settings), "--class_index", ",".join(str(index + 1) for index in classes),
               "--train", "True", "--evaluate", "False", "--skip_exists", "True", "--exp_id", exp_id,
               "--classes_at_once", "8", *(part for key, value in changes.items() for part in (f"--{key}", str(value)))]
    config, _ = parse(command)
    folders = {index: output_folders(config, index, lab.names[index])[0] for index in classes}
    try:
        there = sum(is_trained(config, folder) for folder in folders.values())
    except UserError as error:
        raise UserError(f"{error}; or another --work") from error
    if there < len(folders):
        require(run.main(command) == 0, f"run.py {shlex.join(command)} failed")
    return folders


def seconds_of(folder: Path) -> float:
    """What the training of one class took."""
    return json.loads((folder / COST_FILE).read_text(encoding="utf-8"))["seconds"]


def vector_of(folder: Path) -> torch.Tensor:
    return class_token.load(folder / class_token.TOKEN_FILE)[1]


def updates_of(folder: Path) -> list[dict]:
    """The training's history, a line an update."""
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def kept(file: Path, settings: dict, make: Callable[[], object]):
    """What `make` gave in an earlier call with the same settings (of JSON's kinds), or gives now."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    settings = json.loads(json.dumps(settings))
    if found.get("settings") != settings:
        found = {"settings": settings, "value": make()}
        write_json(file, found)
    return found["value"]


def settings_of(lab: Lab, **more) -> dict:
    """All that decides what is learned in a lab, and what an experiment adds to it."""
    unimportant = ("class_index", "exp_id", "output_path", "train", "evaluate", "skip_exists", "test_size",
                   "batch_size", "classes_at_once", "torch_compile", "gradient_checkpointing")
    return {**{name: value for name, value in as_typed(lab.config).items() if name not in unimportant}, **more}


def pictures(lab: Lab, index: int, name: str, vector: torch.Tensor | None, images: int,
             template: str = TEMPLATES[0], phrase: str | None = None) -> list[Path]:
    """Seeds 0 to images - 1 of a class without a token (None) or with one, drawn unless they are there, called `name`.

    `phrase` takes the place of '<placeholder> <class name>' in the template.
    """
    prompt = template.format(phrase or (lab.names[index] if vector is None else
                                        f"{lab.config.placeholder_token} {lab.names[index]}"))
    folder = lab.work / "pictures" / class_folder(index, lab.names[index])
    generate(lab.config, lab.generator, lab.title(index), [Arm(name, prompt, vector, images)], folder, lab.draw_batch)
    return [folder / name / f"{seed}.png" for seed in range(images)]


def real_pictures_of(lab: Lab, count: int) -> dict[int, list[Path]]:
    """At least `count` real pictures of every class, from --real_images; a world draws them.

    Raises:
        UserError: none are given, or a class has fewer.
    """
    source = lab.config.real_images
    require(source, "this experiment needs real pictures: give --real_images a folder with a folder a class")
    runs = {index: lab.work / "real" / class_folder(index, lab.names[index]) for index in lab.classes}
    found = {index: drawn(source, index, files)
             for index, files in real_pictures(source, lab.names, lab.labels, runs, count).items()}
    few = [f"{lab.title(index)} {len(files)}" for index, files in found.items() if len(files) < count]
    require(not few, f"{count} real pictures a class are needed, and there are of class {', '.join(few)}")
    return found


def share_right(lab: Lab, sets: dict[int, list[Path]]) -> Proportion:
    """Over all classes {index: pictures}, how many are what they should be, by the judge."""
    right = [each for index, files in sets.items() for each in judge_images(lab.judge(), files, index)["right"]]
    return wilson(sum(right), len(right))


def markdown(header: list[str], rows: list[list]) -> list[str]:
    return [f"| {' | '.join(map(str, line))} |" for line in (header, ["---"] * len(header), *rows)]


def publish(lab: Lab, name: str, claim: str, sentence: str, header: list[str], rows: list[list], data: dict,
            notes: str = "", figure: str | None = None):
    """Write <name>.md and <name>.json and list it in README.md under the results' folder; print the finding."""
    command = " ".join(["python -m", f"experiments.{name}", *asked()])
    lines = [f"# {claim}", "", sentence, "", *markdown(header, rows), "", notes, "",
             *([f"![{claim}]({figure})", ""] if figure else []), f"`{command}`", ""]
    write_text(lab.out / f"{name}.md", "\n".join(lines))
    write_json(lab.out / f"{name}.json", {"claim": claim, "command": command, "found": sentence, "figure": figure,
                                          **data, "config": {**asdict(lab.config), "output_path": "."}})
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(lab.out.glob("*.json"))}
    table = markdown(["claim", "command", "figure", "what we found", "paper"],
                     [[result["claim"], f"`{result['command']}`",
                       f"[{stem}]({result['figure'] or stem + '.md'})", f"{result['found']} [more]({stem}.md)", ""]
                      for stem, result in results.items()])
    write_text(lab.out / "README.md", "\n".join([
        "# Results", "", "Each row is written by its command, with a page of its own beside it. 'Right' is by an "
        "evaluator that did not guide. The paper's column is empty: its tables are not at hand.",
        "", *table, ""]))
    print("\n".join(markdown(header, rows)), f"\n{sentence}")


def asked() -> list[str]:
    """The arguments of this call, but for those that say where files go."""
    flags = sys.argv[1:]
    for where in ("--work", "--out"):
        if where in flags:
            at = flags.index(where)
            flags = flags[:at] + flags[at + 2:]
    return [shlex.quote(flag) for flag in flags]


def save_figure(figure, path: Path):
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def script(main: Callable[[], None]):
    """Run an experiment; what the user can mend is one line."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
