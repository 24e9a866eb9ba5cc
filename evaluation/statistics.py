"""Intervals and paired tests for accuracy, and distances between sets of features."""

import math
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap, permutation_test
from torchmetrics.image.kid import KernelInceptionDistance

# Neighbours that the balls of precision, recall, density and coverage reach to (Naeem et al. 2020).
NEAREST_K = 5
ROWS = 2000  # of a matrix of distances at once: a thousand classes' would not fit in memory
Z = statistics.NormalDist().inv_cdf(0.975)  # of a 95 % interval
# Of a million pictures these go into KID and the neighbourhoods, whose cost grows with the square.
SAMPLED = 20_000
KID_SUBSETS = 100


@dataclass
class Proportion:
    """A share of successes with its 95 % interval (Wilson 1927), which stays within [0, 1]."""

    successes: int
    count: int
    value: float = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self):
        # eq. 4 of Brown, Cai and DasGupta 2001; scipy's function tests a hypothesis first, which
        # takes a millisecond
        count = self.count
        share = self.successes / count
        widening = 1 + Z**2 / count
        centre = (share + Z**2 / (2 * count)) / widening
        variance = share * (1 - share) / count + Z**2 / (4 * count**2)
        half = Z / widening * math.sqrt(variance)
        self.value = share
        self.low = 0.0 if self.successes == 0 else centre - half
        self.high = 1.0 if self.successes == count else centre + half

    def __str__(self):
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def count_right(right: Iterable[bool]) -> Proportion:
    """Return the share that is right."""
    right = list(right)
    return Proportion(sum(right), len(right))


def pool_proportions(parts: Iterable[Proportion]) -> Proportion:
    """Pool the samples of all parts."""
    parts = list(parts)
    successes = sum(part.successes for part in parts)
    return Proportion(successes, sum(part.count for part in parts))


def mcnemar_test(before: Iterable[bool], after: Iterable[bool]) -> tuple[int, int, float]:
    """Count how many of the same samples turned right and wrong, and the exact two-sided p-value.

    The test is McNemar's.
    """
    gained = lost = 0
    for old, new in zip(before, after, strict=True):
        gained += new and not old
        lost += old and not new
    if gained + lost == 0:
        return 0, 0, 1.0
    return gained, lost, binomtest(gained, gained + lost).pvalue


def standard_error(values: list[float]) -> float:
    """Compute the standard error of the mean of `values`; nan for a single value."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


class Interval(NamedTuple):
    """A mean over classes with its 95 % bootstrap interval (Efron 1979, percentiles)."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval_over_classes(values: list[float]) -> Interval:
    """Compute the interval of one value per class; the sample is the classes."""
    mean = statistics.mean(values)
    if len(set(values)) == 1:
        return Interval(mean, mean, mean)
    rng = np.random.default_rng(0)
    found = bootstrap((values,), np.mean, method="percentile", rng=rng).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


class Comparison(NamedTuple):
    """The mean difference of two conditions over classes, and its p-value."""

    difference: Interval
    pvalue: float

    def __str__(self):
        mean, low, high = self.difference
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], p = {self.pvalue:.2g}"


def compare_classes(ours: list[float], theirs: list[float]) -> Comparison:
    """Compute the mean difference of one value per class in two conditions, and test it.

    A paired permutation test, two-sided: all 2^C exchanges of a class's two values for up to 16
    classes, 100,000 random ones for more.
    """
    differences = np.array(ours) - np.array(theirs)
    found = permutation_test(
        (differences, np.zeros_like(differences)),
        lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples",
        n_resamples=100_000,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return Comparison(interval_over_classes(differences.tolist()), float(found.pvalue))


def correct_pvalues(comparisons: dict[str, Comparison]) -> dict[str, Comparison]:
    """Correct the p-values of several comparisons (Holm 1979)."""
    by_pvalue = sorted(comparisons, key=lambda name: comparisons[name].pvalue)
    corrected = {}
    largest = 0.0
    for i, name in enumerate(by_pvalue):
        found = comparisons[name]
        pvalue = (len(comparisons) - i) * found.pvalue
        largest = max(largest, min(1.0, pvalue))
        corrected[name] = found._replace(pvalue=largest)
    return {name: corrected[name] for name in comparisons}


class FeatureSet(NamedTuple):
    """Features [D] of `count` pictures: moments of all for FID, a sample for the other measures."""

    count: int
    mean: torch.Tensor  # [D]
    covariance: torch.Tensor  # [D, D]
    sample: torch.Tensor  # [N, D]: all of them, or SAMPLED at random


def pool_features(parts: Iterable[torch.Tensor], count: int) -> FeatureSet:
    """Pool parts [n, D] of `count` features; only a sample is held in memory."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    chosen = order < SAMPLED
    total = torch.zeros(())
    outer = torch.zeros(())
    sample = []
    for part in parts:
        here, chosen = chosen.tensor_split([len(part)])
        sample.append(part[here])
        exact = part.double()
        total = total + exact.sum(0)
        outer = outer + exact.T @ exact
    mean = total / count
    covariance = (outer - count * mean.outer(mean)) / (count - 1)
    return FeatureSet(count, mean, covariance, torch.cat(sample))


def frechet_distance(real: FeatureSet, generated: FeatureSet) -> float:
    """Compute FID (Heusel et al. 2017, eq. 6)."""
    if min(real.count, generated.count) < 2:  # their covariance is not defined
        raise ValueError(
            f"FID needs at least two images on each side, not {real.count} and {generated.count}"
        )
    between = (real.mean - generated.mean).square().sum()
    roots = torch.linalg.eigvals(real.covariance @ generated.covariance).sqrt().real
    traces = real.covariance.trace() + generated.covariance.trace()
    return (between + traces - 2 * roots.sum()).item()


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, subset_size: int = 1000
) -> tuple[float, float, int]:
    """Compute KID of features [N, D] and [M, D]: mean and std over random subsets, and their size.

    The size is at most `subset_size`, and at most half of the smaller side, or no two subsets would
    differ.
    """
    size = min(subset_size, len(real) // 2, len(generated) // 2)
    with warnings.catch_warnings():
        # 'saves all features in buffer': they are there already
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=KID_SUBSETS, subset_size=size)
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # always the same subsets
        torch.manual_seed(0)
        mean, std = metric.compute()
    return mean.item(), std.item(), size


def measure_prdc(
    real: torch.Tensor, generated: torch.Tensor, nearest_k: int = NEAREST_K
) -> dict[str, float]:
    """Compute precision and recall (Kynkäänniemi et al. 2019), density and coverage.

    The latter as in eq. 1 to 4 of Naeem et al. 2020; features [N, D] and [M, D].
    """
    if min(len(real), len(generated)) <= nearest_k:
        raise ValueError(
            f"needs more than {nearest_k} images on each side, not {len(real)} and {len(generated)}"
        )
    real, generated = real.double(), generated.double()
    real_radius = measure_radii(real, nearest_k)
    generated_radius = measure_radii(generated, nearest_k)
    balls = torch.zeros(len(generated))  # in how many real balls each generated sample lies
    recalled, covered = [], []
    for part, radius in zip(real.split(ROWS), real_radius.split(ROWS), strict=True):
        distance = torch.cdist(part, generated)  # [ROWS, M]
        balls += (distance < radius[:, None]).sum(0)
        recalled.append((distance < generated_radius).any(1))
        covered.append(distance.min(1).values < radius)
    return {
        "precision": (balls > 0).double().mean().item(),
        "recall": torch.cat(recalled).double().mean().item(),
        "density": balls.double().mean().item() / nearest_k,
        "coverage": torch.cat(covered).double().mean().item(),
    }


def measure_radii(features: torch.Tensor, nearest_k: int) -> torch.Tensor:
    """Compute the distance [N] of each feature [N, D] to its k-th neighbour."""
    radii = []
    for part in features.split(ROWS):
        distances = torch.cdist(part, features)
        radii.append(distances.kthvalue(nearest_k + 1).values)  # the nearest is itself
    return torch.cat(radii)
