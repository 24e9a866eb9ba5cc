"""One factor at a time: what each setting of the loop does to accuracy and cost.

    python -m experiments.ablations

Every variant is run.py itself with one flag changed, for several classes and several seeds of the training noise; the
pictures that judge it are of other seeds, by the full sampler.
"""

from statistics import mean, stdev

from evaluation import judge_images
from experiments.common import (
    Lab,
    open_lab,
    parser,
    pictures,
    publish,
    pyplot,
    save_figure,
    script,
    seconds_of,
    tokens,
    updates_of,
    vector_of,
)
from utils import require

BRIEFLY = {"epoch_size": 8, "num_train_epochs": 12}  # what all variants start from, besides the config
CLEAR = 0.1
FACTORS = {  # the flag and its values, of which the start's own is left out
    "number_of_prompts": (1, 3), "epoch_size": (4, 16), "fresh_noise": (True, False),
    "initializer_token": ("a", "photo"), "guidance_scale": (1.0, 3.0, 5.0), "lr": (1.25e-3, 5e-3, 1e-2),
    "early_stopping": (4, 15), "target_accuracy": (0.7, 0.96)}


def variants_of(lab: Lab) -> list[tuple[str, object]]:
    """(factor, value): the start, then every factor alone."""
    return [("nothing", ""), *((factor, value) for factor, values in FACTORS.items() for value in values
                               if value != getattr(lab.config, factor))]


def trained(lab: Lab, factor: str, value, seed: int, options) -> dict:
    """One training of every class: the share of pictures that is right, mean updates, pictures drawn and seconds.

    All are judged by the same sampler, but for another guidance scale, which is that of the training too.
    """
    changes = {factor: value} if value != "" else {}
    drawn_by = open_lab(options, **BRIEFLY, **changes) if factor == "guidance_scale" else lab
    noise = lab.config.seed + 10_000 * seed  # no update of one seed shares noise with another's
    exp_id = f"{factor}_{value}_{noise}".replace("__", "_")
    folders = tokens(lab, exp_id, **changes, seed=noise)
    right = [each for index, folder in folders.items() for each in judge_images(lab.judge(), pictures(
        drawn_by, index, f"ablations/{exp_id}", vector_of(folder), options.images), index)["right"]]
    updates = mean(len(updates_of(folder)) for folder in folders.values())
    images = value if factor == "epoch_size" else lab.config.epoch_size
    return {"accuracy": mean(right), "updates": updates, "pictures_drawn": updates * images,
            "seconds": mean(map(seconds_of, folders.values()))}


def gathered(factor: str, value, trainings: list[dict]) -> dict:
    """What the trainings of one variant gave: every accuracy, and the means of the rest."""
    return {"factor": factor, "value": value, "accuracies": [each["accuracy"] for each in trainings],
            **{name: mean(each[name] for each in trainings) for name in ("updates", "pictures_drawn", "seconds")}}


def error_of(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def difference(one: dict, other: dict) -> tuple[float, float]:
    """Mean of one's accuracies minus the other's over seeds, and its standard error (paired by seed)."""
    differences = [a - b for a, b in zip(one["accuracies"], other["accuracies"], strict=True)]
    return mean(differences), error_of(differences)


def is_clear(one: dict, other: dict) -> bool:
    """Whether every training (there are too few for a standard error to say it) differs the same way by CLEAR."""
    differences = [a - b for a, b in zip(one["accuracies"], other["accuracies"], strict=True)]
    return min(differences) >= CLEAR or max(differences) <= -CLEAR


def main():
    arguments = parser(__doc__, "7,16")
    arguments.add_argument("--seeds", type=int, default=2, help="trainings of each class and variant (2)")
    arguments.add_argument("--images", type=int, default=10, help="held-out pictures a class that judge it (10)")
    options = arguments.parse_args()
    require(options.seeds > 1, "--seeds must be greater than 1, for a standard error")
    lab = open_lab(options, **BRIEFLY)
    rounds = [[trained(lab, *variant, seed, options) for variant in variants_of(lab)] for seed in range(options.seeds)]
    results = [gathered(*variant, each) for variant, each in zip(variants_of(lab), zip(*rounds, strict=True),
                                                                 strict=True)]
    draw_figure(results, lab.out / "ablations.png")
    start, rest = results[0], results[1:]
    rows = [[each["factor"], each["value"], f"{mean(each['accuracies']):.2f} ({error_of(each['accuracies']):.2f})",
             "{:+.2f} ({:.2f})".format(*difference(each, start)) if each is not start else "",
             f"{each['updates']:.0f}", f"{each['pictures_drawn']:.0f}", f"{each['seconds']:.0f}"] for each in results]
    clear = [f"{each['factor']} {each['value']} ({difference(each, start)[0]:+.2f})" for each in rest
             if is_clear(each, start)]
    publish(lab, "ablations", "What each setting of the loop does",
            f"{mean(start['accuracies']):.2f} right where nothing is changed; better or worse by {CLEAR} or more in "
            f"every training: {', '.join(clear) or 'nothing'}.",
            ["changed", "to", "right class", "difference", "updates", "pictures drawn to learn", "seconds"], rows,
            {"results": results, "seeds": options.seeds, "pictures": options.images,
             "classes": [lab.title(index) for index in lab.classes]},
            f"Mean (standard error) over {options.seeds} trainings of {len(lab.classes)} classes, differences paired "
            f"by seed, judged by {lab.judged} on {options.images} held-out pictures each. All start from the config "
            "with " + ", ".join(f"{name} {value}" for name, value in BRIEFLY.items()) + "; seconds a training.",
            "ablations.png")


def draw_figure(results: list[dict], path):
    figure, axis = pyplot.subplots(figsize=(6, 0.28 * len(results) + 0.8))
    axis.errorbar([mean(each["accuracies"]) for each in results], range(len(results)), fmt="o", capsize=3,
                  xerr=[error_of(each["accuracies"]) for each in results])
    axis.axvline(mean(results[0]["accuracies"]), color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(results)), [f"{each['factor']} {each['value']}".strip() for each in results], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("right class (mean and standard error over trainings)")
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


if __name__ == "__main__":
    script(main)
