"""Pictures a person looks at: labelled grids, and one self-contained HTML page over the classes of a run.

    python report.py img/inet/*/demo              writes report.html where you are
    python report.py img/inet/*/demo --out my_report.html
"""

import argparse
import base64
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
from PIL import Image, ImageDraw, ImageFont, ImageOps

import class_token
from class_token import TOKEN_FILE
from distribution import distribution_lines
from evaluation import ARMS, CONTROLS, DRAWN_BY, FRAMES, contexts_table_lines, pooled, table_lines
from learner import LINE
from prompt_datasets import class_title
from utils import (
    ROOT,
    UserError,
    read_image,
    read_json,
    read_json_lines,
    read_yaml_mapping,
    replacing,
    require,
    said,
    write_text,
)

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

pyplot.rcParams["svg.hashsalt"] = "class tokens"  # or the same curves would be another file every time

INK, PAPER, GAP = (30, 30, 34), (255, 255, 255), 4
SHOWN = 10  # pictures a row
KEYS = ("class_index", "label", "classes", "images", "seeds", "judges", "settings", "contexts", "pictures", "film",
        "held_out", *ARMS)  # of metrics.json
MANY = 50  # classes beyond which a page shows less of each: ImageNet's thousand come to about 60 MB
GREY, BLUE, ORANGE = "#8a9099", "#3f8fdc", "#d08a35"  # readable on white and on near-black


def sheet(rows: list[tuple[str, list[Path | Image.Image]]], path: Path, cell: int = 96, title: str = ""):
    """Write a PNG of labelled rows of pictures, each `cell` pixels high and wide."""
    font = ImageFont.load_default(15)
    margin = 16 + max(int(font.getlength(label)) for label, _ in rows)
    columns = max(len(images) for _, images in rows)
    top = 34 if title else GAP
    canvas = Image.new("RGB", (margin + columns * (cell + GAP), top + len(rows) * (cell + GAP)), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((8, 8), title, INK, font)
    for i, (label, images) in enumerate(rows):
        y = top + i * (cell + GAP)
        pen.text((8, y + cell / 2), label, INK, font, anchor="lm")
        for j, image in enumerate(images):
            picture = image.convert("RGB") if isinstance(image, Image.Image) else read_image(image)
            square = ImageOps.fit(picture, (cell, cell), Image.LANCZOS)
            canvas.paste(square, (margin + j * (cell + GAP), y))
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")


def side_by_side(folder: Path, title: str, real: list[Path], columns: int = 10):
    """Write folder/grid.png: the first seeds without the token, the same with it, and real pictures where given."""
    rows = [("without", in_order(folder / "without")[:columns]), ("with token", in_order(folder / "with")[:columns])]
    sheet(rows + [("real", real[:columns])] * bool(real), folder / "grid.png", title=title)


def keep_real(real: list[Path], folder: Path):
    """Small copies of the first real pictures, so that a page reads nothing outside the folder of its run."""
    if folder.exists():
        shutil.rmtree(folder)
    for number, file in enumerate(real[:SHOWN]):
        image = read_image(file)
        image.thumbnail((256, 256), Image.LANCZOS)
        with replacing(folder / f"{number}.png") as temporary:
            image.save(temporary, format="PNG")


def in_order(folder: Path) -> list[Path]:
    """The PNG files of a folder that are named by numbers."""
    return sorted((file for file in folder.glob("*.png") if file.stem.isdecimal()), key=lambda file: int(file.stem))


def inlined(picture: Path, side: int) -> str:
    """A picture as a data: address, at most `side` pixels a side; a small one without loss."""
    image = read_image(picture)
    image.thumbnail((side, side), Image.LANCZOS)
    kind, data = "png" if max(image.size) <= 128 else "jpeg", io.BytesIO()
    image.save(data, format=kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def curves(file: Path) -> str | None:
    """Loss and accuracy over the updates of history.jsonl, as SVG that goes into the page; None without the file."""
    if not file.exists():
        return None
    history = read_json_lines(file, *LINE)
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


def over_the_updates(run: Path, film: list[str]) -> str | None:
    """A GIF of one seed's picture as the token was learned, the last one held; None where there are no two of them.

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
    frames = [frame(path, f"update {int(path.parent.name)}") for path in shots]
    data = io.BytesIO()
    frames[0].save(data, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[400] * (len(frames) - 1) + [2000])
    return f"data:image/gif;base64,{base64.b64encode(data.getvalue()).decode()}"


def frame(path: Path, text: str) -> Image.Image:
    """A picture with its number below."""
    canvas = Image.new("RGB", (192, 214), PAPER)
    canvas.paste(read_image(path).resize((192, 192), Image.LANCZOS))
    ImageDraw.Draw(canvas).text((96, 203), text, INK, ImageFont.load_default(14), anchor="mm")
    return canvas


def class_section(run: Path, metrics: dict, briefly: bool) -> dict:
    """What the page shows of one class, from its run folder img/<classifier>/<class>/<run>; `briefly`: in few kB."""
    shown, side = (4, 96) if briefly else (SHOWN, 192)
    judge = list(metrics["judges"])[-1]
    arms = {"without": "without", "with": "with token"}
    rows = [{"name": name, "pictures": [inlined(run / "eval" / arm / f"{seed}.png", side) for seed in range(
        min(shown, metrics["images"]))]} for arm, name in arms.items()]
    real = in_order(run / "eval" / "real")[:shown]
    if real:
        rows.append({"name": "real", "pictures": [inlined(file, side) for file in real]})
    taken_for = {arm: [(title, count) for title, count in (
        (class_title(metrics["class_index"] - 1, metrics["label"]), sum(metrics[arm][judge]["right"])),
        *metrics[arm][judge]["predicted_instead"].items())][:6] for arm in ARMS}
    token = (run.resolve() / "../../../../pipeline_token").resolve().joinpath(*run.resolve().parts[-3:])
    return {"number": metrics["class_index"], "label": metrics["label"], "rows": rows, "taken_for": taken_for,
            "judge": judge, "curves": None if briefly else curves(token / "history.jsonl"),
            "gif": None if briefly else over_the_updates(run, metrics["film"]),
            "settings": settings_of(token, metrics["settings"])}


def settings_of(token: Path, evaluation: dict) -> str:
    """As YAML: what the evaluation ran with, what the training did, and the token's own header with its versions."""
    settings, file = {"evaluation": evaluation}, token / "config.yml"
    if file.exists():
        settings["training"] = read_yaml_mapping(str(file), "lr: 0.001")
    if (token / TOKEN_FILE).exists():
        settings["token"] = dict(sorted(class_token.load(token / TOKEN_FILE)[2].items()))
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def write_report(runs: list[Path], out: Path):
    """One self-contained page over run folders img/<classifier>/<class>/<run>, every picture inlined.

    Distances to real pictures are shown where the run's summary measured them over just these classes.

    Raises:
        UserError: a folder that no evaluation has filled, or classes that were evaluated differently.
    """
    for run in runs:
        require((run / "eval" / "metrics.json").is_file(),
                f"'{run}' holds no evaluation: give folders such as img/inet/0283_tiger_cat/demo after "
                "`python run.py ... --evaluate True`")
    everything = [read_json(run / "eval" / "metrics.json", *KEYS) for run in runs]
    ways = [{"test_size": metrics["images"], "classifier or evaluator": metrics["judges"],
             "eval_prompts": list(metrics["contexts"]), "controls": [arm in metrics for arm in CONTROLS],
             **{name: metrics["settings"][name] for name in DRAWN_BY}} for metrics in everything]
    others = [name for name in ways[0] if any(way[name] != ways[0][name] for way in ways)]
    require(not others, f"these classes were evaluated with another {', '.join(others)}: evaluate them alike")
    numbers = [metrics["class_index"] for metrics in everything]
    twice = [number for number in numbers if numbers.count(number) > 1]
    require(not twice, f"class {twice and twice[0]} is there twice: give one of its folders")
    roles = list(everything[0]["judges"])
    headline = [{"role": f"accuracy, by the {role} ({everything[0]['judges'][role]})",
                 **{arm: pooled([metrics[arm] for metrics in everything], role) for arm in ARMS}} for role in roles]
    tables = [{"title": "Accuracy by class", "lines": table_lines(everything)}]
    if everything[0]["contexts"]:
        tables.append({"title": "In other prompts", "lines": contexts_table_lines(everything)})
    summary = runs[0].parent.parent / f"summary_{runs[0].name}.json"
    distances = read_json(summary, "distribution")["distribution"] if summary.exists() else None
    if distances and distances.get("pictures") == {str(each["class_index"]): each["pictures"] for each in everything}:
        lines, note = distribution_lines(distances)
        tables.append({"title": "Distance to real pictures", "lines": lines, "note": note})
    environment = Environment(loader=FileSystemLoader(ROOT), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    write_text(out, environment.get_template("report_template.html").render(
        title="Discriminative class tokens", date=datetime.date.today().isoformat(),
        held_out=all(metrics["held_out"] for metrics in everything),
        classes=[class_section(run, metrics, len(runs) > MANY) for run, metrics in zip(runs, everything, strict=True)],
        images=everything[0]["images"], seeds=everything[0]["seeds"], headline=headline, tables=tables))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="img/<classifier>/<class>/<run>")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write (report.html)")
    arguments = parser.parse_args(argv)
    try:
        write_report(arguments.runs, arguments.out)
    except (UserError, OSError) as error:
        print(f"error: {said(error)}", file=sys.stderr)
        return 2
    print(f"report: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
