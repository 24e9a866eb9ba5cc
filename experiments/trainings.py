"""Several trainings of every class with the same setting: their accuracy and their cost.

What docs/results/README.md calls the protocol: values by class, and paired tests over classes.
"""

from statistics import mean
from typing import NamedTuple

from evaluation.statistics import Comparison, Interval, compare_classes, interval_over_classes
from experiments.material import (
    Sets,
    draw_sets,
    learn_tokens,
    load_vectors,
    measure_accuracy,
    measure_cost,
)
from experiments.study import Study
from models.sampling import SamplingSettings, new_scheduler
from prompt_datasets import TargetClass
from runs.session import find_training_sampling
from utils import require

SEED_STEP = 10_000  # between trainings, so that no two share noise


class Trainings(NamedTuple):
    """The results of a setting's trainings."""

    right: dict[str, list[float]]  # by class the share of right pictures in every training
    updates: float  # per class, as the rest
    unet_calls: float  # of one image each; without guidance half as many
    seconds: float

    def class_means(self) -> list[float]:
        """Return the accuracy of every class, averaged over its trainings."""
        return [mean(shares) for shares in self.right.values()]

    def mean_right(self) -> Interval:
        """Return the mean accuracy over classes."""
        return interval_over_classes(self.class_means())

    def least_right(self) -> float:
        """Return the lowest accuracy of any class in any training."""
        return min(min(shares) for shares in self.right.values())

    def join_classes(self, others: "Trainings") -> "Trainings":
        """Join with other classes of the same setting."""
        ours, theirs = len(self.right), len(others.right)

        def join_costs(cost: float, other: float) -> float:
            return (cost * ours + other * theirs) / (ours + theirs)

        return Trainings(
            self.right | others.right,
            join_costs(self.updates, others.updates),
            join_costs(self.unet_calls, others.unet_calls),
            join_costs(self.seconds, others.seconds),
        )


def list_seeds(study: Study) -> list[int]:
    """List the first seed of each of `--seeds` trainings."""
    return [study.config.seed + SEED_STEP * i for i in range(study.options.seeds)]


def measure_trainings(
    study: Study,
    seeds: list[int],
    images: int,
    targets: list[TargetClass] | None = None,
    drawing_study: Study | None = None,
    **changes,
) -> Trainings:
    """Train with `changes` to the study's settings, draw held-out pictures, and judge them.

    Pictures are drawn as `drawing_study` does.
    """
    runs = [learn_tokens(study, targets, **changes, seed=seed) for seed in seeds]
    drawn_by = drawing_study or study
    sets = [draw_sets(drawn_by, load_vectors(folders), images) for folders in runs]
    updates = mean(measure_cost(folders, "updates") for folders in runs)
    seconds = mean(measure_cost(folders, "seconds") for folders in runs)
    session = study.session.with_settings(**changes)
    sampling = find_training_sampling(session.config)
    calls_per_image = count_unet_calls(study, sampling)
    unet_calls = updates * session.config.epoch_size * calls_per_image
    return Trainings(judge_sets(study, sets), updates, unet_calls, seconds)


def judge_sets(study: Study, trainings: list[Sets]) -> dict[str, list[float]]:
    """Measure, by class, the accuracy in every training's set."""
    found = {}
    for target in trainings[0]:
        shares = [measure_accuracy(study, {target: sets[target]}).value for sets in trainings]
        found[target.title] = shares
    return found


def count_unet_calls(study: Study, sampling: SamplingSettings) -> int:
    """Count the UNet calls for one training image, both halves of guidance.

    What is recomputed is not counted.
    """
    generator = study.session.generator
    steps = len(new_scheduler(generator.scheduler, sampling).timesteps)
    has_one_half = sampling.guidance_scale <= 1 or generator.denoiser.config.time_cond_proj_dim
    return steps if has_one_half else 2 * steps


def compare_trainings(ours: Trainings, theirs: Trainings) -> Comparison:
    """Compare two settings on the same classes, two or more."""
    require(
        len(ours.right) > 1,
        "this experiment compares over classes: give two or more as --class_index",
    )
    their_means = [mean(theirs.right[title]) for title in ours.right]
    return compare_classes(ours.class_means(), their_means)


def describe_clear(tests: dict[str, Comparison]) -> str:
    """Describe how many comparisons have p < 0.05, and which."""
    clear = [f"{name} ({test})" for name, test in tests.items() if is_clear(test)]
    if not clear:
        return f"p < 0.05 in none of {len(tests)} comparisons."
    return f"p < 0.05 in {len(clear)} of {len(tests)} comparisons: {'; '.join(clear)}."


def is_clear(found: Comparison) -> bool:
    """Return whether a test shows a difference."""
    return found.pvalue < 0.05
