"""Pictures a person looks at: labelled grids, and one self-contained HTML page over the classes of a run.

    python report.py img/inet/*/demo              writes report.html where you are
    python report.py img/inet/*/demo --out my_report.html
"""

import argparse
import base64
import io
import json
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import yaml
from jinja2 import Environment, FileSystemLoader
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

from evaluation import ARMS, contexts_table_lines, pooled, table_lines
from utils import ROOT, UserError, replacing, require, write_text

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

INK, PAPER, GAP = (30, 30, 34), (255, 255, 255), 4
SHOWN = 10  # pictures a row
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
            picture = image if isinstance(image, Image.Image) else Image.open(image)
            canvas.paste(picture.convert("RGB").resize((cell, cell), Image.LANCZOS), (margin + j * (cell + GAP), y))
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")


def side_by_side(folder: Path, title: str, real: list[Path], columns: int = 10):
    """Write folder/grid.png: the first seeds without the token, the same with it, and real pictures where given."""
    def first(where):
        return sorted(where.glob("*.png"), key=lambda path: int(path.stem))[:columns]

    rows = [("without", first(folder / "without")), ("with token", first(folder / "with"))]
    sheet(rows + [("real", real[:columns])] * bool(real), folder / "grid.png", title=title)


def inlined(picture: Path | Image.Image, size: int = 192) -> str:
    """A picture as a data: address, at most `size` pixels a side."""
    image = (picture if isinstance(picture, Image.Image) else Image.open(picture)).convert("RGB")
    image.thumbnail((size, size), Image.LANCZOS)
    data = io.BytesIO()
    image.save(data, format="PNG" if size <= 128 or max(image.size) <= 128 else "JPEG", quality=88)
    kind = "png" if data.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def curves(history: list[dict]) -> str:
    """Loss and accuracy over the updates, as SVG that goes into the page."""
    figure, left = pyplot.subplots(figsize=(5.2, 2.6))
    right, updates = left.twinx(), [line["update"] for line in history]
    for axis, key, colour in ((left, "loss", ORANGE), (right, "accuracy", BLUE)):
        axis.plot(updates, [line[key] for line in history], color=colour, linewidth=1.6)
        axis.set_ylabel(key, color=colour)
        axis.tick_params(colors=GREY)
        for spine in axis.spines.values():
            spine.set_color(GREY)
    right.set_ylim(-0.02, 1.02)
    left.set_xlabel("update", color=GREY)
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return drawing.getvalue()[drawing.getvalue().index("<svg"):]


def over_the_updates(train: Path) -> str | None:
    """A GIF of the one seed that most updates drew; None where no seed comes back, as with fresh noise."""
    drawn = sorted(train.glob("*/*.png"))
    seeds = Counter(path.name for path in drawn)
    if not seeds or max(seeds.values()) < 2:
        return None
    name = seeds.most_common(1)[0][0]
    frames = [Image.open(path).convert("RGB").resize((192, 192), Image.LANCZOS) for path in drawn if path.name == name]
    data = io.BytesIO()
    frames[0].save(data, format="GIF", save_all=True, append_images=frames[1:], duration=250, loop=0)
    return f"data:image/gif;base64,{base64.b64encode(data.getvalue()).decode()}"


def class_section(run: Path, metrics: dict) -> dict:
    """What the page shows of one class, from its run folder img/<classifier>/<class>/<run>."""
    judge = list(metrics["judges"])[-1]
    arms = {"without": "without", "with": "with token"}
    rows = [{"name": name, "pictures": [inlined(run / "eval" / arm / f"{seed}.png") for seed in range(
        min(SHOWN, metrics["images"]))]} for arm, name in arms.items()]
    if metrics["real"]:
        rows.append({"name": "real", "pictures": [inlined(Path(file)) for file in metrics["real"][:SHOWN]]})
    taken_for = {arm: [(label, count) for label, count in (
        (metrics["label"], sum(metrics[arm][judge]["right"])),
        *metrics[arm][judge]["predicted_instead"].items())][:6] for arm in ARMS}
    token = Path(metrics["token_folder"])
    history = [json.loads(line) for line in (token / "history.jsonl").read_text().splitlines()]
    with safe_open(token / "learned_embeds.safetensors", "pt") as file:
        settings = {**yaml.safe_load((token / "config.yml").read_text(encoding="utf-8")), "token": file.metadata()}
    return {"number": metrics["class_index"], "label": metrics["label"], "rows": rows, "taken_for": taken_for,
            "curves": curves(history), "gif": over_the_updates(run / "train"),
            "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}


def write_report(runs: list[Path], out: Path, distribution: list[list[str]] | None = None, note: str = ""):
    """One self-contained page over run folders img/<classifier>/<class>/<run>, every picture inlined.

    Raises:
        UserError: a folder that no evaluation has filled, or classes with different numbers of pictures.
    """
    for run in runs:
        require((run / "eval" / "metrics.json").is_file(),
                f"'{run}' holds no evaluation: give folders such as img/inet/0283_tiger_cat/demo after "
                "`python run.py ... --evaluate True`")
    everything = [json.loads((run / "eval" / "metrics.json").read_text(encoding="utf-8")) for run in runs]
    require(len({metrics["images"] for metrics in everything}) == 1, "these classes were evaluated with different "
            "--test_size: evaluate them alike")
    roles = list(everything[0]["judges"])
    headline = [{"role": f"accuracy, by the {role} ({everything[0]['judges'][role]})",
                 **{arm: pooled([metrics[arm] for metrics in everything], role) for arm in ARMS}} for role in roles]
    tables = [{"title": "Accuracy by class", "lines": table_lines(everything)}]
    if everything[0]["contexts"]:
        tables.append({"title": "In other prompts", "lines": contexts_table_lines(everything)})
    if distribution:
        tables.append({"title": "Distance to real pictures", "lines": distribution, "note": note})
    environment = Environment(loader=FileSystemLoader(ROOT), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    write_text(out, environment.get_template("report_template.html").render(
        title="Discriminative class tokens", classes=[class_section(*pair) for pair in zip(runs, everything,
                                                                                          strict=True)],
        images=everything[0]["images"], seeds=everything[0]["seeds"], headline=headline, tables=tables))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="img/<classifier>/<class>/<run>")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write (report.html)")
    arguments = parser.parse_args(argv)
    try:
        write_report(arguments.runs, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
