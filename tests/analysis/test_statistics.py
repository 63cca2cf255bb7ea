"""Means, errors and verdicts over seeds."""

from __future__ import annotations

import pytest
from scipy import stats

from prune_mm.analysis.statistics import (
    MET,
    MISSED,
    PAIRS_ONLY,
    UNKNOWN,
    Summary,
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
    assert paired_difference({0: 2.0, 7: 9.0}, {0: 1.0, 8: 0.0}) is None, "one difference tells no error"


ABOVE, LEVEL, BELOW = Summary.of([2.0, 2.1, 1.9]), Summary.of([-0.1, 0.1, 0.03]), Summary.of([-2.0, -2.1, -1.9])
NOISY = Summary.of([-2.0, 0.3, 0.2])


def test_at_least():
    assert [at_least(gap) for gap in (ABOVE, LEVEL, NOISY, BELOW, None)] == [MET, MET, MET, MISSED, UNKNOWN]
    assert [at_least(BELOW, margin=margin) for margin in (2.05, 1.95)] == [MET, MISSED]
    assert at_least(NOISY, margin=0.4) == MISSED, "a margin is no slack for noise"


def test_clearly_above():
    low, high, wide = Summary(90.0, 0.3, 3), Summary(92.0, 0.4, 3), Summary(92.0, 2.4, 3)
    for gap, verdict in ((ABOVE, MET), (LEVEL, MISSED), (NOISY, MISSED), (BELOW, MISSED), (None, UNKNOWN)):
        assert clearly_above(gap, high, low) == verdict
    assert clearly_above(ABOVE, wide, low) == PAIRS_ONLY
    assert clearly_above(LEVEL, wide, low) == MISSED
    assert clearly_above(ABOVE, None, low) == clearly_above(ABOVE, high, None) == UNKNOWN
