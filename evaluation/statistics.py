"""Measurements that can be believed: intervals and paired tests for accuracy, distances between sets of features."""

import math
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from scipy.stats import binomtest
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

NEAREST_K = 5  # neighbours that the balls of precision, recall, density and coverage reach to (Naeem et al. 2020)
ROWS = 2000  # of a matrix of distances at once: a thousand classes' would not fit in memory


@dataclass(frozen=True)
class Proportion:
    """A share of successes with its 95 % interval (Wilson 1927), which stays within [0, 1] at small counts."""

    successes: int
    count: int
    value: float = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self):
        interval = binomtest(self.successes, self.count).proportion_ci(0.95, method="wilson")
        for name, number in (("value", self.successes / self.count), ("low", interval.low), ("high", interval.high)):
            object.__setattr__(self, name, float(number))

    def __str__(self):
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def count_right(right: Iterable[bool]) -> Proportion:
    right = list(right)
    return Proportion(sum(right), len(right))


def pool_proportions(parts: Iterable[Proportion]) -> Proportion:
    """All parts' samples together."""
    parts = list(parts)
    return Proportion(sum(part.successes for part in parts), sum(part.count for part in parts))


def mcnemar_test(before: Iterable[bool], after: Iterable[bool]) -> tuple[int, int, float]:
    """How many of the same samples turned right and wrong, and the exact two-sided p-value that this is chance."""
    pairs = list(zip(before, after, strict=True))
    gained, lost = sum(new and not old for old, new in pairs), sum(old and not new for old, new in pairs)
    return gained, lost, binomtest(gained, gained + lost).pvalue if gained + lost else 1.0


def standard_error(values: list[float]) -> float:
    """Of the mean of `values`; of one value it is nan."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def mean_with_error(values: list[float], places: int = 2) -> str:
    """'0.83 (0.02)', without the error where there is one value."""
    error = f" ({standard_error(values):.{places}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{error}"


def given_features(count: int) -> torch.nn.Module:
    """Hands features through, so that torchmetrics measures features that are computed already."""
    network = torch.nn.Identity()
    network.num_features = count
    return network


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """FID of features [N, D] and [M, D], in float64.

    Raises:
        ValueError: fewer than two on a side; their covariance is not defined.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"FID needs at least two images on each side, not {len(real)} and {len(generated)}")
    metric = FrechetInceptionDistance(given_features(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def kernel_distance(real: torch.Tensor, generated: torch.Tensor, subsets: int = 100,
                    subset_size: int = 1000) -> tuple[float, float, int]:
    """KID of features [N, D] and [M, D]: mean and std over random subsets, and their size, at most `subset_size`."""
    size = min(subset_size, len(real) // 2, len(generated) // 2)  # half of a small side, or no two would differ
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 'saves all features in buffer': they are there already
        metric = KernelInceptionDistance(given_features(real.shape[1]), subsets=subsets, subset_size=size)
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, std = metric.compute()
    return mean.item(), std.item(), size


class Prdc(NamedTuple):
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    precision: float
    recall: float
    density: float
    coverage: float


def measure_prdc(real: torch.Tensor, generated: torch.Tensor, nearest_k: int = NEAREST_K) -> Prdc:
    """How faithful (precision, density) and how diverse (recall, coverage) generated features [M, D] are to [N, D].

    A sample's ball reaches to its `nearest_k`-th neighbour of its own kind (eq. 1 to 4 of Naeem et al. 2020).

    Raises:
        ValueError: a side with `nearest_k` images or fewer.
    """
    if min(len(real), len(generated)) <= nearest_k:
        raise ValueError(f"needs more than {nearest_k} images on each side, not {len(real)} and {len(generated)}")
    real, generated = real.double(), generated.double()
    real_radius, generated_radius = (torch.cat([torch.cdist(part, x).kthvalue(nearest_k + 1).values
                                                for part in x.split(ROWS)]) for x in (real, generated))
    balls = torch.zeros(len(generated))  # in how many real balls each generated sample lies
    recalled, covered = [], []
    for part, radius in zip(real.split(ROWS), real_radius.split(ROWS), strict=True):
        distance = torch.cdist(part, generated)  # [ROWS, M]
        balls += (distance < radius[:, None]).sum(0)
        recalled.append((distance < generated_radius).any(1))
        covered.append(distance.min(1).values < radius)
    return Prdc(precision=(balls > 0).double().mean().item(), recall=torch.cat(recalled).double().mean().item(),
                density=balls.double().mean().item() / nearest_k, coverage=torch.cat(covered).double().mean().item())
