"""One factor at a time: what each setting of the loop does to accuracy and cost.

    python -m experiments.ablations
"""

from statistics import mean

from evaluation.statistics import mean_with_error
from experiments import common
from experiments.plots import plot_curves

CLEAR = 0.1
SECONDS = "Seconds are wall-clock: other work on the machine is in them."
FACTORS = {  # settings and their values, of which the start's own is left out
    "number_of_prompts": (1, 3), "epoch_size": (4, 16), "fresh_noise": (True, False),
    "initializer_token": ("a", "photo"), "guidance_scale": (1.0, 3.0, 5.0), "lr": (1.25e-3, 5e-3, 1e-2),
    "early_stopping": (4, 15), "target_accuracy": (0.7, 0.96), "train_guidance_scale": (None, 1.0),
    "num_vectors": (None, 4), "loss": ("cross_entropy", "norm_penalty")}


def measure_variant(lab: common.Lab, changes: dict) -> dict:
    """The accuracy of every training with changed settings, and the mean cost of one.

    All are drawn by the same sampler, but for another guidance scale, which is that of the training too.
    """
    drawing_lab = common.open_lab(lab.options, **changes) if "guidance_scale" in changes else lab
    runs = [common.learn_tokens(lab, **changes, seed=lab.config.seed + 10_000 * i)  # no two share noise
            for i in range(lab.options.seeds)]
    sets = [common.draw_sets(drawing_lab, common.load_vectors(folders), lab.options.images) for folders in runs]
    updates, seconds = (mean(common.measure_cost(folders, key) for folders in runs) for key in ("updates", "seconds"))
    return {"accuracies": [common.measure_accuracy(lab, files).value for files in sets], "updates": updates,
            "pictures_drawn": updates * changes.get("epoch_size", lab.config.epoch_size), "seconds": seconds}


def is_clear(differences: list[float]) -> bool:
    """Whether every training (there are too few for a standard error to say it) differs the same way by CLEAR."""
    return min(differences) >= CLEAR or max(differences) <= -CLEAR


def main(argv: list[str] | None = None, factors: dict[str, tuple] = FACTORS):
    options = common.parse_options(__doc__, argv, "7,16", seeds=2, images=10, epoch_size=8, updates=12)
    lab = common.open_lab(options, epoch_size=options.epoch_size, num_train_epochs=options.updates)
    results = [{"factor": "nothing", "value": "", **measure_variant(lab, {})}]
    results += [{"factor": factor, "value": value, **measure_variant(lab, {factor: value})}
                for factor, values in factors.items() for value in values if value != getattr(lab.config, factor)]
    bars = {f"{found['factor']} {found['value']}".strip(): found["accuracies"] for found in results}
    differences = {name: [value - before for value, before in zip(values, bars["nothing"], strict=True)]
                   for name, values in bars.items()}
    clear = [f"{name} ({mean(found):+.2f})" for name, found in differences.items() if is_clear(found)]
    rows = [[name, mean_with_error(bars[name]), mean_with_error(differences[name]),
             *(f"{found[cost]:.0f}" for cost in ("updates", "pictures_drawn", "seconds"))]
            for name, found in zip(bars, results, strict=True)]
    plot_curves(lab.out / "ablations.png", "changed", "right class", {"": bars})
    common.publish_result(
        lab, "ablations", "What each setting of the loop does",
        f"{mean(bars['nothing']):.2f} right where nothing is changed; better or worse by {CLEAR} or more in every "
        f"training: {', '.join(clear) or 'nothing'}.",
        ["changed", "right class", "difference", "updates", "pictures drawn to learn", "seconds"], rows,
        f"Means over {options.seeds} trainings of {len(lab.targets)} classes, differences paired by seed. All start "
        f"from the config with epoch_size {options.epoch_size} and num_train_epochs {options.updates}. {SECONDS}",
        {"results": results, "seeds": options.seeds, "pictures": options.images})


if __name__ == "__main__":
    common.run_script(main)
