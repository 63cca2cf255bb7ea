"""Means, standard errors, and what may be claimed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MET, MISSED, UNKNOWN = "met", "missed", "not yet measured"


@dataclass(frozen=True)
class Summary:
    """Several measurements of one quantity.

    Attributes:
        mean: of the values.
        error: standard error of the mean, from the sample deviation (n - 1); 0 of a single value, which tells none.
        count: n.
    """

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        """Summary of ``values``; None when there are none."""
        count = len(values)
        if count == 0:
            return None
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, 0.0, 1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, math.sqrt(variance / count), count)


def paired_difference(first: dict[int, float], second: dict[int, float]) -> Summary | None:
    """Summary of ``first - second`` over the seeds that both have."""
    return Summary.of([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def at_least(
    method: Summary | None,
    other: Summary | None,
    margin: float = 0.0,
    seeds: int = 2,
    paired: Summary | None = None,
) -> str:
    """Whether ``method >= other - margin`` within one standard error of the difference of the means.

    The error is that of independent means, sqrt(a^2 + b^2); fewer than ``seeds`` values of either claim nothing. Where
    seeds move both alike that error is too generous: the ``paired`` difference, if given, must hold within its own.
    """
    if method is None or other is None or min(method.count, other.count) < seeds:
        return UNKNOWN
    slack = math.hypot(method.error, other.error)
    holds = method.mean >= other.mean - margin - slack
    return MET if holds and (paired is None or paired.mean >= -margin - paired.error) else MISSED


def clearly_above(method: Summary | None, other: Summary | None, seeds: int = 2, paired: Summary | None = None) -> str:
    """Whether ``method > other`` by more than one standard error of the difference of the means.

    And of the ``paired`` difference, if given.
    """
    if method is None or other is None or min(method.count, other.count) < seeds:
        return UNKNOWN
    holds = method.mean - other.mean > math.hypot(method.error, other.error)
    return MET if holds and (paired is None or paired.mean > paired.error) else MISSED
