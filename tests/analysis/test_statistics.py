"""Means, errors and verdicts over seeds."""

from __future__ import annotations

import pytest
from scipy import stats

from prune_mm.analysis.statistics import (
    MET,
    MISSED,
    UNKNOWN,
    Summary,
    apart,
    at_least,
    clearly_above,
    paired_difference,
)


def test_mean_and_standard_error_are_scipys():
    values = [97.2, 96.8, 97.9, 97.1, 95.0]
    found = Summary.of(values)
    assert found.mean == pytest.approx(sum(values) / 5)
    assert found.error == pytest.approx(stats.sem(values))
    assert Summary.of([]) is None
    assert Summary.of([3.0]) == Summary(3.0, 0.0, 1)


def test_paired_differences_use_common_seeds():
    found = paired_difference({0: 2.0, 1: 4.0, 7: 9.0}, {0: 1.0, 1: 1.0, 8: 0.0})
    assert (found.mean, found.count) == (2.0, 2)
    assert found.error == pytest.approx(stats.sem([1.0, 3.0]))


def test_claims():
    above, level, below = Summary.of([2.0, 2.1, 1.9]), Summary.of([-0.1, 0.1, 0.03]), Summary.of([-2.0, -2.1, -1.9])
    noisy = Summary.of([-2.0, 0.3, 0.2])
    assert [at_least(gap) for gap in (above, level, noisy, below)] == [MET, MET, MET, MISSED]
    assert [clearly_above(gap) for gap in (above, level, noisy, below)] == [MET, MISSED, MISSED, MISSED]
    assert at_least(below, margin=3.0) == MET
    assert at_least(below, margin=1.0) == MISSED
    for claim in (at_least, clearly_above):
        assert claim(None) == claim(Summary(9.0, 0.0, 1)) == UNKNOWN
        assert claim(Summary.of([3.0, 3.1]), seeds=3) == UNKNOWN


def test_means_that_are_apart_without_common_seeds():
    low = Summary(90.0, 0.3, 3)
    assert apart(Summary(91.0, 0.4, 3), low)
    assert not apart(Summary(90.4, 0.4, 3), low)
    assert not apart(low, Summary(91.0, 0.4, 3))
