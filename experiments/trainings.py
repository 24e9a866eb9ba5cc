"""Several trainings of every class with the same setting: how often their pictures are right, and what they cost.

What docs/results/README.md calls the protocol: values by class, and paired tests over classes.
"""

from dataclasses import replace
from statistics import mean
from typing import NamedTuple

from evaluation.statistics import Comparison, Interval, compare_classes, interval_over_classes
from experiments import common
from models.sampling import new_scheduler
from prompt_datasets import TargetClass
from utils import require

SEED_STEP = 10_000  # between trainings, so that no two share noise


class Trainings(NamedTuple):
    """What a setting gives."""

    right: dict[str, list[float]]  # by class the share of right pictures in every training
    updates: float  # per class, as the rest
    unet_calls: float  # of one image each; without guidance half as many
    seconds: float

    def class_means(self) -> list[float]:
        """The share of right pictures of every class, over its trainings."""
        return [mean(shares) for shares in self.right.values()]

    def mean_right(self) -> Interval:
        return interval_over_classes(self.class_means())

    def least_right(self) -> float:
        """Of any class in any training."""
        return min(share for shares in self.right.values() for share in shares)

    def join_classes(self, others: "Trainings") -> "Trainings":
        """With other classes of the same setting."""
        sizes = len(self.right), len(others.right)
        costs = [(a * sizes[0] + b * sizes[1]) / sum(sizes) for a, b in zip(self[1:], others[1:], strict=True)]
        return Trainings(self.right | others.right, *costs)


def list_seeds(lab: common.Lab) -> list[int]:
    """The first seed of each of `--seeds` trainings."""
    return [lab.config.seed + SEED_STEP * i for i in range(lab.options.seeds)]


def measure_trainings(lab: common.Lab, seeds: list[int], images: int, targets: list[TargetClass] | None = None,
                      drawing_lab: common.Lab | None = None, **changes) -> Trainings:
    """Train with `changes` to the lab's settings, draw held-out pictures (as `drawing_lab` does), and judge them."""
    runs = [common.learn_tokens(lab, targets, **changes, seed=seed) for seed in seeds]
    config = replace(lab.config, **changes)
    right = judge_sets(lab, [common.draw_sets(drawing_lab or lab, common.load_vectors(folders), images)
                             for folders in runs])
    updates, seconds = (mean(common.measure_cost(folders, key) for folders in runs) for key in ("updates", "seconds"))
    return Trainings(right, updates, updates * config.epoch_size * count_unet_calls(lab, config), seconds)


def judge_sets(lab: common.Lab, trainings: list[common.Sets]) -> dict[str, list[float]]:
    """By class the share of right pictures in every training's set."""
    return {target.title: [common.measure_accuracy(lab, {target: sets[target]}).value for sets in trainings]
            for target in trainings[0]}


def count_unet_calls(lab: common.Lab, config) -> int:
    """The UNet's evaluations for one training image, guidance's halves apart; what is made again is not counted."""
    sampling, generator = common.method_settings(config)[1], lab.get_generator()
    steps = len(new_scheduler(generator.scheduler, sampling).timesteps)
    halves = 1 if sampling.guidance_scale <= 1 or generator.denoiser.config.time_cond_proj_dim else 2
    return steps * halves


def compare_trainings(ours: Trainings, theirs: Trainings) -> Comparison:
    """Of the same classes, two or more."""
    require(len(ours.right) > 1, "this experiment compares over classes: give two or more as --class_index")
    return compare_classes(ours.class_means(), [mean(theirs.right[title]) for title in ours.right])


def describe_tests(tests: dict[str, Comparison]) -> str:
    """A sentence of all tests by name: first those that show a difference."""
    shown = {name: describe_test(test) for name, test in sorted(tests.items(), key=lambda item: item[1].pvalue >= 0.05)}
    return "; ".join(f"{name}: {text}" for name, text in shown.items()) + "."


def describe_test(found: Comparison) -> str:
    """In words, and in numbers."""
    words = "no difference shown" if found.pvalue >= 0.05 else "more" if found.difference.mean > 0 else "less"
    return f"{words} ({found})"
