"""Which rows and columns of a layer sit together: permutations that make its kernel norms block diagonal.

Wanted are an output and an input permutation that minimise J = sum(C * norms[out_perm][:, in_perm]), with C the cost
matrix of `strucspars_tiers`: power^t for mass that tier t of the nested 2 x 2 splits cuts off. The published method
alternates two exact assignments, rows with columns fixed and columns with rows fixed (`alternate_emd`); it stops in
local optima, and its price grows with the third power. `solve_permutations` orders from the top by bisection
(`assignment_bisect`), then improves in place (`assignment_refine`).

Source of the problem: StrucSpars (UAI 2021, arXiv 2002.08127), channel assignment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prune_mm.pruners.assignment_bisect import bisect_order
from prune_mm.pruners.assignment_refine import leaf_costs, reassign_rows
from prune_mm.pruners.strucspars_tiers import check_norms, check_power, cost_matrix, depth, unchecked_tier_masses

Start = tuple[Tensor | np.ndarray, Tensor | np.ndarray]
_Pair = tuple[np.ndarray, np.ndarray]

# A new order replaces the start only if it is better by more than this share: permutations rest while nothing changes.
_STRICTLY = 1e-9
# Channels on the larger side up to which a layer is tiny, small, middling: effort falls as size and price grow.
_TINY, _SMALL, _MIDDLE = 16, 64, 128
# From this decay on deep tiers weigh nearly as much as the first one, and splitting from the top is no longer enough.
_FLAT_POWER = 0.7
# A start that saves at least this share of what the bisected order saves against chance is worth improving too.
_NEAR = 0.8
# The published half-steps are given up when they look like ending this share of that saving, or more, above the best.
_FAR = 0.03
# Row arrangements tried at most when a layer is small enough to try them all.
_EXHAUSTIVE = 315


@dataclass(frozen=True)
class Permutations:
    """Where the channels of a layer sit.

    Attributes:
        out_perm: int64 (O,), row `out_perm[a]` sits at position a: `norms[out_perm][:, in_perm]` is ordered.
        in_perm: int64 (I,), the same for columns.
        objective: J = sum(C * ordered), in the unit of the norms.
    """

    out_perm: Tensor
    in_perm: Tensor
    objective: float


class _Order(NamedTuple):
    """Row and column order of a matrix, and what it costs there."""

    rows: np.ndarray
    columns: np.ndarray
    cost: float


def order_cost(ordered_norms: Tensor | np.ndarray, power: float = 0.5) -> float:
    """Objective of an ordered layer, J = sum(C * ordered), without building C.

    Args:
        ordered_norms: (O, I) kernel norms, rows and columns permuted.
        power: decay of the cost from tier to tier, in (0, 1].

    Returns:
        J, in the unit of the norms.

    Raises:
        ValueError: `power` is outside (0, 1], or as `check_norms`.
    """
    check_power(power)
    return _cost(check_norms(ordered_norms, "ordered_norms"), power)


def _cost(ordered: np.ndarray, power: float) -> float:
    """J of a matrix that is known to be fit."""
    masses = unchecked_tier_masses(ordered)[:-1]
    return float((masses * power ** np.arange(masses.size)).sum())


def _as_permutation(perm: Tensor | np.ndarray, size: int, name: str) -> np.ndarray:
    """An index vector as an int64 array, after checks."""
    values = np.asarray(perm.cpu() if isinstance(perm, Tensor) else perm)
    if values.shape != (size,) or not np.array_equal(np.sort(values), np.arange(size)):
        raise ValueError(f"start: {name} must hold every number from 0 to {size - 1} once, got shape {values.shape}")
    return values.astype(np.int64)


def _begin(
    norms: Tensor | np.ndarray, power: float, rounds: int, start: Start | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked norms, and the row and column order to start from."""
    check_power(power)
    if rounds < 1:
        raise ValueError(f"rounds, the number of alternations, must be at least 1, got {rounds}")
    matrix = check_norms(norms)
    if start is None:
        return matrix, np.arange(matrix.shape[0]), np.arange(matrix.shape[1])
    if len(start) != 2:
        raise ValueError(f"start must be a pair, output and input permutation, got {len(start)} items")
    rows = _as_permutation(start[0], matrix.shape[0], "the output permutation")
    return matrix, rows, _as_permutation(start[1], matrix.shape[1], "the input permutation")


def _assign(cost: np.ndarray) -> np.ndarray:
    """Cheapest one-to-one assignment, position -> item, of a square cost matrix; by POT, or by SciPy without POT."""
    try:
        import ot
    except ImportError:
        from scipy.optimize import linear_sum_assignment

        return linear_sum_assignment(cost)[1]
    ones = np.ones(len(cost))
    return ot.emd(ones, ones, np.ascontiguousarray(cost), numItermax=10**9).argmax(axis=1)


def _alternate(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, power: float, rounds: int) -> _Pair:
    """The published alternation."""
    cost = cost_matrix(*matrix.shape, power=power).numpy()
    for _ in range(rounds):
        row_cost = cost @ matrix[:, columns].T
        rows = _assign(row_cost)
        column_cost = matrix[rows].T @ cost
        # The plan goes from columns to positions; a position takes the column that was sent to it.
        sent_to = _assign(column_cost)
        columns = np.argsort(sent_to)
        after_rows = row_cost[np.arange(len(rows)), rows].sum()
        if after_rows == column_cost[np.arange(len(sent_to)), sent_to].sum():
            break
    return rows, columns


def alternate_emd(
    norms: Tensor | np.ndarray, power: float = 0.5, rounds: int = 20, start: Start | None = None
) -> Permutations:
    """Permutations by the published alternation: exact assignment of rows, then of columns, and so on.

    Needs POT (`pip install POT`); without it SciPy solves the same assignments, about three times slower, and may
    take another of several equally good ones.

    Args:
        norms: (O, I) kernel norms, original coordinates.
        power: decay of the cost from tier to tier, in (0, 1].
        rounds: alternations at most; it stops early when the two assignments of one agree in cost.
        start: output and input permutation to start from; None means identity.

    Returns:
        The permutations reached. Every half-step is optimal, the whole need not be.

    Raises:
        ValueError: as `solve_permutations`.

    Source: StrucSpars, channel assignment by alternating optimal transport.
    """
    matrix, rows, columns = _begin(norms, power, rounds, start)
    order = _measured(matrix, *_alternate(matrix, rows, columns, power, rounds), power)
    return Permutations(torch.from_numpy(order.rows), torch.from_numpy(order.columns), order.cost)


def solve_permutations(
    norms: Tensor | np.ndarray, power: float = 0.5, rounds: int = 20, start: Start | None = None
) -> Permutations:
    """Permutations that make a layer as nearly block diagonal as can be found quickly.

    The result never costs more than the start, and is the start itself unless it costs less by a share of more
    than 1e-9. It is the optimum for layers small enough to try everything (a side of up to 4 channels, 8 x 8). It
    depends on the arguments only; no global random state is read or changed.

    Args:
        norms: (O, I) kernel norms, original coordinates; finite and not negative.
        power: decay of the cost from tier to tier, in (0, 1].
        rounds: passes of improvement over rows and columns at most, at least 1.
        start: output and input permutation to start from, as from the last call; None means identity.

    Returns:
        The permutations; those of the start where a side is odd or all norms are 0.

    Raises:
        ValueError: `norms` is no matrix, is empty, or holds NaN, infinite or negative values; `power` is outside
            (0, 1]; `rounds` is below 1; or `start` is not a pair of permutations of the right sizes.
    """
    matrix, rows, columns = _begin(norms, power, rounds, start)
    first = _Order(rows, columns, _cost(matrix, power)) if start is None else _measured(matrix, rows, columns, power)
    best, limit = first, first.cost * (1.0 - _STRICTLY)
    if first.cost > 0.0:
        for found in _candidates(matrix, first, power, rounds):
            if found.cost < min(limit, best.cost):
                best = found
    return Permutations(torch.from_numpy(best.rows), torch.from_numpy(best.columns), best.cost)


def solve_outputs(
    norms: Tensor | np.ndarray,
    in_perm: Tensor | np.ndarray,
    power: float = 0.5,
    start: Tensor | np.ndarray | None = None,
) -> Permutations:
    """The best output permutation when the input permutation is given: one exact half-step.

    Args:
        norms: (O, I) kernel norms.
        in_perm: (I,), the order of the inputs.
        power: decay of the cost from tier to tier, in (0, 1].
        start: (O,), outputs that need not move stay where it has them; None: as they are.

    Returns:
        The permutations, `in_perm` among them, and their objective.

    Raises:
        ValueError: as :func:`solve_permutations`.
    """
    order = np.arange(len(norms)) if start is None else start
    matrix, rows, columns = _begin(norms, power, 1, (order, in_perm))
    tiers = depth(*matrix.shape)
    if tiers:
        ordered = matrix[rows].take(columns, axis=1)
        rows = rows[reassign_rows(ordered, 2**tiers, power, exact=True)]
    cost = _cost(matrix[rows].take(columns, axis=1), power)
    return Permutations(torch.from_numpy(rows), torch.from_numpy(columns), cost)


def _candidates(matrix: np.ndarray, start: _Order, power: float, rounds: int) -> Iterator[_Order]:
    """Orders worth comparing. Those that do not grow from the start are the same at every call: they cannot drift."""
    exhaustive = _optimum(matrix, power)
    if exhaustive is not None:
        yield _measured(matrix, *exhaustive, power)
        return
    tiers, size, flat = depth(*matrix.shape), max(matrix.shape), power > _FLAT_POWER
    # Single precision is enough to search; what is found is measured in double.
    scaled = np.divide(matrix, matrix.max(), out=np.empty(matrix.shape, dtype=np.float32), casting="same_kind")
    split = _measured(matrix, *bisect_order(scaled, tiers, seed=0), power)
    chance = float(matrix.sum()) * sum(power**tier / 2 ** (tier + 1) for tier in range(tiers))
    near = chance - start.cost >= _NEAR * (chance - split.cost)
    # More starts where they are cheap, or asked for, unless the given start is hard to beat anyway.
    seeds = 6 if size <= _TINY else 1 if near and size > _SMALL else 4 if rounds > 1 else 2 if size <= _SMALL else 1
    others = [_measured(matrix, *bisect_order(scaled, tiers, seed), power) for seed in range(1, seeds)]
    if size > _SMALL:
        others = sorted((order for order in others if order.cost < split.cost), key=lambda order: order.cost)[:1]
    lowest = math.inf
    for order in (split, *others):
        if rounds > 1 or size <= _MIDDLE or flat:
            found = _improve(matrix, order, power, rounds)
        else:
            found = _improve(scaled, order, power, rounds, exact=False)
            found = _measured(matrix, found.rows, found.columns, power)
        lowest = min(lowest, found.cost)
        yield found
    if size <= _SMALL:
        # At this size the published alternation itself is affordable.
        reached = _measured(matrix, *_alternate(matrix, start.rows, start.columns, power, rounds), power)
        yield _improve(matrix, reached, power, rounds)
    elif near or flat or rounds > 1:
        # The same half-steps as the published ones, given up when they are far from winning.
        hopeless = math.inf if near or flat else lowest + _FAR * (chance - lowest)
        yield _improve(matrix, start, power, rounds, hopeless=hopeless)


def _measured(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, power: float) -> _Order:
    """An order with its cost."""
    return _Order(rows, columns, _cost(matrix[rows].take(columns, axis=1), power))


def _improve(
    matrix: np.ndarray, order: _Order, power: float, rounds: int, exact: bool = True, hopeless: float = math.inf
) -> _Order:
    """Reassign rows, then columns, again and again, until a round gains nothing.

    It also ends when the cost would stay above `hopeless` even if every round left gained as much as the last one.
    """
    leaves = 2 ** depth(*matrix.shape)
    rows, columns, cost = order
    ordered = matrix[rows].take(columns, axis=1)
    for left in reversed(range(rounds)):
        row_order = reassign_rows(ordered, leaves, power, exact)
        ordered = ordered[row_order]
        column_order = reassign_rows(np.ascontiguousarray(ordered.T), leaves, power, exact)
        ordered = ordered.take(column_order, axis=1)
        rows, columns = rows[row_order], columns[column_order]
        before, cost = cost, _cost(ordered, power)
        if before - cost <= 0.0 or cost - left * (before - cost) > hopeless:
            break
    return _Order(rows, columns, cost)


def _arrangements(items: tuple[int, ...], tiers: int) -> Iterator[tuple[int, ...]]:
    """Orders of items that differ in some leaf set, up to swaps of sibling blocks."""
    if tiers == 0:
        yield items
        return
    first, others = items[0], items[1:]
    for chosen in combinations(others, len(items) // 2 - 1):
        left = (first, *chosen)
        right = tuple(item for item in others if item not in chosen)
        for left_order in _arrangements(left, tiers - 1):
            for right_order in _arrangements(right, tiers - 1):
                yield left_order + right_order


def _optimum(matrix: np.ndarray, power: float) -> _Pair | None:
    """The best order of all, by trying every arrangement of the rows; None for a layer too large for that."""
    rows, columns = matrix.shape
    if rows > columns:
        order = _optimum(matrix.T, power)
        return None if order is None else order[::-1]
    tiers = depth(rows, columns)
    leaves = 2**tiers
    count = math.factorial(rows) // (math.factorial(rows // leaves) ** leaves * 2 ** (leaves - 1))
    if columns > 64 or count > _EXHAUSTIVE or count * columns > 16 * _EXHAUSTIVE:
        return None
    from scipy.optimize import linear_sum_assignment

    best, best_cost = None, math.inf
    for arrangement in _arrangements(tuple(range(rows)), tiers):
        cost = leaf_costs(np.ascontiguousarray(matrix[list(arrangement)].T), leaves, power)
        cost = cost.repeat(columns // leaves, axis=1).T
        _, chosen = linear_sum_assignment(cost)
        value = cost[np.arange(columns), chosen].sum()
        if value < best_cost:
            best, best_cost = (np.array(arrangement), chosen), value
    return best
