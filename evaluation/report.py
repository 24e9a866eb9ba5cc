"""One self-contained HTML page over the classes of a run.

    python -m evaluation.report img/inet/*/demo              writes report.html where you are
    python -m evaluation.report img/inet/*/demo --out my_report.html
"""

import argparse
import datetime
import io
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import yaml
from jinja2 import Environment, FileSystemLoader
from matplotlib.ticker import MaxNLocator

from evaluation.accuracy import ClassMetrics, accuracy_table, contexts_table, load_metrics, pool_accuracy
from evaluation.fidelity import fidelity_table
from evaluation.images import ARMS, CONTROLS, FRAMES
from evaluation.pictures import caption_image, draw_sheet, inline_animation, inline_image, list_numbered, shrink_image
from method.class_token import load_token
from method.trainer import HISTORY_KEYS
from utils import exit_code, expand_path, read_json, read_json_lines, read_yaml, require, save_image, write_text

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

pyplot.rcParams["svg.hashsalt"] = "class tokens"  # or the same curves would be another file every time

SHOWN = 10  # pictures per row
MANY = 50  # classes beyond which a page shows less of each: ImageNet's thousand come to about 60 MB
GREY, BLUE, ORANGE = "#8a9099", "#3f8fdc", "#d08a35"  # readable on white and on near-black
ALIKE = ("model", "height", "width", "guidance_scale", "num_inference_steps", "mixed_precision")


def show_side_by_side(folder: Path, title: str, real: list[Path]):
    """Write folder/grid.png: the first seeds without the token, the same with it, and real pictures where given.

    Small copies of these go to folder/real, so that a page reads nothing outside the folder of its run.
    """
    if (folder / "real").exists():
        shutil.rmtree(folder / "real")
    for number, file in enumerate(real[:SHOWN]):
        save_image(shrink_image(file, 256), folder / "real" / f"{number}.png")
    rows = [("without", list_numbered(folder / "without")[:SHOWN]),
            ("with token", list_numbered(folder / "with")[:SHOWN])]
    draw_sheet(rows + [("real", real[:SHOWN])] * bool(real), folder / "grid.png", title=title)


def plot_curves(file: Path) -> str | None:
    """Loss and accuracy over the updates of history.jsonl, as SVG that goes into the page; None without the file."""
    if not file.exists():
        return None
    history = read_json_lines(file, *HISTORY_KEYS)
    figure, left = pyplot.subplots(figsize=(5.2, 2.6))
    right, updates = left.twinx(), [line["update"] for line in history]
    for axis, key, colour in ((left, "loss", ORANGE), (right, "accuracy", BLUE)):
        values = [math.nan if line[key] is None else line[key] for line in history]
        axis.plot(updates, values, "o-" if len(values) == 1 else "-", color=colour, linewidth=1.6)
        axis.set_ylabel(key, color=colour)
        axis.tick_params(colors=GREY)
        for spine in axis.spines.values():
            spine.set_color(GREY)
    right.set_ylim(-0.02, 1.02)
    left.set_xlabel("update", color=GREY)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return drawing.getvalue()[drawing.getvalue().index("<svg"):]


def animate_updates(run: Path, film: list[str]) -> str | None:
    """A GIF of one seed's picture as the token was learned; None where there are not two of them.

    `film` names its folders <update> under eval/; without one the training's own pictures serve, of the seed that
    came back in most updates.
    """
    drawn = [run / "eval" / folder / "0.png" for folder in film if re.fullmatch(r"updates/\d{3,6}", folder)]
    drawn = drawn or sorted((run / "train").glob("*/*.png"))
    seeds = Counter(path.name for path in drawn)
    if not seeds or max(seeds.values()) < 2:
        return None
    name = seeds.most_common(1)[0][0]
    shots = [path for path in drawn if path.name == name]
    shots = [shots[i] for i in dict.fromkeys(round(j * (len(shots) - 1) / (FRAMES - 1)) for j in range(FRAMES))]
    return inline_animation([caption_image(path, f"update {int(path.parent.name)}") for path in shots])


def describe_class(run: Path, metrics: ClassMetrics, briefly: bool) -> dict:
    """What the page shows of one class, from its run folder img/<classifier>/<class>/<run>; `briefly`: in few kB."""
    shown, side = (4, 96) if briefly else (SHOWN, 192)
    judge = list(metrics.judges)[-1]
    rows = [{"name": name, "pictures": [inline_image(run / "eval" / arm / f"{seed}.png", side) for seed in range(
        min(shown, metrics.images))]} for arm, name in (("without", "without"), ("with", "with token"))]
    real = list_numbered(run / "eval" / "real")[:shown]
    if real:
        rows.append({"name": "real", "pictures": [inline_image(file, side) for file in real]})
    own_title, judged = f"{metrics.class_index} ({metrics.label})", {arm: metrics.arms[arm][judge] for arm in ARMS}
    taken_for = {arm: [(own_title, seen.accuracy.successes), *seen.predicted_instead.items()][:6]
                 for arm, seen in judged.items()}
    token = (run.resolve() / "../../../../pipeline_token").resolve().joinpath(*run.resolve().parts[-3:])
    return {"number": metrics.class_index, "label": metrics.label, "rows": rows, "taken_for": taken_for, "judge": judge,
            "curves": None if briefly else plot_curves(token / "history.jsonl"),
            "gif": None if briefly else animate_updates(run, metrics.film),
            "settings": describe_settings(token, metrics.settings)}


def describe_settings(token: Path, evaluation: dict) -> str:
    """As YAML: what the evaluation ran with, what the training did, and the token's own header with its versions."""
    settings = {"evaluation": evaluation}
    if (token / "config.yml").exists():
        settings["training"] = read_yaml(str(token / "config.yml"), "lr: 0.001")
    if (token / "learned_embeds.safetensors").exists():
        settings["token"] = dict(sorted(load_token(token / "learned_embeds.safetensors").header.items()))
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def load_comparable_metrics(runs: list[Path]) -> list[ClassMetrics]:
    """The metrics of run folders img/<classifier>/<class>/<run>.

    Raises:
        UserError: a folder that no evaluation has filled, a class given twice, classes that were evaluated differently.
    """
    for run in runs:
        require((run / "eval" / "metrics.json").is_file(),
                f"'{run}' holds no evaluation: give folders such as img/inet/0283_tiger_cat/demo after "
                "`python run.py ... --evaluate True`")
    metrics = [load_metrics(run / "eval" / "metrics.json") for run in runs]
    ways = [{"test_size": found.images, "classifier or evaluator": found.judges, "eval_prompts": list(found.contexts),
             "controls": [arm in found.arms for arm in CONTROLS], **{name: found.settings.get(name) for name in ALIKE}}
            for found in metrics]
    others = [name for name in ways[0] if any(way[name] != ways[0][name] for way in ways)]
    require(not others, f"these classes were evaluated with another {', '.join(others)}: evaluate them alike")
    repeated = [number for number, count in Counter(found.class_index for found in metrics).items() if count > 1]
    require(not repeated, f"class {repeated and repeated[0]} is there twice: give one of its folders")
    return metrics


def write_report(runs: list[Path], out: Path):
    """One self-contained page over run folders img/<classifier>/<class>/<run>, every picture inlined.

    Distances to real pictures are shown where the run's summary measured them over just these classes.

    Raises:
        UserError: see `load_comparable_metrics`.
    """
    metrics = load_comparable_metrics(runs)
    first = metrics[0]
    headline = [{"role": f"accuracy, by the {role} ({name})",
                 **{arm: pool_accuracy((found.arms[arm] for found in metrics), role) for arm in ARMS}}
                for role, name in first.judges.items()]
    tables = [accuracy_table(metrics)] + [contexts_table(metrics)] * bool(first.contexts)
    summary = runs[0].parent.parent / f"summary_{runs[0].name}.json"
    distances = read_json(summary, "distribution")["distribution"] if summary.exists() else None
    if distances and distances.get("pictures") == {str(found.class_index): found.pictures for found in metrics}:
        tables.append(fidelity_table(distances))
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    write_text(out, environment.get_template("report.html").render(
        title="Discriminative class tokens", date=datetime.date.today().isoformat(),
        held_out=all(found.held_out for found in metrics), images=first.images, headline=headline, tables=tables,
        classes=[describe_class(run, found, len(runs) > MANY) for run, found in zip(runs, metrics, strict=True)]))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="img/<classifier>/<class>/<run>")
    parser.add_argument("--out", default="report.html", help="the page to write (report.html)")

    def make_report():
        arguments = parser.parse_args(argv)
        write_report(arguments.runs, out := Path(expand_path(arguments.out, "--out")))
        print(f"report: {out}")

    return exit_code(make_report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
