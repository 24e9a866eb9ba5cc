"""How a picture changes while its token is learned: a GIF, a filmstrip, and how sure the judge is at each update.

    python -m experiments.iterations
"""

from PIL import Image
from safetensors.torch import load_file

from evaluation import film_of, generate, judge_images
from experiments.common import Lab, open_lab, parser, publish, pyplot, save_figure, script, tokens, updates_of
from outputs import VECTORS_FILE, output_folders
from prompt_datasets import class_folder
from report import frame, sheet
from utils import replacing

SEEDS = 8


def film(lab: Lab, index: int, exp_id: str) -> dict[int, list]:
    """{update: pictures of the same seeds}, drawn by vectors of the training, evenly spaced."""
    config = lab.config
    images = output_folders(config, index, lab.names[index])[1].parent / exp_id
    frames = load_file(images / "train" / VECTORS_FILE)
    arms = [arm._replace(images=SEEDS) for arm in film_of(config, lab.names[index], frames)]
    folder = lab.work / "pictures" / class_folder(index, lab.names[index])
    generate(config, lab.generator, lab.title(index), arms, folder, lab.draw_batch)
    return {int(arm.folder.split("/")[-1]): [folder / arm.folder / f"{seed}.png" for seed in range(SEEDS)]
            for arm in arms}


def main():
    options = parser(__doc__, "7,13,16").parse_args()
    lab = open_lab(options, fresh_noise=True)  # which keeps the vectors of the updates
    exp_id = "token" if open_lab(options).config.fresh_noise else "token_fresh_noise"
    folders = tokens(lab, exp_id)
    figure, axis = pyplot.subplots(figsize=(6, 3))
    rows, data, films = [], {}, {}
    for index, folder in folders.items():
        films[index] = film(lab, index, exp_id)
        sure = {update: judge_images(lab.judge(), files, index) for update, files in films[index].items()}
        probability = [each["mean_target_probability"] for each in sure.values()]
        axis.plot(list(sure), probability, marker="o", markersize=3, label=lab.labels[index])
        rows.append([lab.title(index), len(updates_of(folder)), f"{probability[0]:.2f}", f"{probability[-1]:.2f}"])
        data[lab.title(index)] = dict(zip(sure, probability, strict=True))
    axis.set(xlabel="update", ylabel="probability of the class", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, lab.out / "iterations_curve.png")
    sheet([(f"{lab.labels[index]}, seed {seed}", [files[seed] for files in each.values()])
           for index, each in films.items() for seed in range(2)], lab.out / "iterations.png", cell=80,
          title="from the first update to the last, evenly spaced")
    moving(lab, films).close()
    first, last = (sum(list(each.values())[i] for each in data.values()) / len(data) for i in (0, -1))
    publish(lab, "iterations", "A picture changes as its token is learned",
            f"The judge's probability of the class goes from {first:.2f} to {last:.2f}, on the same seeds.",
            ["class", "updates", "probability at the first", "at the last"], rows,
            {"probabilities": data, "seeds": SEEDS},
            f"Mean over {SEEDS} seeds that no update was trained on, by {lab.judged}. As a film: "
            "[iterations.gif](iterations.gif); as a curve: [iterations_curve.png](iterations_curve.png).",
            "iterations.png")


def moving(lab: Lab, films: dict[int, dict[int, list]]) -> Image.Image:
    """Write iterations.gif: the classes side by side, the last picture held."""
    length = max(map(len, films.values()))
    shots = []
    for i in range(length):
        row = []
        for each in films.values():
            update = list(each)[min(i, len(each) - 1)]
            row.append(frame(each[update][0], f"update {update}"))
        shot = Image.new("RGB", (sum(each.width + 8 for each in row) - 8, row[0].height), "white")
        for j, each in enumerate(row):
            shot.paste(each, (j * (each.width + 8), 0))
        shots.append(shot)
    with replacing(lab.out / "iterations.gif") as temporary:
        shots[0].save(temporary, format="GIF", save_all=True, append_images=shots[1:],
                      duration=[400] * (length - 1) + [2000], loop=0)
    return shots[0]


if __name__ == "__main__":
    script(main)
