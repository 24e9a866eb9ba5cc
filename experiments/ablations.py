"""One factor at a time: what each setting of the loop does to accuracy and cost.

    python -m experiments.ablations
"""

from evaluation.statistics import correct_pvalues
from experiments import common
from experiments.plots import plot_curves
from experiments.trainings import Trainings, compare_trainings, list_seeds, measure_trainings

FACTORS = {  # settings and their values, of which the start's own is left out
    "number_of_prompts": (1, 3), "epoch_size": (4, 8, 16), "fresh_noise": (True, False),
    "initializer_token": ("a", "photo"), "guidance_scale": (1.0, 3.0, 5.0), "lr": (1.25e-3, 5e-3, 0.015, 0.03),
    "early_stopping": (4, 15), "target_accuracy": (0.7, 0.9, 0.96), "num_vectors": (None, 4),
    "loss": ("cross_entropy", "norm_penalty")}


def measure_variant(lab: common.Lab, changes: dict) -> Trainings:
    """The trainings with changed settings, drawn by the same sampler but for another guidance scale."""
    drawing_lab = common.open_lab(lab.options, **changes) if "guidance_scale" in changes else lab
    return measure_trainings(lab, list_seeds(lab), lab.options.images, drawing_lab=drawing_lab, **changes)


def main(argv: list[str] | None = None, factors: dict[str, tuple] = FACTORS):
    options = common.parse_options(
        __doc__, argv, "all", quick={"images": 2, "updates": 2, "epoch_size": 4}, seeds=1, images=10, epoch_size=8,
        updates=8)
    lab = common.open_lab(options, epoch_size=options.epoch_size, num_train_epochs=options.updates)
    variants = {f"{factor} {value}": {factor: value} for factor, values in factors.items() for value in values
                if value != getattr(lab.config, factor)}
    start = measure_variant(lab, {})
    found = {name: measure_variant(lab, changes) for name, changes in variants.items()}
    tests = correct_pvalues({name: compare_trainings(trainings, start) for name, trainings in found.items()})
    clear = [f"{name} ({test})" for name, test in tests.items() if test.pvalue < 0.05]
    plot_curves(lab.out / "ablations.png", "changed", "right class", {"": {
        "nothing": start.mean_right(), **{name: trainings.mean_right() for name, trainings in found.items()}}})
    common.publish_result(
        lab, "ablations", common.EXPLORATORY, "What each setting of the loop does",
        f"{start.mean_right()} right where nothing is changed; of {len(tests)} changes these make a difference: "
        f"{'; '.join(clear) or 'none'}.",
        ["changed", "right class", "difference", "updates", "UNet calls per class"],
        [[name, trainings.mean_right(), tests.get(name, ""), f"{trainings.updates:.0f}", f"{trainings.unet_calls:.0f}"]
         for name, trainings in {"nothing": start, **found}.items()],
        f"{options.seeds} training(s) of {len(lab.targets)} classes, {options.images} held-out pictures each. All "
        f"start from the config with epoch_size {options.epoch_size} and num_train_epochs {options.updates}.",
        {"trainings": {name: trainings._asdict() for name, trainings in {"nothing": start, **found}.items()},
         "tests": tests})


if __name__ == "__main__":
    common.run_script(main)
