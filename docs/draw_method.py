"""Draw docs/method.png: what runs without a graph, what with one, and where the gradient goes.

    python -m docs.draw_method
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FROZEN, TRAINED, GRAPH, PLAIN = "#dfe7f1", "#ffd9a0", "#c2410c", "#475569"


def box(axes, x, y, width, text, colour=FROZEN, height=0.9):
    axes.add_patch(FancyBboxPatch((x, y - height / 2), width, height, boxstyle="round,pad=0.04,rounding_size=0.12",
                                  facecolor=colour, edgecolor=PLAIN, linewidth=1.2))
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=10, color="#0f172a")


def arrow(axes, start, end, colour=PLAIN, bend=0.0, width=1.4, style="-|>"):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=13, color=colour, linewidth=width,
                                   connectionstyle=f"arc3,rad={bend}"))


def main():
    figure, axes = plt.subplots(figsize=(12.6, 4.3), dpi=160)
    axes.set_xlim(-0.2, 16.4)
    axes.set_ylim(-1.5, 4.0)
    axes.axis("off")
    box(axes, 0, 3, 3.1, "“A photo of a $S_c$ tiger cat”", "white")
    box(axes, 0, 1.65, 3.1, "token $v_c$\nthe only thing trained", TRAINED)
    box(axes, 4.1, 3, 2.1, "text encoder\n(frozen)")
    box(axes, 0, 0.1, 1.5, "noise $z_T$", "white")
    box(axes, 2.5, 0.1, 3.7, "UNet: every step but the last\nno graph", height=1.1)
    box(axes, 7.0, 0.1, 2.8, "UNet: final step\none call with a graph", height=1.1)
    box(axes, 10.5, 0.1, 1.7, "VAE decoder\n(frozen)")
    box(axes, 13.1, 0.1, 2.9, "classifier (frozen)\nis it class $c$?")
    box(axes, 13.1, 3, 2.9, "cross-entropy loss", "white")
    for start, end in (((3.2, 3), (4.0, 3)), ((1.6, 0.1), (2.4, 0.1)), ((6.3, 0.1), (6.9, 0.1)),
                       ((9.9, 0.1), (10.4, 0.1)), ((12.3, 0.1), (13.0, 0.1)), ((14.55, 0.65), (14.55, 2.45))):
        arrow(axes, start, end)
    arrow(axes, (3.2, 1.9), (4.3, 2.5))
    arrow(axes, (5.2, 2.5), (4.8, 0.75))
    arrow(axes, (6.0, 2.5), (7.9, 0.75))
    for start, end, bend in (((15.2, 2.4), (15.2, 0.7), 0.0), ((13.4, -0.45), (11.7, -0.45), -0.25),
                             ((11.0, -0.45), (9.0, -0.55), -0.25), ((8.5, 0.78), (6.3, 2.85), 0.25),
                             ((4.75, 2.45), (3.2, 1.35), -0.25)):
        arrow(axes, start, end, GRAPH, bend, 2.2)
    axes.text(10.2, -1.35, "gradient skipping: back through the final step alone (Sec. 3.2)", ha="center", color=GRAPH,
              fontsize=11)
    figure.savefig(Path(__file__).parent / "method.png", bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
