"""Means, errors and verdicts over seeds."""

from __future__ import annotations

import pytest
from scipy import stats

from prune_mm.analysis.statistics import MET, MISSED, UNKNOWN, Summary, at_least, clearly_above, paired_difference


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
    low, high, wide = Summary(90.0, 0.3, 3), Summary(91.0, 0.4, 3), Summary(90.6, 0.5, 3)
    assert at_least(high, low) == MET
    assert at_least(low, high) == MISSED
    assert at_least(wide, high) == MET
    assert at_least(low, high, margin=1.0) == MET
    assert clearly_above(high, low) == MET
    assert clearly_above(wide, high) == MISSED
    steady, level = Summary.of([-2.0, -2.1, -1.9]), Summary.of([-0.1, 0.1, 0.0])
    assert at_least(wide, high, paired=steady) == MISSED, "seeds move both alike: the difference is certain"
    assert at_least(wide, high, paired=level) == MET
    assert at_least(wide, high, margin=3.0, paired=steady) == MET
    assert clearly_above(high, low, paired=level) == MISSED
    for claim in (at_least, clearly_above):
        assert claim(None, low) == claim(Summary(99.0, 0.0, 1), low) == UNKNOWN
