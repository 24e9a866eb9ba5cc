"""One factor at a time: what each setting of the loop does to accuracy and cost.

    python -m experiments.ablations

Every variant changes one setting of a run, for several classes and several seeds of the training noise; the pictures
that judge it are of other seeds, by the full sampler.
"""

from pathlib import Path
from statistics import mean

from evaluation.tables import Table
from experiments import common
from experiments.common import mean_with_error, standard_error
from utils import require

CLEAR = 0.1
FACTORS = {  # settings and their values, of which the start's own is left out
    "number_of_prompts": (1, 3), "epoch_size": (4, 16), "fresh_noise": (True, False),
    "initializer_token": ("a", "photo"), "guidance_scale": (1.0, 3.0, 5.0), "lr": (1.25e-3, 5e-3, 1e-2),
    "early_stopping": (4, 15), "target_accuracy": (0.7, 0.96)}


def measure_variant(lab: common.Lab, factor: str, value, options) -> dict:
    """The accuracy of every training with one setting changed, and means over trainings and classes.

    All are drawn by the same sampler, but for another guidance scale, which is that of the training too.
    """
    changes, accuracies, runs = {factor: value} if factor != "nothing" else {}, [], []
    drawing_lab = common.open_lab(options, **changes) if factor == "guidance_scale" else lab
    for seed in range(options.seeds):
        noise = lab.config.seed + 10_000 * seed  # no update of one seed shares noise with another's
        exp_id = f"{factor}_{value}_{noise}".replace("__", "_")
        trained = common.learn_tokens(lab, exp_id, **changes, seed=noise)
        accuracies.append(common.measure_accuracy(lab, {
            target: common.draw_class(drawing_lab, target, f"ablations/{exp_id}", common.load_vectors(run),
                                      options.images) for target, run in trained.items()}).value)
        runs += trained.values()
    updates = mean(len(common.read_updates(run)) for run in runs)
    return {"factor": factor, "value": value, "accuracies": accuracies, "updates": updates,
            "pictures_drawn": updates * changes.get("epoch_size", lab.config.epoch_size),
            "seconds": mean(map(common.read_seconds, runs))}


def is_clear(differences: list[float]) -> bool:
    """Whether every training (there are too few for a standard error to say it) differs the same way by CLEAR."""
    return min(differences) >= CLEAR or max(differences) <= -CLEAR


def draw_figure(names: list[str], accuracies: list[list[float]], path: Path):
    figure, axis = common.new_axes(6, 0.28 * len(names) + 0.8)
    axis.errorbar(list(map(mean, accuracies)), range(len(names)), xerr=list(map(standard_error, accuracies)), fmt="o",
                  capsize=3)
    axis.axvline(mean(accuracies[0]), color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("right class (mean and standard error over trainings)")
    common.save_figure(figure, path)


def main(argv: list[str] | None = None, factors: dict[str, tuple] = FACTORS):
    parser = common.build_parser(__doc__, "7,16")
    for name, default, text in (("seeds", 2, "trainings of each class and variant"),
                                ("images", 10, "held-out pictures per class that judge it"),
                                ("epoch_size", 8, "pictures per update"), ("updates", 12, "at most")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    options = parser.parse_args(argv)
    require(options.seeds > 1, "--seeds must be greater than 1, for a standard error")
    lab = common.open_lab(options, epoch_size=options.epoch_size, num_train_epochs=options.updates)
    variants = [("nothing", ""), *((factor, value) for factor, values in factors.items() for value in values
                                   if value != getattr(lab.config, factor))]
    results = [measure_variant(lab, factor, value, options) for factor, value in variants]
    names = [f"{factor} {value}".strip() for factor, value in variants]
    accuracies = [result["accuracies"] for result in results]
    differences = [[ours - start for ours, start in zip(by_seed, accuracies[0], strict=True)] for by_seed in accuracies]
    draw_figure(names, accuracies, lab.out / "ablations.png")
    clear = [f"{name} ({mean(by_seed):+.2f})" for name, by_seed in zip(names, differences, strict=True)
             if is_clear(by_seed)]
    table = Table(["changed", "right class", "difference", "updates", "pictures drawn to learn", "seconds"],
                  [[names[i], mean_with_error(accuracies[i]), mean_with_error(differences[i]),
                    *(f"{result[cost]:.0f}" for cost in ("updates", "pictures_drawn", "seconds"))]
                   for i, result in enumerate(results)],
                  note=f"Mean (standard error) over {options.seeds} trainings of {len(lab.targets)} classes. "
                       f"Differences are paired by seed. Judged by {common.judge_name(lab)} on {options.images} "
                       f"held-out pictures. All start from the config with epoch_size {options.epoch_size} and "
                       f"num_train_epochs {options.updates}. Seconds per training.")
    common.publish_result(
        lab, "ablations", "What each setting of the loop does",
        f"{mean(accuracies[0]):.2f} right where nothing is changed; better or worse by {CLEAR} or more in every "
        f"training: {', '.join(clear) or 'nothing'}.", table,
        {"results": results, "seeds": options.seeds, "pictures": options.images}, "ablations.png")


if __name__ == "__main__":
    common.run_script(main)
