"""How a picture changes while its token is learned: a GIF, a filmstrip, and the judge's probability at each update.

    python -m experiments.iterations
"""

from itertools import zip_longest
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image

from evaluation.accuracy import judge_images
from evaluation.images import list_film_arms
from evaluation.pictures import caption_image, draw_sheet, save_animation
from evaluation.tables import Table
from experiments import common
from runs.folders import RunFolder
from utils import read_tensors, replace_file

SEEDS = 8


def draw_film(lab: common.Lab, run: RunFolder) -> dict[int, list[Path]]:
    """{update: pictures of the same seeds}, drawn with vectors of the training, evenly spaced."""
    arms = list_film_arms(run.target, lab.config.placeholder_token, read_tensors(run.vectors_file)[0], SEEDS)
    folder = lab.work / "pictures" / run.target.folder
    lab.drawer.draw_arms(arms, folder, run.target.title)
    return {int(Path(arm.folder).name): [folder / arm.folder / f"{seed}.png" for seed in range(SEEDS)] for arm in arms}


def write_animation(films: list[dict[int, list[Path]]], path: Path):
    """The classes' first seeds side by side; a film that ends earlier holds its last picture."""
    rows = [[caption_image(files[0], f"update {update}") for update, files in film.items()] for film in films]
    frames = [Image.fromarray(np.hstack([np.pad(shot or row[-1], ((0, 0), (4, 4), (0, 0)), constant_values=255)
                                         for shot, row in zip(shots, rows, strict=True)]))
              for shots in zip_longest(*rows)]
    with replace_file(path) as temporary:
        save_animation(frames, temporary)


def main(argv: list[str] | None = None):
    options = common.build_parser(__doc__, "7,13,16").parse_args(argv)
    lab = common.open_lab(options, fresh_noise=True)  # which keeps vectors of the updates
    runs = common.learn_tokens(lab, "token" if common.open_lab(options).config.fresh_noise else "token_fresh_noise")
    films = {target: draw_film(lab, run) for target, run in runs.items()}
    probabilities = {target: {update: judge_images(lab.get_judge(), files, target.index).mean_target_probability
                              for update, files in film.items()} for target, film in films.items()}
    figure, axis = common.new_axes(6, 3)
    for target, by_update in probabilities.items():
        axis.plot(list(by_update), list(by_update.values()), marker="o", markersize=3, label=target.label)
    axis.set(xlabel="update", ylabel="probability of the class", ylim=(0, 1))
    common.save_figure(figure, lab.out / "iterations_curve.png")
    draw_sheet([(f"{target.label}, seed {seed}", [files[seed] for files in film.values()])
                for target, film in films.items() for seed in range(2)], lab.out / "iterations.png", cell=80,
               title="from the first update to the last, evenly spaced")
    write_animation(list(films.values()), lab.out / "iterations.gif")
    ends = {target: [list(by_update.values())[i] for i in (0, -1)] for target, by_update in probabilities.items()}
    first, last = map(mean, zip(*ends.values(), strict=True))
    common.publish_result(
        lab, "iterations", "A picture changes as its token is learned",
        f"The judge's probability of the class changes from {first:.2f} to {last:.2f}, on the same seeds.",
        Table(["class", "updates", "probability at the first", "at the last"],
              [[target.title, len(common.read_updates(runs[target])), *(f"{value:.2f}" for value in values)]
               for target, values in ends.items()],
              note=f"Mean over {SEEDS} seeds that no update was trained on, by {common.judge_name(lab)}. As a film: "
                   "[iterations.gif](iterations.gif); as a curve: [iterations_curve.png](iterations_curve.png)."),
        {"probabilities": {target.title: values for target, values in probabilities.items()}, "seeds": SEEDS},
        "iterations.png")


if __name__ == "__main__":
    common.run_script(main)
