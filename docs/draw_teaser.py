"""Draw docs/teaser.png in the paper's layout from an evaluation of the miniature: seed 0 of every class, none picked.

    make teaser
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

FINE_DETAILS = ("butterfly", "finch")
INK, SOFT = "#0f172a", "#475569"


def columns(folder: Path) -> list[tuple[str, list[Path]]]:
    """Label and pictures (without, with, real) of every class evaluated, in order."""
    found = []
    for file in sorted(folder.glob("*/demo/eval/metrics.json")):
        metrics = json.loads(file.read_text(encoding="utf-8"))
        pictures = ["without/0.png", "with/0.png", "real/0.png"]
        found.append((metrics["label"], [file.parent / picture for picture in pictures]))
    return found


def main():
    found = columns(Path("img/miniature"))
    if not found:
        raise SystemExit("no evaluation in img/miniature: run `make teaser`")
    fine = [label.split(",")[0] in FINE_DETAILS for label, _ in found]
    gap = 0.35  # between the two halves, in pictures
    figure, axes = plt.subplots(figsize=(len(found) + gap + 1.6, 4.1), dpi=110)
    for i, (label, pictures) in enumerate(found):
        x = i + gap * fine[i]
        noun, sense = label.split(", ")
        axes.text(x + 0.48, 3.06, f"“{noun}”\n{sense}", ha="center", va="bottom", fontsize=9.5, color=INK)
        for row, picture in enumerate(pictures):
            axes.imshow(Image.open(picture), extent=(x, x + 0.96, 2 - row, 2.96 - row), interpolation="lanczos")
    for y, text in ((2.48, "generator"), (1.48, "with the\nclass token"), (0.48, "real")):
        axes.text(-0.12, y, text, ha="right", va="center", fontsize=12, color=INK)
    for half, text in ((False, "Ambiguity"), (True, "Fine details")):
        places = [i + gap * half for i in range(len(found)) if fine[i] == half]
        if places:
            axes.text((places[0] + places[-1] + 0.96) / 2, 3.66, text, ha="center", fontsize=14, color=SOFT)
    axes.set_xlim(-1.5, len(found) + gap)
    axes.set_ylim(0, 4)
    axes.axis("off")
    figure.savefig(Path(__file__).parent / "teaser.png", bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
