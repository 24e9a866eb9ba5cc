"""One factor at a time: what each setting of the loop does to accuracy and cost.

python -m experiments.ablations
"""

from evaluation.statistics import correct_pvalues
from evaluation.tables import Table
from experiments.plots import plot_curves
from experiments.study import (
    EXPLORATORY,
    Study,
    StudyResult,
    open_study,
    parse_options,
    publish_result,
)
from experiments.trainings import (
    Trainings,
    compare_trainings,
    describe_clear,
    list_seeds,
    measure_trainings,
)
from system.terminal import run_script

UNCHANGED = "nothing"
FACTORS = {  # settings and their values, of which the start's own is left out
    "number_of_prompts": (1, 3),
    "epoch_size": (4, 8, 16),
    "fresh_noise": (True, False),
    "initializer_token": ("a", "photo"),
    "guidance_scale": (1.0, 3.0, 5.0),
    "lr": (1.25e-3, 5e-3, 0.015, 0.03),
    "early_stopping": (4, 15),
    "target_accuracy": (0.7, 0.9, 0.96),
    "num_vectors": (None, 4),
    "loss": ("cross_entropy", "norm_penalty"),
}


def measure_variant(study: Study, changes: dict) -> Trainings:
    """Measure trainings with changed settings, drawn by the same sampler except for guidance."""
    drawing_study = study
    if "guidance_scale" in changes:
        drawing_study = open_study(study.options, **changes)
    images = study.options.images
    return measure_trainings(
        study, list_seeds(study), images, drawing_study=drawing_study, **changes
    )


def main(argv: list[str] | None = None, factors: dict[str, tuple] = FACTORS):
    """Train with one setting changed at a time, and publish the page."""
    options = parse_options(
        __doc__,
        argv,
        "all",
        quick={"images": 2, "updates": 2, "epoch_size": 4},
        seeds=1,
        images=10,
        epoch_size=8,
        updates=8,
    )
    study = open_study(options, epoch_size=options.epoch_size, num_train_epochs=options.updates)
    start = measure_variant(study, {})
    found = {UNCHANGED: start}
    tests = {}
    for factor, values in factors.items():
        for value in values:
            if value == getattr(study.config, factor):
                continue
            name = f"{factor} {value}"
            found[name] = measure_variant(study, {factor: value})
            tests[name] = compare_trainings(found[name], start)
    tests = correct_pvalues(tests)
    rows = []
    for name, trainings in found.items():
        updates, calls = f"{trainings.updates:.0f}", f"{trainings.unet_calls:.0f}"
        rows.append([name, trainings.mean_right(), updates, calls])
    points = {name: trainings.mean_right() for name, trainings in found.items()}
    plot_curves(study.out / "ablations.png", "changed", "accuracy", {"": points})
    publish_result(
        study,
        StudyResult(
            "ablations",
            EXPLORATORY,
            "What each setting of the loop does",
            f"Accuracy {start.mean_right()} with nothing changed. {describe_clear(tests)}",
            Table(["changed setting", "accuracy", "updates", "UNet calls per class"], rows),
            f"{options.seeds} training(s) of {len(study.targets)} classes, {options.images} "
            "held-out pictures each. All start from the config with epoch_size "
            f"{options.epoch_size} and num_train_epochs {options.updates}.",
            {"trainings": {name: part._asdict() for name, part in found.items()}},
            tests,
        ),
    )


if __name__ == "__main__":
    run_script(main)
