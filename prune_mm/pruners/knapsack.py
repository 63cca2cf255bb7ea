"""The multiple-choice knapsack problem: one choice for each item, cheapest of those that fit the budgets."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_diag, csr_matrix

#: Partial states the exact search carries from layer to layer; beyond, those of the best bound stay.
_MOST_STATES = 2**14


def solve_knapsack(
    costs: Sequence[np.ndarray], sizes: Sequence[np.ndarray], capacity: np.ndarray, known: Sequence[int]
) -> tuple[list[int], bool]:
    """Take one choice of every item so that the sizes fit and the costs are least.

    Dynamic programming over items. A partial solution is dropped when another costs no more and takes no more, or when
    its bound shows that it cannot beat the best solution known. The bound is Lagrangian: the sizes are priced by the
    duals of the linear relaxation, and the items that are left take their cheapest choice.

    Args:
        costs: float64 (K_n,) of each item.
        sizes: int64 (K_n, R) of each item, descending along K_n; R = 1 or 2 budgets.
        capacity: int64 (R,).
        known: a solution that fits, as an index into every item's choices.

    Returns:
        The best solution found, and whether it is proven to be the best. It is not when the number of partial
        solutions had to be capped.
    """
    prices, rounded = _relax(costs, sizes, capacity)
    best = min((list(known), rounded), key=lambda state: _pick(costs, state))
    goal = _pick(costs, best)
    round_off = 1e-12 * max(abs(goal), 1e-300)
    priced = [cost + size @ prices for cost, size in zip(costs, sizes)]
    # Items whose choice matters most go first, which tightens the bound early.
    order = sorted(range(len(costs)), key=lambda n: -float(np.ptp(priced[n])))
    rest_bound = sum(float(p.min()) for p in priced) - float(prices @ capacity)
    rest_size = sum(size.min(axis=0) for size in sizes)
    used, cost, dropped, history = np.zeros((1, len(capacity)), np.int64), np.zeros(1), math.inf, []
    for n in order:
        rest_bound, rest_size = rest_bound - float(priced[n].min()), rest_size - sizes[n].min(axis=0)
        parent, choice = (index.ravel() for index in np.indices((len(cost), len(costs[n]))))
        used, cost = used[parent] + sizes[n][choice], cost[parent] + costs[n][choice]
        bound = cost + used @ prices + rest_bound
        keep = np.flatnonzero((used + rest_size <= capacity).all(axis=1) & (bound < goal - round_off))
        keep, lost = _cap(keep, bound, 4 * _MOST_STATES)
        keep = keep[_undominated(used[keep], cost[keep])]
        keep, lost_too = _cap(keep, bound, _MOST_STATES)
        dropped = min(dropped, lost, lost_too)
        history.append((parent[keep], choice[keep]))
        used, cost = used[keep], cost[keep]
    if len(cost):
        index, goal = int(np.argmin(cost)), float(cost.min())
        for n, (parent, choice) in zip(reversed(order), reversed(history)):
            best[n], index = int(choice[index]), int(parent[index])
    return best, dropped >= goal - round_off


def _pick(costs: Sequence[np.ndarray], state: Sequence[int]) -> float:
    return math.fsum(float(cost[index]) for cost, index in zip(costs, state))


def _relax(
    costs: Sequence[np.ndarray], sizes: Sequence[np.ndarray], capacity: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """The price of a unit of each budget in the linear relaxation, (R,), and its solution rounded to one that fits."""
    unit = np.maximum(capacity, 1).astype(np.float64)
    one_each = block_diag([np.ones((1, len(cost))) for cost in costs], format="csr")
    solved = linprog(
        np.concatenate(costs),
        A_ub=csr_matrix((np.concatenate(sizes) / unit).T),
        b_ub=capacity / unit,
        A_eq=one_each,
        b_eq=np.ones(len(costs)),
        method="highs",
    )
    if solved.status != 0:  # any price gives a valid bound, and the smallest choices fit
        return np.zeros(len(capacity)), [len(cost) - 1 for cost in costs]
    prices = np.maximum(-solved.ineqlin.marginals, 0.0) / unit
    ends = np.cumsum([len(cost) for cost in costs])[:-1]
    # Of an item that the relaxation splits, the smallest part taken whole takes no more than the split did.
    return prices, [int(np.flatnonzero(share > 1e-9)[-1]) for share in np.split(solved.x, ends)]


def _cap(keep: np.ndarray, bound: np.ndarray, most: int) -> tuple[np.ndarray, float]:
    """The ``most`` states of the lowest bound, in their order, and the lowest bound of those that went."""
    if len(keep) <= most:
        return keep, math.inf
    by_bound = keep[np.argsort(bound[keep], kind="stable")]
    return np.sort(by_bound[:most]), float(bound[by_bound[most]])


def _undominated(used: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the states that no other beats in size and cost; of equals one stays.

    Args:
        used: int64 (N, R).
        cost: float64 (N,).
    """
    if used.shape[1] == 1:
        order = np.lexsort((cost, used[:, 0]))
        cheapest = np.minimum.accumulate(cost[order])
        return order[np.concatenate([[True], cost[order][1:] < cheapest[:-1]])[: len(order)]]
    # In the order of the first size, the second sizes and costs seen so far form a staircase.
    order, stairs, heights, keep = np.lexsort((cost, used[:, 1], used[:, 0])), [], [], []
    for index, second, height in zip(order.tolist(), used[order, 1].tolist(), cost[order].tolist()):
        place = bisect_right(stairs, second)
        if place and heights[place - 1] <= height:
            continue
        keep.append(index)
        start = end = bisect_left(stairs, second)
        while end < len(stairs) and heights[end] >= height:
            end += 1
        stairs[start:end], heights[start:end] = [second], [height]
    return np.array(keep, dtype=np.int64)
