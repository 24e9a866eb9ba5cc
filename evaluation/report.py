"""One HTML page over the classes of a run: self-contained, or with links to the pictures where classes are many.

    python -m evaluation.report img/inet/*/demo              writes report.html where you are
    python -m evaluation.report img/inet/*/demo --out my_report.html
"""

import argparse
import datetime
import functools
import io
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import matplotlib
import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.accuracy import (
    accuracy_table,
    contexts_table,
    list_differences,
    load_metrics,
    pool_accuracy,
)
from evaluation.attention import WORDS
from evaluation.fidelity import fidelity_table
from evaluation.files import MANY, RunFiles, locate_run
from evaluation.images import ORACLE, choose_evenly
from evaluation.pictures import (
    caption_image,
    draw_sheet,
    encode_address,
    inline_image,
    save_animation,
    shrink_image,
)
from method.class_training import HISTORY_KEYS
from prompt_datasets import class_title
from system.paths import read_path
from system.tensor_files import read_tensors, save_image
from system.terminal import exit_code
from system.text_files import read_json, read_json_lines, read_yaml
from utils import require, write_text

SHOWN = 10  # pictures per row
GREY, BLUE, ORANGE = "#8a9099", "#3f8fdc", "#d08a35"  # readable on white and on near-black


def list_shown(files: RunFiles, found: dict) -> dict[str, list[Path]]:
    """By the name of their row: the first pictures of the arms in metrics `found`, and real ones if any."""
    rows = {name: [files.eval_images / arm / f"{seed}.png" for seed in range(min(SHOWN, found["images"]))]
            for arm, name in (("without", "without"), ("with", "with token"), (ORACLE, "other words")) if arm in found}
    if found.get("nearest_words"):
        rows |= {f"its {word} looks at": sorted((files.eval_images / "attention" / word).glob("*.png"))
                 for word in WORDS}
    real = sorted((files.eval_images / "real").glob("[0-9].png"))
    return {**rows, "real": real} if real else rows


def show_side_by_side(files: RunFiles, title: str, found: dict, real: list[Path]):
    """Write grid.png: the first seeds of the arms in metrics `found`, and real pictures where given."""
    copies = files.eval_images / "real"  # small ones, so that a page reads nothing outside the folder of its run
    shutil.rmtree(copies, ignore_errors=not copies.exists())
    for number, file in enumerate(real[:SHOWN]):
        save_image(shrink_image(file, 256), copies / f"{number}.png")
    draw_sheet(list(list_shown(files, found).items()), files.grid_file, title=title)


def plot_curves(file: Path) -> str | None:
    """Loss and accuracy over the updates of history.jsonl, as SVG that goes into the page; None without the file."""
    if not file.exists():
        return None
    history = read_json_lines(file, *HISTORY_KEYS)
    left = Figure((5.2, 2.6)).subplots()
    right = left.twinx()
    for axis, key, colour in ((left, "loss", ORANGE), (right, "accuracy", BLUE)):
        values = np.array([line[key] for line in history], dtype=float)  # None, a non-finite loss, becomes nan
        axis.plot([line["update"] for line in history], values, "o-" if len(values) == 1 else "-", color=colour,
                  linewidth=1.6)
        axis.set_ylabel(key, color=colour)
        axis.tick_params(colors=GREY)
        axis.spines[:].set_color(GREY)
    right.set_ylim(-0.02, 1.02)
    left.set_xlabel("update", color=GREY)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawing = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "class tokens"}):  # the same curves are the same file
        left.figure.savefig(drawing, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    return drawing.getvalue()[drawing.getvalue().index("<svg"):]


def animate_updates(files: RunFiles, film: list[str]) -> str | None:
    """A GIF of one seed's picture by folders `film`, else of the most frequent seed in training; None without two."""
    drawn = [files.eval_images / folder / "0.png" for folder in film if re.fullmatch(r"updates/\d{3,6}", folder)]
    drawn = drawn or sorted(files.train_images.glob("*/*.png"))
    seeds = Counter(path.name for path in drawn).most_common(1)
    if not seeds or seeds[0][1] < 2:
        return None
    shots = [path for path in drawn if path.name == seeds[0][0]]
    gif = io.BytesIO()
    save_animation([caption_image(shots[i], f"update {int(shots[i].parent.name)}")
                    for i in choose_evenly(len(shots))], gif)
    return encode_address("gif", gif)


def describe_settings(files: RunFiles, metrics: dict) -> str:
    """As YAML: what the evaluation ran with, what the training did, and the token's own header with its versions."""
    settings = {"evaluation": metrics["settings"]}
    if metrics.get("nearest_words"):
        settings["nearest words of the vocabulary, and their cosine"] = metrics["nearest_words"]
    if files.config_file.exists():
        settings["training"] = read_yaml(str(files.config_file), "lr: 0.001")
    if files.token_file.exists():
        settings["token"] = dict(sorted(read_tensors(files.token_file)[1].items()))
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def link_image(path: Path, page: Path) -> str:
    """The address of a picture as seen from a page: of thousands each is loaded when it comes into sight."""
    seen_from_page = Path(os.path.relpath(path, page.parent))
    return quote(os.fsencode(seen_from_page.as_posix()))  # a name need not be UTF-8


def list_missing(files: RunFiles) -> list[str]:
    """What of a run the page cannot show, since its files are not beside the pictures."""
    shown = {files.history_file: "curves", files.config_file: "training settings", files.token_file: "the token"}
    return [f"{what} ({file})" for file, what in shown.items() if not file.exists()]


def load_comparable_metrics(runs: list[RunFiles]) -> list[dict]:
    """The metrics of several classes; a UserError where they cannot stand in one table."""
    for run in runs:
        require(run.metrics_file.is_file(), f"'{run.images}' holds no evaluation: give folders such as "
                "img/inet/0283_tiger_cat/demo after `python run.py ... --evaluate True`")
    metrics = [load_metrics(run.metrics_file) for run in runs]
    others = dict.fromkeys(name for found in metrics for name in list_differences(found, metrics[0]))
    require(not others, f"these classes were evaluated with another {', '.join(others)}: evaluate them alike")
    (number, count), = Counter(found["class_index"] for found in metrics).most_common(1)
    require(count == 1, f"class {number} is there twice: give one of its folders")
    return metrics


def write_report(runs: list[RunFiles], out: Path):
    """One self-contained page over classes of a run, with distances if the summary has them of just these classes."""
    metrics, summary = load_comparable_metrics(runs), runs[0].summary_file
    tables = [accuracy_table(metrics)] + [contexts_table(metrics)] * bool(metrics[0]["contexts"])
    distances = read_json(summary, "distribution")["distribution"] if summary.exists() else None
    if distances and distances.get("pictures") == {str(found["class_index"]): found["pictures"] for found in metrics}:
        tables.append(fidelity_table(distances))
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    briefly = len(runs) > MANY
    environment.globals |= {function.__name__: function for function in (
        animate_updates, class_title, describe_settings, list_missing, list_shown, plot_curves, pool_accuracy)}
    address = functools.partial(link_image, page=out) if briefly else functools.partial(inline_image, side=192)
    write_text(out, environment.get_template("report.html").render(
        show_image=address, date=datetime.date.today().isoformat(), metrics=metrics, tables=tables, briefly=briefly,
        held_out=all(found["held_out"] for found in metrics), classes=list(zip(runs, metrics, strict=True))))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=read_path, metavar="RUN_DIR", help="img/<classifier>/<class>/<run>")
    parser.add_argument("--out", type=read_path, default="report.html", help="the page to write (report.html)")

    def make_report():
        arguments = parser.parse_args(argv)
        write_report([locate_run(run) for run in arguments.runs], arguments.out)
        print(f"report: {arguments.out}")

    return exit_code(make_report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
