"""Tests over classes: intervals, paired permutations, and many of them at once."""

import itertools

import numpy as np
import pytest

from evaluation.statistics import (
    Comparison,
    Interval,
    compare_classes,
    correct_pvalues,
    interval_over_classes,
)


def test_the_permutation_test_counts_every_exchange():
    ours, theirs = [0.9, 1.0, 0.8, 0.7, 1.0, 0.95], [0.5, 0.9, 0.85, 0.6, 0.4, 0.95]
    differences = np.subtract(ours, theirs)
    means = [abs(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean([value >= abs(differences.mean()) - 1e-12 for value in means])
    found = compare_classes(ours, theirs)
    assert found.pvalue == pytest.approx(expected) and found.difference.mean == pytest.approx(
        differences.mean()
    )
    assert compare_classes(theirs, ours).pvalue == pytest.approx(expected)
    assert compare_classes(ours, ours).pvalue == 1


def test_the_smallest_p_of_sixteen_classes():
    assert compare_classes([1.0] * 16, np.linspace(0.1, 0.9, 16).tolist()).pvalue == pytest.approx(
        2 / 2**16
    )


def test_intervals_hold_the_mean_of_nine_samples_in_ten():
    """Percentiles of a bootstrap are a little narrow: the protocol says so."""
    rng = np.random.default_rng(3)
    found = [interval_over_classes(rng.normal(0.7, 0.1, 16).tolist()) for _ in range(300)]
    assert 0.88 < np.mean([low <= 0.7 <= high for _, low, high in found]) < 0.97
    assert interval_over_classes([0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    assert str(interval_over_classes([0.5])) == "0.50 [0.50, 0.50]"


def test_holms_correction():
    def pvalues(*values):
        found = correct_pvalues(
            {str(i): Comparison(Interval(0, 0, 0), p) for i, p in enumerate(values)}
        )
        return pytest.approx([comparison.pvalue for comparison in found.values()])

    assert pvalues(0.01, 0.04, 0.03, 0.005) == [0.03, 0.06, 0.06, 0.02]
    assert pvalues(0.7, 0.6) == [1, 1] and pvalues(0.2) == [0.2]
