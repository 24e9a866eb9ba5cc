"""Statistics against independent ones: torch-fidelity, scipy, formulas by hand, brute force."""

import math

import pytest
import torch
from scipy.stats import binom
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from evaluation.statistics import (
    SAMPLED,
    Proportion,
    count_right,
    frechet_distance,
    kernel_distance,
    mcnemar_test,
    measure_prdc,
    pool_features,
    pool_proportions,
)


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 12, generator=generator)
    return real, torch.randn(300, 12, generator=generator) * 1.3 + 0.4


def measure_fid(*sides: torch.Tensor) -> float:
    return frechet_distance(*(pool_features(side.split(70), len(side)) for side in sides))


@pytest.mark.parametrize("successes, count", [(0, 10), (3, 10), (50, 50), (400, 800)])
def test_the_interval_is_wilson_s(successes, count):
    p, z = successes / count, 1.959963984540054
    middle, scale = p + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    found = Proportion(successes, count)
    assert (found.value, found.low, found.high) == pytest.approx(
        (p, (middle - half) / scale, (middle + half) / scale), abs=1e-9
    )


def test_proportions_are_pooled_and_printed():
    assert pool_proportions([count_right([True, False]), Proportion(3, 8)]) == Proportion(4, 10)
    assert str(Proportion(400, 800)) == "0.50 [0.47, 0.53]"


def test_mcnemar_is_the_exact_binomial():
    before = torch.tensor([1] * 20 + [0] * 30).bool()
    after = torch.tensor([1] * 18 + [0] * 2 + [1] * 12 + [0] * 18).bool()
    assert mcnemar_test(before, after) == (12, 2, pytest.approx(2 * binom.cdf(2, 14, 0.5)))
    assert mcnemar_test(before, before) == (0, 0, 1.0)


def test_fid_equals_torch_fidelity(features):
    statistics = [fid_features_to_statistics(part) for part in features]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert measure_fid(*features) == pytest.approx(theirs, rel=1e-3)
    assert abs(measure_fid(features[0], features[0])) < 1e-3


def test_kid_equals_torch_fidelity(features):
    theirs = kid_features_to_metric(
        *features, kid_subsets=100, kid_subset_size=150, verbose=False, rng_seed=1
    )
    mean, std, size = kernel_distance(*features, subset_size=150)
    # half of the smaller side: subsets must differ
    assert size == 150 and kernel_distance(*features)[2] == 150
    assert abs(mean - theirs["kernel_inception_distance_mean"]) < std / 3
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=0.4)
    assert kernel_distance(*features) == kernel_distance(*features)


def test_prdc_equals_brute_force(features):
    real, generated, k = features[0][:40], features[1][:30], 5

    def radius(points, i):
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[
            k - 1
        ]

    real, generated = real.double().tolist(), generated.double().tolist()
    real_radii = [radius(real, i) for i in range(len(real))]
    generated_radii = [radius(generated, i) for i in range(len(generated))]
    inside = [[math.dist(r, g) < real_radii[i] for g in generated] for i, r in enumerate(real)]
    precision = sum(any(row[j] for row in inside) for j in range(len(generated))) / len(generated)
    recall = sum(
        any(math.dist(r, g) < generated_radii[j] for j, g in enumerate(generated)) for r in real
    ) / len(real)
    density = sum(map(sum, inside)) / (k * len(generated))
    coverage = sum(any(row) for row in inside) / len(real)
    ours = measure_prdc(torch.tensor(real), torch.tensor(generated), k)
    assert ours == pytest.approx(
        {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
    )
    assert 0 < ours["coverage"] < 1


@pytest.mark.parametrize("measure", [measure_prdc, measure_fid])
def test_too_few_images_are_refused(features, measure):
    with pytest.raises(ValueError, match="not 400 and 1"):
        measure(features[0], features[1][:1])


def test_fid_keeps_its_digits_where_float32_would_not(features):
    """Shifting both sides far off changes nothing."""
    real, generated = (part.double() for part in features)
    assert measure_fid(real + 3e4, generated + 3e4) == pytest.approx(
        measure_fid(real, generated), rel=1e-6
    )


def test_of_many_features_a_sample_is_held():
    """Moments are of all of them; the sample is the same however they come."""
    features = torch.randn(SAMPLED + 100, 12, generator=torch.Generator().manual_seed(0))
    whole = pool_features([features], len(features))
    assert whole.sample.shape == (SAMPLED, 12) and whole.count == len(features)
    assert len(whole.sample.unique(dim=0)) == SAMPLED
    assert len(torch.cat([whole.sample, features]).unique(dim=0)) == len(features)
    assert torch.allclose(whole.mean, features.double().mean(0))
    assert torch.allclose(whole.covariance, features.double().T.cov())
    parts = pool_features(features.split(333), len(features))
    assert torch.equal(parts.sample, whole.sample)
    assert torch.allclose(parts.covariance, whole.covariance)
