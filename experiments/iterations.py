"""How a picture changes while its token is learned: a GIF, filmstrips and a curve.

python -m experiments.iterations
"""

from itertools import zip_longest
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image

from evaluation.accuracy import judge_images
from evaluation.sheets import caption_image, save_animation
from evaluation.tables import Table
from experiments.material import draw_sets, learn_tokens, show_sets
from experiments.plots import plot_curves
from experiments.study import SHOWN, Study, StudyResult, open_study, parse_options, publish_result
from prompt_datasets import TargetClass
from runs.folders import RunFolder
from system.tensor_files import read_tensors
from system.terminal import run_script
from system.text_files import read_json_lines
from utils import replace_file

SEEDS = 8
STRIPS = 2  # seeds whose filmstrip is shown
FRAMES = 10  # of a filmstrip
Film = dict[int, list[Path]]  # every seed's picture by update


def draw_film(study: Study, target: TargetClass, run: RunFolder) -> Film:
    """Draw the class's pictures with the vectors of each kept update."""
    vectors, _ = read_tensors(run.vectors_file)
    film = {}
    for update, of_update in sorted(vectors.items()):
        sets = draw_sets(study, {target: torch.atleast_2d(of_update.float())}, SEEDS)
        film[int(update)] = sets[target]
    return film


def write_animation(films: list[Film], path: Path):
    """Write the classes' first seeds side by side; a shorter film holds its last picture."""
    rows = []
    for film in films:
        row = []
        for update, files in film.items():
            pixels = np.asarray(caption_image(files[0], f"update {update}"))
            row.append(np.pad(pixels, ((0, 0), (4, 4), (0, 0)), constant_values=255))
        rows.append(row)
    frames = []
    for pictures in zip_longest(*rows):
        shown = []
        for picture, row in zip(pictures, rows, strict=True):
            shown.append(row[-1] if picture is None else picture)
        frames.append(Image.fromarray(np.hstack(shown)))
    with replace_file(path) as temporary:
        save_animation(frames, temporary)


def main(argv: list[str] | None = None):
    """Draw the pictures of every update, and publish the page."""
    options = parse_options(__doc__, argv, "7,13,16", quick={"class_index": "7,13"})
    study = open_study(options, fresh_noise=True)  # which keeps the vectors
    films, curves, points, rows = {}, {}, {}, []
    for target, run in learn_tokens(study).items():
        film = draw_film(study, target, run)
        curve = {}
        for update, files in film.items():
            found = judge_images(study.session.judge, files, target.index)
            curve[update] = found.mean_target_probability
        films[target] = film
        curves[target.title] = curve
        points[target.title] = {update: [value] for update, value in curve.items()}
        values = list(curve.values())
        updates = len(read_json_lines(run.history_file))
        rows.append([target.title, updates, values[0], values[-1]])
    plot_curves(study.out / "iterations_curve.png", "update", "probability of the class", points)
    strips = {}
    for seed in range(STRIPS):
        strips[f"seed {seed}"] = {
            target: [files[seed] for files in film.values()] for target, film in films.items()
        }
    title = "from the first update to the last, evenly spaced"
    show_sets(study.targets, strips, study.out / "iterations.png", title, count=FRAMES)
    write_animation(list(films.values()), study.out / "iterations.gif")
    first = mean(before for *_, before, _ in rows)
    last = mean(after for *_, after in rows)
    cells = []
    for name, updates, before, after in rows:
        cells.append([name, updates, f"{before:.2f}", f"{after:.2f}"])
    publish_result(
        study,
        StudyResult(
            "iterations",
            SHOWN,
            "A picture changes as its token is learned",
            f"The judge's probability of the class changes from {first:.2f} to {last:.2f}, on the "
            "same seeds.",
            Table(["class", "updates", "probability at the first", "at the last"], cells),
            f"Means over {SEEDS} seeds that no update was trained on. See also "
            "[iterations.gif](iterations.gif) and [iterations_curve.png](iterations_curve.png).",
            {"probabilities": curves, "seeds": SEEDS},
            tests={},
        ),
    )


if __name__ == "__main__":
    run_script(main)
