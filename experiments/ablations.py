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

BRIEFLY = {"epoch_size": 8, "num_train_epochs": 20}  # what all variants start from, besides the config
FACTORS = {  # the flag and its other values
    "number_of_prompts": (1,), "epoch_size": (4, 16), "fresh_noise": (False,), "initializer_token": ("photo",),
    "guidance_scale": (1.0, 5.0), "lr": (1.25e-3, 1e-2), "early_stopping": (5,), "target_accuracy": (0.7,)}


def variants_of(lab: Lab) -> list[tuple[str, object, list[str]]]:
    """(factor, value, flags): the start, then every factor alone."""
    return [("nothing", "", []), *((factor, value, [f"--{factor}", str(value)])
                                   for factor, values in FACTORS.items() for value in values
                                   if value != getattr(lab.config, factor))]


def measured(lab: Lab, factor: str, value, flags: list[str], options) -> dict:
    """Accuracy of every seed over all classes; mean updates, pictures drawn and seconds of a training."""
    accuracies, updates, seconds = [], [], []
    for seed in range(options.seeds):
        noise = lab.config.seed + 10_000 * seed  # no update of one seed shares noise with another's
        exp_id = f"{factor}_{value}_{noise}".replace(" ", "_").strip("_")
        folders = tokens(lab, exp_id, *flags, "--seed", str(noise))
        right = []
        for index, folder in folders.items():
            files = pictures(lab, index, f"ablations/{exp_id}", vector_of(folder), options.images)
            right += judge_images(lab.judge(), files, index)["right"]
            updates.append(len(updates_of(folder)))
        seconds += seconds_of(lab.work / f"{exp_id}_seconds.json").values()
        accuracies.append(mean(right))
    images = int(value) if factor == "epoch_size" else lab.config.epoch_size
    return {"factor": factor, "value": value, "accuracies": accuracies, "updates": mean(updates),
            "pictures_drawn": mean(updates) * images, "seconds": mean(seconds)}


def error_of(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def main():
    arguments = parser(__doc__, "7,16")
    arguments.add_argument("--seeds", type=int, default=3, help="trainings of each class and variant (3)")
    arguments.add_argument("--images", type=int, default=15, help="held-out pictures a class that judge it (15)")
    options = arguments.parse_args()
    lab = open_lab(options, **BRIEFLY)
    results = [measured(lab, *variant, options) for variant in variants_of(lab)]
    base = mean(results[0]["accuracies"])
    figure, axis = pyplot.subplots(figsize=(6, 0.28 * len(results) + 0.8))
    names = [f"{each['factor']} {each['value']}".strip() for each in results]
    axis.errorbar([mean(each["accuracies"]) for each in results], range(len(results)), fmt="o", capsize=3,
                  xerr=[error_of(each["accuracies"]) for each in results])
    axis.axvline(base, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(results)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("right class (mean and standard error over seeds)")
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, lab.out / "ablations.png")
    worst = min(results, key=lambda each: mean(each["accuracies"]))
    publish(lab, "ablations", "What each setting of the loop does",
            f"{base:.2f} right where nothing is changed; least with {worst['factor']} {worst['value']}: "
            f"{mean(worst['accuracies']):.2f}.",
            ["changed", "to", "right class (standard error)", "updates", "pictures drawn to learn", "seconds"],
            [[each["factor"], each["value"], f"{mean(each['accuracies']):.2f} ({error_of(each['accuracies']):.2f})",
              f"{each['updates']:.0f}", f"{each['pictures_drawn']:.0f}", f"{each['seconds']:.0f}"] for each in results],
            {"results": results, "seeds": options.seeds, "pictures": options.images,
             "classes": [lab.labels[index] for index in lab.classes]},
            f"{options.seeds} trainings of each of {len(lab.classes)} classes, judged by the evaluator on "
            f"{options.images} held-out pictures each, drawn as configured in all rows. All start from "
            f"{', '.join(f'{name} {value}' for name, value in BRIEFLY.items())}; seconds a training, the start of "
            "run.py included.",
            "ablations.png")


if __name__ == "__main__":
    script(main)
