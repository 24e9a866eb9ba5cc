"""Draw docs/teaser.png from an evaluation of the miniature: seed 0 of every class.

make teaser
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from evaluation.read_image import read_image

FINE_DETAILS = ("butterfly", "finch")
ROWS = (("generator", "without"), ("with the\nclass token", "with"), ("real", "real"))
INK, SOFT, GAP = "#0f172a", "#475569", 0.35  # between the two halves, in pictures


def main():
    folders = [
        file.parent for file in sorted(Path("img/miniature").glob("*/demo/eval/metrics.json"))
    ]
    if not folders:
        raise SystemExit("no evaluation in img/miniature: run `make teaser`")
    axes = Figure(figsize=(len(folders) + GAP + 1.6, 4.1), dpi=110).subplots()
    columns = {"Ambiguity": [], "Fine details": []}  # where the pictures of each half start
    for i, folder in enumerate(folders):
        noun, sense = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))[
            "label"
        ].split(", ")
        x = i + GAP * (noun in FINE_DETAILS)
        columns["Fine details" if noun in FINE_DETAILS else "Ambiguity"].append(x)
        axes.text(
            x + 0.48, 3.06, f"“{noun}”\n{sense}", ha="center", va="bottom", fontsize=9.5, color=INK
        )
        for y, (_, condition) in zip((2, 1, 0), ROWS, strict=True):
            axes.imshow(
                read_image(folder / condition / "0.png"),
                extent=(x, x + 0.96, y, y + 0.96),
                interpolation="lanczos",
            )
    for y, (name, _) in zip((2.48, 1.48, 0.48), ROWS, strict=True):
        axes.text(-0.12, y, name, ha="right", va="center", fontsize=12, color=INK)
    for title, starts in columns.items():
        if starts:
            axes.text(
                (starts[0] + starts[-1] + 0.96) / 2,
                3.66,
                title,
                ha="center",
                fontsize=14,
                color=SOFT,
            )
    axes.set(xlim=(-1.5, len(folders) + GAP), ylim=(0, 4))
    axes.axis("off")
    axes.figure.savefig(
        Path(__file__).parent / "teaser.png", bbox_inches="tight", facecolor="white"
    )


if __name__ == "__main__":
    main()
