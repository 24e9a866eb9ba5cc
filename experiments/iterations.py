"""How a picture changes while its token is learned: a GIF, a filmstrip, and the judge's probability at each update.

    python -m experiments.iterations
"""

from itertools import zip_longest
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image

from evaluation.accuracy import judge_images
from evaluation.pictures import caption_image, save_animation
from experiments import common
from experiments.plots import plot_curves
from system.tensor_files import read_tensors
from system.text_files import read_json_lines
from utils import replace_file

SEEDS = 8


def write_animation(films: list[dict[int, list[Path]]], path: Path):
    """The classes' first seeds side by side; a film that ends earlier holds its last picture."""
    rows = [[np.pad(caption_image(files[0], f"update {update}"), ((0, 0), (4, 4), (0, 0)), constant_values=255)
             for update, files in film.items()] for film in films]
    frames = [Image.fromarray(np.hstack([row[-1] if picture is None else picture
                                         for picture, row in zip(pictures, rows, strict=True)]))
              for pictures in zip_longest(*rows)]
    with replace_file(path) as temporary:
        save_animation(frames, temporary)


def main(argv: list[str] | None = None):
    options = common.parse_options(__doc__, argv, "7,13,16", quick={"class_index": "7,13"})
    lab = common.open_lab(options, fresh_noise=True)  # which keeps the vectors
    films, curves, rows = {}, {}, []
    for target, run in common.learn_tokens(lab).items():
        films[target] = film = {
            int(update): common.draw_sets(lab, {target: torch.atleast_2d(vectors.float())}, SEEDS)[target]
            for update, vectors in sorted(read_tensors(run.vectors_file)[0].items())}
        values = [judge_images(lab.get_judge(), files, target.index).mean_target_probability
                  for files in film.values()]
        curves[target.title] = dict(zip(film, values, strict=True))
        rows.append([target.title, len(read_json_lines(run.history_file)), values[0], values[-1]])
    plot_curves(lab.out / "iterations_curve.png", "update", "probability of the class",
                {title: {update: [value] for update, value in curve.items()} for title, curve in curves.items()})
    common.show_sets(lab, {f"seed {seed}": {target: [files[seed] for files in film.values()] for target, film in
                                            films.items()} for seed in range(2)}, lab.out / "iterations.png",
                     "from the first update to the last, evenly spaced", count=10)
    write_animation(list(films.values()), lab.out / "iterations.gif")
    first, last = (mean(row[i] for row in rows) for i in (2, 3))
    common.publish_result(
        lab, "iterations", common.SHOWN, "A picture changes as its token is learned",
        f"The judge's probability of the class changes from {first:.2f} to {last:.2f}, on the same seeds.",
        ["class", "updates", "probability at the first", "at the last"],
        [[title, updates, f"{before:.2f}", f"{after:.2f}"] for title, updates, before, after in rows],
        f"Means over {SEEDS} seeds that no update was trained on. See also [iterations.gif](iterations.gif) and "
        "[iterations_curve.png](iterations_curve.png).", {"probabilities": curves, "seeds": SEEDS})


if __name__ == "__main__":
    common.run_script(main)
