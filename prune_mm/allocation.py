"""Allocation: how many channels every layer keeps, as pure functions of shares, norm scales and budgets.

Counts are integers from start to end: a count that goes through a ratio and back can lose a channel to
truncation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Larger than the round-off of any channels * share, smaller than any difference that is meant.
_ROUNDING_GUARD = 1e-9


def _check_sparsity(sparsity: float) -> None:
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")


def global_gamma_keep(gammas: Sequence[Tensor], sparsity: float) -> list[int]:
    """Channels each layer keeps when one threshold on the norm scales |gamma| is shared by all layers.

    The threshold is element int(N * sparsity) of all N magnitudes in ascending order, and a channel is kept
    when it is strictly above. Without ties exactly N - int(N * sparsity) - 1 channels are kept, so one goes
    even at sparsity 0. All channels that tie with the threshold go with it: equal gammas everywhere (an
    untrained network) keep nothing, and dead channels (gamma 0) are never kept. No layer has a minimum; a
    layer may keep 0 channels.

    Args:
        gammas: per layer, the norm scales (C_l,) that follow the prunable conv; dead channels hold 0.
        sparsity: share of channels to prune, in [0, 1).

    Returns:
        Kept channels per layer; an empty list for no layers.

    Raises:
        ValueError: `sparsity` is outside [0, 1), or a gamma is NaN.

    Source: CHEX (CVPR 2022, arXiv 2203.15794), global allocation by the scales of batch normalization.
    """
    _check_sparsity(sparsity)
    magnitudes = [gamma.detach().abs().to(torch.float64).flatten() for gamma in gammas]
    total = sum(m.numel() for m in magnitudes)
    if total == 0:
        return [0 for _ in magnitudes]
    ordered = torch.cat(magnitudes).sort().values
    if ordered[-1].isnan():
        raise ValueError("gammas hold NaN: the norm scales cannot be ranked")
    threshold = ordered[min(int(total * sparsity), total - 1)]
    return [int((m > threshold).sum()) for m in magnitudes]


def uniform_keep(channels: Sequence[int], sparsity: float) -> list[int]:
    """Channels each layer keeps when every layer loses the same share: floor(C * (1 - sparsity)).

    The floor forgives round-off, so a share that means a whole number of channels gives that number (10
    channels at sparsity 0.9 keep 1, where plain float truncation keeps 0).

    Args:
        channels: channels C of each layer.
        sparsity: share of channels to prune, in [0, 1).

    Returns:
        Kept channels per layer.

    Raises:
        ValueError: `sparsity` is outside [0, 1).

    Source: CHEX (CVPR 2022, arXiv 2203.15794), the initial mask, and its uniform allocation.
    """
    _check_sparsity(sparsity)
    return [math.floor(count * (1.0 - sparsity) + _ROUNDING_GUARD) for count in channels]


def round_channels(keep: int, total: int, divisor: int = 1, minimum: int = 0) -> int:
    """Round a kept count to what hardware likes, never emptying a layer that was not empty.

    The result is the nearest of the multiples of `divisor` up to `total` and `total` itself (a tie keeps
    more, a full layer stays full), raised to at least `minimum`, and to at least min(divisor, total) when
    `keep` is positive. So it is a multiple of `divisor`, `total`, or `minimum`; it lies in [min(minimum,
    total), total]; it never decreases when `keep` grows.

    Args:
        keep: wanted count; below 0 counts as 0, above `total` as `total`.
        total: channels of the dense layer, at least 1.
        divisor: at least 1.
        minimum: fewest channels; above `total` it counts as `total`.

    Returns:
        The rounded count.

    Raises:
        ValueError: `total` or `divisor` is below 1, or `minimum` is negative.
    """
    if total < 1 or divisor < 1 or minimum < 0:
        raise ValueError(
            f"need total >= 1, divisor >= 1, minimum >= 0; got total={total}, divisor={divisor}, minimum={minimum}"
        )
    keep = min(max(keep, 0), total)
    lower = keep // divisor * divisor
    upper = min(lower + divisor, total)
    nearest = upper if keep - lower >= upper - keep else lower
    floor = max(min(minimum, total), min(divisor, total) if keep else 0)
    return max(nearest, floor)


def fit_to_budget(
    cost: Callable[[list[int]], float],
    counts_at: Callable[[float], list[int]],
    budget: float,
    tolerance: float = 1e-4,
    highest: float = 1.0 - 1e-9,
) -> tuple[float, list[int]]:
    """Smallest sparsity, so the largest network, whose cost is within the budget, by bisection.

    The cost is taken to fall, or stay, as sparsity grows. Where it does not, the answer is still within the
    budget, only perhaps not the largest one.

    Args:
        cost: cost of a network with these kept counts, in the unit of `budget` (MACs, parameters, seconds
            ...).
        counts_at: kept channels per layer at a sparsity in [0, 1).
        budget: highest cost allowed.
        tolerance: width in sparsity at which to stop: some sparsity at most this much lower is over the
            budget.
        highest: highest sparsity tried, in [0, 1).

    Returns:
        The sparsity and its kept counts; cost(counts) <= budget always.

    Raises:
        ValueError: even `highest` is over the budget (the message gives the lowest cost reached), `budget` is
            NaN, `tolerance` is not positive, or `highest` is outside [0, 1).
    """
    _check_sparsity(highest)
    if not tolerance > 0.0 or math.isnan(budget):
        raise ValueError(f"need tolerance > 0 and a number as budget; got tolerance={tolerance}, budget={budget}")
    counts = counts_at(0.0)
    if cost(counts) <= budget:
        return 0.0, counts
    over, within, counts = 0.0, highest, counts_at(highest)
    lowest = cost(counts)
    if not lowest <= budget:
        raise ValueError(f"budget {budget:g} cannot be met: the lowest reachable cost is {lowest:g}")
    while within - over > tolerance:
        middle = (over + within) / 2.0
        if middle in (over, within):
            break
        candidate = counts_at(middle)
        if cost(candidate) <= budget:
            within, counts = middle, candidate
        else:
            over = middle
    return within, counts
