"""The search for the nullifying threshold of Hinge: one number for all matrices, until the cost meets the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class ThresholdSearch:
    """How a search ended.

    Attributes:
        threshold: the result.
        ratio: the last ratio that was evaluated: at ``threshold``, unless the published search ran into its limit.
        tried: thresholds in the order they were evaluated.
    """

    threshold: float
    ratio: float
    tried: tuple[float, ...]


def published_threshold(
    ratio_at: Callable[[float], float],
    target: float,
    start: float = 0.005,
    step: float = 0.01,
    tolerance: float = 0.001,
    limit: int = 100,
) -> ThresholdSearch:
    """The search as published: step towards the target, and halve the step whenever it lies between two thresholds.

    Args:
        ratio_at: cost of the compact network at a threshold, as a share of the dense one.
        target: the share wanted.
        start: first threshold.
        step: first step.
        tolerance: how far from the target the ratio may be.
        limit: evaluations at most. A target between two plateaus is never met; the threshold is then one step past
            the last one evaluated, as published.

    Raises:
        ValueError: the limit is below 1.

    Source: Hinge, binary search of the published code.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    threshold, previous, tried = start, 1.0, []
    while len(tried) < limit:
        ratio = ratio_at(threshold)
        tried.append(threshold)
        if abs(ratio - target) <= tolerance:
            break
        if len(tried) > 1 and (ratio - target) * (previous - target) < 0.0:
            step /= 2.0
        threshold = threshold + step if ratio > target else max(threshold - step, 0.0)
        previous = ratio
    return ThresholdSearch(threshold, ratio, tuple(tried))


def best_threshold(
    norms: Sequence[Tensor], ratio_at: Callable[[float], float], target: float, tolerance: float = 0.0
) -> ThresholdSearch:
    """The smallest threshold whose cost is within the target: the most that may stay.

    The cost is a step function that changes at norms only, and falls; so it is found exactly, by bisection over the
    sorted norms, in about log2 of their number of evaluations.

    Args:
        norms: group norms ``(n,)`` of every matrix.
        ratio_at: cost of the compact network when groups below a threshold go, as a share of the dense one.
        target: the share wanted.
        tolerance: how far above the target the ratio may be.

    Returns:
        A threshold that is 0, one of the norms, or just above all of them, and the ratio evaluated there.

    Raises:
        ValueError: when even the largest threshold leaves more than the target, with what it leaves.
    """
    values = np.unique(np.concatenate([np.zeros(1), *(v.detach().cpu().double().numpy().ravel() for v in norms)]))
    # Twice the largest is above it in every type.
    candidates = [*values.tolist(), 2.0 * float(values[-1]) + 1e-30]
    tried: list[float] = []

    def cost(index: int) -> float:
        tried.append(candidates[index])
        return ratio_at(candidates[index])

    low, high = 0, len(candidates) - 1
    found = cost(low)
    if found <= target + tolerance:
        return ThresholdSearch(candidates[low], found, tuple(tried))
    found = cost(high)
    if found > target + tolerance:
        raise ValueError(
            f"the target {target:.4g} is out of reach: with as few groups as may stay, {found:.4g} is left"
        )
    while high - low > 1:
        middle = (low + high) // 2
        ratio = cost(middle)
        if ratio <= target + tolerance:
            high, found = middle, ratio
        else:
            low = middle
    return ThresholdSearch(candidates[high], found, tuple(tried))
