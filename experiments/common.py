"""What every experiment shares: its arguments, tokens by run.py itself, pictures that are drawn once, its page."""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch

import class_token
import run
from class_token import TOKEN_FILE
from classifiers import Classifier, load_classifier, load_labels
from config import RunConfig, parse, to_yaml
from diffusion import Components
from evaluation import Arm, drawing, generate, judge_images
from metrics import Proportion, wilson
from outputs import output_folders
from prompt_datasets import TEMPLATES, class_folder, class_names, class_title, select_classes
from real import drawn, real_pictures
from utils import ROOT, UserError, require, write_json, write_text

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


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


def parser(doc: str, class_index: str) -> argparse.ArgumentParser:
    """Arguments of every experiment; `class_index` is what it is about where nothing is said."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config", default="configs/miniature.yml", help="settings of the run (the miniature's); "
                                                                             "configs/imagenet.yml, inat.yml, cub.yml")
    arguments.add_argument("--class_index", default=class_index, help=f"which classes, as for run.py ({class_index})")
    arguments.add_argument("--work", type=Path, default=Path("img/results"),
                           help="keeps tokens and pictures, so that a killed experiment goes on (img/results)")
    arguments.add_argument("--out", type=Path, default=ROOT / "docs/results", help="(docs/results)")
    return arguments


def open_lab(arguments: argparse.Namespace, **changes) -> Lab:
    """The lab of `arguments`; `changes` to the settings are of the experiment."""
    flags = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
    config, _ = parse(["--config", arguments.config, "--class_index", arguments.class_index, "--train", "True",
                       "--output_path", str(arguments.work), *flags])
    config.validate()
    labels = load_labels(config.classifier)
    names = class_names(labels, config.class_names)
    classes = select_classes(arguments.class_index, labels, names)
    return Lab(config, labels, names, classes, arguments.work, arguments.out,
               functools.cache(lambda: run.load_generator(config, [names[index] for index in classes])),
               functools.cache(lambda: load_classifier(config.classifier, config.device)),
               functools.cache(lambda: load_classifier(config.evaluator or config.classifier, config.device)),
               drawing(config))


def tokens(lab: Lab, exp_id: str, *flags: str, classes: list[int] | None = None) -> dict[int, Path]:
    """The run folders pipeline_token/... of these classes, trained by run.py where they are not yet.

    Raises:
        UserError: run.py failed.
    """
    classes = lab.classes if classes is None else classes
    settings = lab.work / "config.yml"
    write_text(settings, to_yaml(lab.config))
    numbers = ",".join(str(index + 1) for index in classes)
    command = ["--config", str(settings), "--class_index", numbers, "--train", "True", "--evaluate", "False",
               "--skip_exists", "True", "--exp_id", exp_id, "--classes_at_once", "8", *flags]
    config, _ = parse(command)
    folders = {index: output_folders(config, index, lab.names[index])[0] for index in classes}
    missing = [index for index, folder in folders.items() if not (folder / TOKEN_FILE).exists()]
    if missing:
        started, file = time.monotonic(), lab.work / f"{exp_id}_seconds.json"
        done = run.main(command)
        share = (time.monotonic() - started) / len(missing)
        write_json(file, {**seconds_of(file), **{str(index + 1): share for index in missing}})
        require(done == 0, f"run.py {' '.join(command)} failed")
    return folders


def seconds_of(file: Path) -> dict[str, float]:
    """{class number: seconds} of its training; of one that was killed and went on, those since."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def vector_of(folder: Path) -> torch.Tensor:
    return class_token.load(folder / TOKEN_FILE)[1]


def updates_of(folder: Path) -> list[dict]:
    """The training's history, a line an update."""
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


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
    few = [lab.title(index) for index, files in found.items() if len(files) < count]
    require(not few, f"fewer than {count} real pictures of class {', '.join(few)}")
    return found


def share_right(lab: Lab, sets: dict[int, list[Path]]) -> Proportion:
    """Over all classes {index: pictures}, how many are what they should be, by the judge."""
    right = [each for index, files in sets.items() for each in judge_images(lab.judge(), files, index)["right"]]
    return wilson(sum(right), len(right))


def shown(share: Proportion) -> str:
    return f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]"


def markdown(header: list[str], rows: list[list]) -> list[str]:
    return [f"| {' | '.join(map(str, line))} |" for line in (header, ["---"] * len(header), *rows)]


def publish(lab: Lab, name: str, claim: str, sentence: str, header: list[str], rows: list[list], data: dict,
            notes: str = "", figure: str | None = None):
    """Write <name>.md and <name>.json and list it in README.md under the results' folder; print the finding."""
    command = f"python -m experiments.{name}"
    lines = [f"# {claim}", "", sentence, "", *markdown(header, rows), "", notes, "",
             *([f"![{claim}]({figure})", ""] if figure else []), f"`{command}`", ""]
    write_text(lab.out / f"{name}.md", "\n".join(lines))
    write_json(lab.out / f"{name}.json", {"claim": claim, "command": command, "found": sentence, "figure": figure,
                                          **data})
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(lab.out.glob("*.json"))}
    table = markdown(["claim", "command", "figure", "what we found", "paper"],
                     [[result["claim"], f"`{result['command']}`",
                       f"[{stem}]({result['figure'] or stem + '.md'})", result["found"], ""]
                      for stem, result in results.items()])
    write_text(lab.out / "README.md", "\n".join([
        "# Results", "", "Each row is written by its command, all of them by `make reproduce`, on the miniature unless "
        "a file says otherwise. The paper's column is empty: its tables are not at hand.", "", *table, ""]))
    print("\n".join(markdown(header, rows)), f"\n{sentence}")


def save_figure(figure, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def script(main: Callable[[], None]):
    """Run an experiment; what the user can mend is one line."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
