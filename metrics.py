"""Measurements that can be believed: intervals and paired tests for accuracy, distances between sets of features."""

import warnings
from typing import NamedTuple

import torch
from scipy.stats import binomtest
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

NEAREST_K = 5  # neighbours that the balls of precision, recall, density and coverage reach to (Naeem et al. 2020)
ROWS = 2000  # of a matrix of distances at once: a thousand classes' would not fit in memory
COMPARABLE_FID = 2048  # images a side below which FID's bias dwarfs the differences that papers report


class Proportion(NamedTuple):
    """A share of successes with its Wilson 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, count: int) -> Proportion:
    """The share `successes / count` and its 95 % interval (Wilson 1927), which stays within [0, 1] at small counts."""
    interval = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    return Proportion(successes / count, interval.low, interval.high)


def mcnemar(before: torch.Tensor, after: torch.Tensor) -> float:
    """Exact two-sided p-value that `before` and `after` (right or wrong, bool [N], the same seeds) differ by chance."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return binomtest(gained, gained + lost).pvalue if gained + lost else 1.0


class _Features(torch.nn.Module):
    """Hands features through, so that torchmetrics measures features that are computed already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """FID of features [N, D] and [M, D], in float64.

    Raises:
        ValueError: fewer than two of either; their covariance is not defined.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"FID needs at least two images a side, not {len(real)} and {len(generated)}")
    metric = FrechetInceptionDistance(_Features(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def kernel_distance(real: torch.Tensor, generated: torch.Tensor, subsets: int = 100,
                    subset_size: int = 1000) -> tuple[float, float, int]:
    """KID of features [N, D] and [M, D]: mean and std over random subsets, and their size, at most `subset_size`."""
    size = min(subset_size, len(real) // 2, len(generated) // 2)  # half of a small side, or no two would differ
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 'saves all features in buffer': they are there already
        metric = KernelInceptionDistance(_Features(real.shape[1]), subsets=subsets, subset_size=size)
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


def prdc(real: torch.Tensor, generated: torch.Tensor, nearest_k: int = NEAREST_K) -> Prdc:
    """How faithful (precision, density) and how diverse (recall, coverage) generated features [M, D] are to [N, D].

    A sample's ball reaches to its `nearest_k`-th neighbour of its own kind (eq. 1 to 4 of Naeem et al. 2020).

    Raises:
        ValueError: not more than `nearest_k` of either.
    """
    if min(len(real), len(generated)) <= nearest_k:
        raise ValueError(f"needs more than {nearest_k} images a side, not {len(real)} and {len(generated)}")
    real, generated = real.double(), generated.double()
    real_radius, generated_radius = (torch.cat([torch.cdist(part, x).kthvalue(nearest_k + 1).values
                                                for part in x.split(ROWS)]) for x in (real, generated))
    balls = torch.zeros(len(generated))  # in how many real balls each generated one lies
    recalled, covered = [], []
    for part, radius in zip(real.split(ROWS), real_radius.split(ROWS), strict=True):
        distance = torch.cdist(part, generated)  # [ROWS, M]
        balls += (distance < radius[:, None]).sum(0)
        recalled.append((distance < generated_radius).any(1))
        covered.append(distance.min(1).values < radius)
    return Prdc(precision=(balls > 0).double().mean().item(), recall=torch.cat(recalled).double().mean().item(),
                density=balls.double().mean().item() / nearest_k, coverage=torch.cat(covered).double().mean().item())
