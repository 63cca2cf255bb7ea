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


def at_least(gap: Summary | None, margin: float = 0.0, seeds: int = 2) -> str:
    """Whether a method is at least as good as another, less ``margin``, within one standard error.

    Args:
        gap: the paired difference: seeds move both alike, and what they move both by is no error of the difference.
        margin: what the method may be below the other.
        seeds: a gap of fewer claims nothing.
    """
    if gap is None or gap.count < seeds:
        return UNKNOWN
    return MET if gap.mean >= -margin - gap.error else MISSED


def clearly_above(gap: Summary | None, seeds: int = 2) -> str:
    """Whether a method is better than another by more than one standard error of the paired difference ``gap``."""
    if gap is None or gap.count < seeds:
        return UNKNOWN
    return MET if gap.mean > gap.error else MISSED


def apart(method: Summary, other: Summary) -> bool:
    """Whether ``method`` is above ``other`` by more than one standard error even as means of unrelated seeds."""
    return method.mean - other.mean > math.hypot(method.error, other.error)
