"""Means, standard errors, and what may be claimed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MET, PAIRS_ONLY, MISSED, UNKNOWN = "met", "met*", "missed", "not yet measured"


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
    """Summary of ``first - second`` over the seeds that both have; None below two, which tell no error."""
    seeds = sorted(first.keys() & second.keys())
    return Summary.of([first[seed] - second[seed] for seed in seeds]) if len(seeds) > 1 else None


def at_least(gap: Summary | None, margin: float | None = None) -> str:
    """Whether a method is at least as good as another, by their paired difference ``gap``.

    Seeds move both alike, and what they move both by is no error of the difference.

    Args:
        gap: method minus other; None claims nothing.
        margin: what the method may be below the other; None: one standard error of the gap.
    """
    if gap is None:
        return UNKNOWN
    return MET if gap.mean >= -(gap.error if margin is None else margin) else MISSED


def clearly_above(gap: Summary | None, method: Summary | None, other: Summary | None) -> str:
    """Whether a method is better than another by more than one standard error of their paired difference ``gap``.

    :data:`PAIRS_ONLY` where it is not by the means of both, with an error as if they had no seed in common.
    """
    if gap is None or method is None or other is None:
        return UNKNOWN
    if gap.mean <= gap.error:
        return MISSED
    return MET if method.mean - other.mean > math.hypot(method.error, other.error) else PAIRS_ONLY
