"""One HTML page over the classes of a run.

Self-contained, or with links to the pictures where classes are many.

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

from evaluation.accuracy import accuracy_table, contexts_table, list_differences, pool_accuracy
from evaluation.attention import WORDS
from evaluation.drawing import BETTER_WORDS, choose_evenly
from evaluation.fidelity import fidelity_table
from evaluation.files import MANY, RunFiles, locate_run
from evaluation.metrics import ClassMetrics, load_metrics
from evaluation.sheets import (
    caption_image,
    draw_sheet,
    encode_address,
    inline_image,
    save_animation,
    shrink_image,
)
from evaluation.tables import Table
from method.class_training import HISTORY_KEYS
from prompt_datasets import class_title
from system.paths import read_path
from system.tensor_files import read_tensors, save_image
from system.terminal import exit_code
from system.text_files import read_json, read_json_lines, read_yaml
from utils import require, write_text

SHOWN = 10  # pictures per row
COPIED_SIDE, INLINED_SIDE = 256, 192  # pixels at most, of real pictures' copies and of a page's
GREY, BLUE, ORANGE = "#8a9099", "#3f8fdc", "#d08a35"  # readable on white and on near-black
ROW_TITLES = {"without": "without", "with": "with token", BETTER_WORDS: "better words"}


def list_shown(files: RunFiles, found: ClassMetrics) -> dict[str, list[Path]]:
    """List, by the title of their row, a class's first pictures, and real ones if any."""
    seeds = range(min(SHOWN, found.images))
    rows = {}
    for condition, title in ROW_TITLES.items():
        if condition in found.conditions:
            folder = files.eval_images / condition
            rows[title] = [folder / f"{seed}.png" for seed in seeds]
    if found.nearest_words:
        for word in WORDS:
            maps = files.eval_images / "attention" / word
            rows[f"its {word} looks at"] = sorted(maps.glob("*.png"))
    real = sorted((files.eval_images / "real").glob("[0-9].png"))
    if real:
        rows["real"] = real
    return rows


def show_side_by_side(files: RunFiles, title: str, found: ClassMetrics, real: list[Path]):
    """Write grid.png: a class's first pictures, and real ones if given.

    Real ones are copied, reduced, so that a page reads nothing outside its run's folder.
    """
    copies = files.eval_images / "real"
    if copies.exists():
        shutil.rmtree(copies)
    for number, file in enumerate(real[:SHOWN]):
        save_image(shrink_image(file, COPIED_SIDE), copies / f"{number}.png")
    draw_sheet(list(list_shown(files, found).items()), files.grid_file, title=title)


def plot_curves(file: Path) -> str | None:
    """Plot loss and accuracy over the updates of history.jsonl, as SVG for the page.

    Returns None without the file.
    """
    if not file.exists():
        return None
    history = read_json_lines(file, *HISTORY_KEYS)
    updates = [line["update"] for line in history]
    left = Figure((5.2, 2.6)).subplots()
    right = left.twinx()
    for axis, key, colour in ((left, "loss", ORANGE), (right, "accuracy", BLUE)):
        # None, a non-finite loss, becomes nan
        values = np.array([line[key] for line in history], dtype=float)
        style = "o-" if len(values) == 1 else "-"
        axis.plot(updates, values, style, color=colour, linewidth=1.6)
        axis.set_ylabel(key, color=colour)
        axis.tick_params(colors=GREY)
        axis.spines[:].set_color(GREY)
    right.set_ylim(-0.02, 1.02)
    left.set_xlabel("update", color=GREY)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    return draw_svg(left.figure)


def draw_svg(figure: Figure) -> str:
    """Return a figure as an <svg> element; the same figure gives the same text."""
    drawing = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "class tokens"}):
        figure.savefig(
            drawing, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
    text = drawing.getvalue()
    return text[text.index("<svg") :]


def animate_updates(files: RunFiles, film: list[str]) -> str | None:
    """Make a GIF of one seed's picture over the updates; None with fewer than two pictures.

    Uses the folders `film`, or else the most frequent seed in training.
    """
    drawn = []
    for folder in film:
        if re.fullmatch(r"updates/\d{3,6}", folder):
            drawn.append(files.eval_images / folder / "0.png")
    if not drawn:
        drawn = sorted(files.train_images.glob("*/*.png"))
    seeds = Counter(path.name for path in drawn).most_common(1)
    if not seeds:
        return None
    (seed, count), *_ = seeds
    if count < 2:
        return None
    shots = [path for path in drawn if path.name == seed]
    frames = []
    for i in choose_evenly(len(shots)):
        frames.append(caption_image(shots[i], f"update {int(shots[i].parent.name)}"))
    gif = io.BytesIO()
    save_animation(frames, gif)
    return encode_address("gif", gif)


def describe_settings(files: RunFiles, metrics: ClassMetrics) -> str:
    """Return as YAML the settings of the evaluation and of the training, and the token's header."""
    settings = {"evaluation": metrics.settings}
    if metrics.nearest_words:
        settings["nearest words of the vocabulary, and their cosine"] = metrics.nearest_words
    if files.config_file.exists():
        settings["training"] = read_yaml(str(files.config_file), "lr: 0.001")
    if files.token_file.exists():
        _, header = read_tensors(files.token_file)
        settings["token"] = dict(sorted(header.items()))
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def link_image(path: Path, page: Path) -> str:
    """Return the address of a picture relative to a page.

    Images load when they come into sight, since there may be thousands.
    """
    seen_from_page = Path(os.path.relpath(path, page.parent))
    return quote(os.fsencode(seen_from_page.as_posix()))  # a name need not be UTF-8


def list_missing(files: RunFiles) -> list[str]:
    """List what the page cannot show of a run, because the files are not beside the pictures."""
    shown = {
        files.history_file: "curves",
        files.config_file: "training settings",
        files.token_file: "the token",
    }
    return [f"{what} ({file})" for file, what in shown.items() if not file.exists()]


def load_comparable_metrics(runs: list[RunFiles]) -> list[ClassMetrics]:
    """Load the metrics of several classes; raise UserError if they cannot share a table."""
    metrics = []
    for run in runs:
        require(
            run.metrics_file.is_file(),
            f"'{run.images}' holds no evaluation: give folders such as img/inet/0283_tiger_cat/demo"
            " after `python run.py ... --evaluate True`",
        )
        metrics.append(load_metrics(run.metrics_file))
    others = []
    for found in metrics:
        others += list_differences(found, metrics[0])
    differences = ", ".join(dict.fromkeys(others))
    require(
        not others, f"these classes were evaluated with another {differences}: evaluate them alike"
    )
    numbers = Counter(found.class_index for found in metrics)
    (number, count), *_ = numbers.most_common(1)
    require(count == 1, f"class {number} is given twice: give one of its folders")
    return metrics


def list_tables(metrics: list[ClassMetrics], summary: Path) -> list[Table]:
    """List the tables of a page; distances only if the summary has them for these pictures."""
    tables = [accuracy_table(metrics)]
    if metrics[0].contexts:
        tables.append(contexts_table(metrics))
    if summary.exists():
        distances = read_json(summary, "distribution")["distribution"]
        pictures = {str(found.class_index): found.pictures for found in metrics}
        if distances and distances.get("pictures") == pictures:
            tables.append(fidelity_table(distances))
    return tables


def write_report(runs: list[RunFiles], out: Path):
    """Write one self-contained page about classes of a run."""
    metrics = load_comparable_metrics(runs)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        animate_updates,
        class_title,
        describe_settings,
        list_missing,
        list_shown,
        plot_curves,
        pool_accuracy,
    ):
        environment.globals[function.__name__] = function
    briefly = len(runs) > MANY
    if briefly:
        show_image = functools.partial(link_image, page=out)
    else:
        show_image = functools.partial(inline_image, side=INLINED_SIDE)
    page = environment.get_template("report.html").render(
        show_image=show_image,
        date=datetime.date.today().isoformat(),
        metrics=metrics,
        conditions=[found.conditions for found in metrics],
        tables=list_tables(metrics, runs[0].summary_file),
        briefly=briefly,
        held_out=all(found.held_out for found in metrics),
        classes=list(zip(runs, metrics, strict=True)),
    )
    write_text(out, page)


def make_report(argv: list[str]):
    """Write the page that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=read_path,
        metavar="RUN_DIR",
        help="img/<classifier>/<class>/<run>",
    )
    parser.add_argument(
        "--out", type=read_path, default="report.html", help="the page to write (report.html)"
    )
    arguments = parser.parse_args(argv)
    write_report([locate_run(run) for run in arguments.runs], arguments.out)
    print(f"report: {arguments.out}")


def main(argv: list[str]) -> int:
    """Do what the command line asks for; the exit code: 2 for a user error."""
    return exit_code(lambda: make_report(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
