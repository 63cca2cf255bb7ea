"""The mathematics of group-convolution pruning: which channels go together, and how much weight that keeps.

A dense layer of F output and C input channels becomes G groups when the outputs are split into G equal sets, the
inputs too, and only the kernels within matching sets are kept. With S the (F, C) norms of the kernels, that is the
search for orders of the outputs and of the inputs whose block-diagonal, G blocks of F/G x C/G, has the largest sum K.

Pure functions that know neither modules nor a training loop. Source throughout: Zhao and Luk, "Efficient Structured
Pruning and Architecture Searching for Group Convolution" (arXiv 1811.09341), and the behaviour of its published code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from prune_mm.pruners.options import check_choice, check_integer

METHODS = ("GRPS", "SORT", "SAME", "RANDOM")

#: Up to this many channels a side is re-assigned exactly; above, by pairs of groups.
_EXACT_CHANNELS = 128
#: Up to this many kernels every start is refined, above only the best one.
_SMALL = 2**16
#: Alternations between outputs and inputs in a refinement; the gain of later ones is below 1e-4 of the norm.
_MOST_ALTERNATIONS = 32
#: A gain must exceed the round-off of a sum.
_ROUND_OFF = 1e-12


@dataclass(frozen=True, eq=False)
class GroupSort:
    """Orders of output and input channels; group g has positions g*F/G..(g+1)*F/G-1 and g*C/G..(g+1)*C/G-1.

    Attributes:
        out_perm: int64 (F,), output channels in their new order.
        in_perm: int64 (C,), input channels in their new order.
        kept: K, the sum of the scores in the G diagonal blocks.
    """

    out_perm: Tensor
    in_perm: Tensor
    kept: float


@dataclass(frozen=True, eq=False)
class GroupMatch(GroupSort):
    """Groups in the order of their smallest input channel, and what they are worth.

    Attributes:
        kept_ratio: K / sum S, in [0, 1]; 1 when all scores are zero, for then nothing is lost.
        cost: the published cost (sum S - K) / ||S||_F; 0 when all scores are zero.
    """

    kept_ratio: float
    cost: float


# -- scores -----------------------------------------------------------------------------------------------------------


def kernel_norms_l2(weight: Tensor) -> Tensor:
    """Frobenius norm of every kernel: S[o, i] = ||W[o, i]||_2.

    Args:
        weight: (F, C, ...), of a convolution of any dimension or a linear layer.

    Returns:
        float64 (F, C), on the weight's device.

    Raises:
        ValueError: the weight has fewer than two axes.

    Source: the default criterion of the published code.
    """
    return torch.linalg.vector_norm(_kernels(weight), dim=2)


def taylor_scores(weight: Tensor, grad: Tensor) -> Tensor:
    """First-order change of the loss without a kernel, element by element: S[o, i] = sum |grad * W|.

    Args:
        weight: (F, C, ...).
        grad: gradient of the loss by the weight, of the same shape.

    Returns:
        float64 (F, C), on the weight's device.

    Raises:
        ValueError: the shapes differ, or there are fewer than two axes.

    Source: criterion 'taylor' of the published code.
    """
    if weight.shape != grad.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}, but the weight has {tuple(weight.shape)}")
    return (_kernels(weight) * _kernels(grad)).abs().sum(dim=2)


def _kernels(weight: Tensor) -> Tensor:
    """float64 (F, C, elements of a kernel)."""
    if weight.ndim < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it needs an output and an input axis")
    size = math.prod(weight.shape[2:])
    return weight.detach().to(torch.float64).reshape(weight.shape[0], weight.shape[1], size)


# -- the published heuristic ------------------------------------------------------------------------------------------


def group_sort(scores: Tensor | np.ndarray, groups: int, sort_iters: int = 10) -> GroupSort:
    """Order the channels so that heavy kernels meet in the diagonal blocks: the published heuristic GRPS.

    From the last group to the first, ``sort_iters`` times: the input channels that are left are sorted by their sum
    over the outputs of the group, then the output channels by their sum over the inputs of the group, both ascending.
    So the heaviest gather in the group's block, which then stays, and the rest is ordered in the same way.

    Args:
        scores: (F, C), not changed.
        groups: G, a divisor of F and C.
        sort_iters: sorts a group, at least 0; 0 leaves the order as it is.

    Returns:
        The orders. Sums are float64 and sorts are stable, so ties keep the lower position first.

    Raises:
        ValueError: naming what is wrong with an argument.

    Source: section 3.2 of the paper.
    """
    matrix = _checked(scores, groups)
    check_integer("sort_iters", sort_iters, 0)
    rows, columns = _identity(matrix)
    for state in _group_sort_states(matrix, groups, sort_iters):
        rows, columns = state
    return GroupSort(torch.from_numpy(rows), torch.from_numpy(columns), _diagonal(matrix, rows, columns, groups))


def _group_sort_states(matrix: np.ndarray, groups: int, sort_iters: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Orders of rows and columns after every sort that changed something."""
    rows, columns = _identity(matrix)
    height, width = len(rows) // groups, len(columns) // groups
    transposed = np.ascontiguousarray(matrix.T)
    for group in reversed(range(groups)):
        row_end, column_end = height * (group + 1), width * (group + 1)
        for _ in range(sort_iters):
            sums = matrix[rows[height * group : row_end]].sum(axis=0)[columns[:column_end]]
            by_sum = np.argsort(sums, kind="stable")
            columns[:column_end] = columns[:column_end][by_sum]
            sums = transposed[columns[width * group : column_end]].sum(axis=0)[rows[:row_end]]
            by_sum_too = np.argsort(sums, kind="stable")
            rows[:row_end] = rows[:row_end][by_sum_too]
            if _is_sorted(by_sum) and _is_sorted(by_sum_too):
                break  # nothing moved, so nothing would
            yield rows.copy(), columns.copy()


def _is_sorted(order: np.ndarray) -> bool:
    return bool((np.diff(order) > 0).all())


def match_groups(
    scores: Tensor | np.ndarray, out_perm: Tensor | np.ndarray, in_perm: Tensor | np.ndarray, groups: int
) -> GroupSort:
    """Pair the blocks of rows with the blocks of columns so that the pairs keep the most.

    Args:
        scores: (F, C).
        out_perm: int64 (F,), as from :func:`group_sort`; its G blocks stay together.
        in_perm: int64 (C,).
        groups: G.

    Returns:
        The orders in which block g of the rows meets its block of columns. Groups come in the order of their smallest
        input channel; within a block the order is that of the arguments.

    Raises:
        ValueError: naming what is wrong with an argument.

    Source: section 3.2 of the paper, maximum bipartite matching.
    """
    matrix = _checked(scores, groups)
    rows = checked_order("out_perm", out_perm, matrix.shape[0])
    columns = checked_order("in_perm", in_perm, matrix.shape[1])
    rows, columns, _ = _match(matrix, rows, columns, groups)
    return GroupSort(torch.from_numpy(rows), torch.from_numpy(columns), _diagonal(matrix, rows, columns, groups))


def _match(
    matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray, float]:
    blocks = _members(rows, groups).T @ (matrix @ _members(columns, groups))
    row_blocks, column_blocks = linear_sum_assignment(blocks, maximize=True)
    kept = float(blocks[row_blocks, column_blocks].sum())
    first = columns.reshape(groups, -1).min(axis=1)[column_blocks]
    by_first = np.argsort(first)
    rows = rows.reshape(groups, -1)[row_blocks[by_first]].ravel()
    columns = columns.reshape(groups, -1)[column_blocks[by_first]].ravel()
    return rows, columns, kept


# -- the whole solver -------------------------------------------------------------------------------------------------


def find_groups(
    scores: Tensor | np.ndarray,
    groups: int,
    method: str = "GRPS",
    sort_iters: int = 10,
    best: bool = True,
    seed: int = 0,
) -> GroupMatch:
    """Split outputs and inputs into G groups that keep as much of the scores as can be found.

    Args:
        scores: (F, C), not changed; zeros are welcome.
        groups: G, a divisor of F and C.
        method: the orders to start with. ``GRPS``: :func:`group_sort`; ``SORT``: by the total of a row or column;
            ``SAME``: as they are; ``RANDOM``: drawn. Blocks are then matched.
        sort_iters: of ``GRPS``.
        best: also try the orders as they are, ``SORT`` and every state on the way of ``GRPS``, and refine: given the
            groups of one side, the other side is re-assigned, in turns, while something is gained. Never worse than
            any of these; within a group channels ascend. False: the published result, which can be worse than doing
            nothing. ``RANDOM`` is a baseline and never improved.
        seed: of ``RANDOM``, and of the random starts that small layers get with ``best``.

    Returns:
        Groups in the order of their smallest input channel.

    Raises:
        ValueError: naming what is wrong with an argument.

    Source: section 3.2 of the paper; the refinement is ours.
    """
    matrix = _checked(scores, groups)
    check_choice("method", method, METHODS)
    check_integer("sort_iters", sort_iters, 0)
    check_integer("seed", seed, 0)
    if best and method != "RANDOM":
        rows, columns, _ = _best(matrix, groups, _starts(matrix, groups, sort_iters, seed))
        rows, columns = (np.sort(order.reshape(groups, -1), axis=1).ravel() for order in (rows, columns))
    else:
        rows, columns, _ = _match(matrix, *_start(matrix, groups, method, sort_iters, seed), groups)
    return _worth(matrix, rows, columns, groups)


def _worth(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, groups: int) -> GroupMatch:
    """Orders, and what they are worth."""
    kept = _diagonal(matrix, rows, columns, groups)
    total, norm = float(matrix.sum()), float(np.linalg.norm(matrix))
    return GroupMatch(
        torch.from_numpy(rows),
        torch.from_numpy(columns),
        kept,
        kept_ratio=kept / total if total else 1.0,
        cost=(total - kept) / norm if norm else 0.0,
    )


def _start(matrix: np.ndarray, groups: int, method: str, sort_iters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The orders a method gives, before matching."""
    if method == "GRPS":
        state = _identity(matrix)
        for state in _group_sort_states(matrix, groups, sort_iters):  # noqa: B007
            pass
        return state
    if method == "SORT":
        return np.argsort(matrix.sum(axis=1), kind="stable"), np.argsort(matrix.sum(axis=0), kind="stable")
    if method == "RANDOM":
        generator = np.random.default_rng(seed)
        return generator.permutation(matrix.shape[0]), generator.permutation(matrix.shape[1])
    return _identity(matrix)


def _starts(matrix: np.ndarray, groups: int, sort_iters: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Orders to refine: as they are, sorted, the end and the best state of GRPS, and random ones for small layers."""
    states = [_identity(matrix), *_group_sort_states(matrix, groups, sort_iters)]
    kept = [_diagonal(matrix, *state, groups) for state in states]
    starts = [states[0], _start(matrix, groups, "SORT", 0, 0), states[-1], states[int(np.argmax(kept))]]
    # A random start takes as long as the others, and pays only where there is little to choose from.
    generator, count = np.random.default_rng(seed), min(16, 2**12 // matrix.size)
    random = [(generator.permutation(matrix.shape[0]), generator.permutation(matrix.shape[1])) for _ in range(count)]
    return starts + random


def _best(
    matrix: np.ndarray, groups: int, starts: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Match every start, refine those worth it, return the best; of equals the first."""
    found = [_match(matrix, *start, groups) for start in starts]
    if groups > 1:
        candidates = found if matrix.size <= _SMALL else [max(found, key=lambda state: state[2])]
        found += [_refine(matrix, state, groups) for state in candidates]
    best = found[0]
    for state in found[1:]:
        if state[2] > best[2] + _ROUND_OFF * abs(best[2]):
            best = state
    return best


def _refine(
    matrix: np.ndarray, state: tuple[np.ndarray, np.ndarray, float], groups: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Re-assign outputs and inputs in turns while the kept sum grows."""
    transposed = matrix.T
    for _ in range(_MOST_ALTERNATIONS):
        rows, columns, kept = state
        rows = _reassign(matrix @ _members(columns, groups), rows.reshape(groups, -1))
        columns = _reassign(transposed @ _members(rows.ravel(), groups), columns.reshape(groups, -1))
        following = _match(matrix, rows.ravel(), columns.ravel(), groups)
        if following[2] <= kept + _ROUND_OFF * abs(kept):
            break
        state = following
    return state


def find_outputs(scores: Tensor | np.ndarray, groups: int, in_perm: Tensor | np.ndarray) -> GroupMatch:
    """Groups of outputs that keep as much as can be found, when those of the inputs are given.

    Args:
        scores: (F, C).
        groups: G, a divisor of F and C.
        in_perm: (C,), inputs in the order of their groups.

    Returns:
        As :func:`find_groups`, but groups in the order of ``in_perm``, which is returned as it is.

    Raises:
        ValueError: naming what is wrong with an argument.
    """
    matrix = _checked(scores, groups)
    columns = checked_order("in_perm", in_perm, matrix.shape[1])
    members = _reassign(matrix @ _members(columns, groups), np.arange(matrix.shape[0]).reshape(groups, -1))
    return _worth(matrix, np.sort(members, axis=1).ravel(), columns, groups)


def _reassign(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Move channels between groups of fixed size so that the sum of their values grows.

    Args:
        values: (N, G), what channel n is worth in group g.
        members: int64 (G, N/G), channels of every group.

    Returns:
        int64 (G, N/G). Up to 128 channels it is the optimum, an assignment problem in which every group has N/G
        places; above, no pair of groups can gain by sharing their channels in another way.
    """
    groups, size = members.shape
    if len(values) <= _EXACT_CHANNELS:
        _, places = linear_sum_assignment(np.repeat(values, size, axis=1), maximize=True)
        return np.argsort(places).reshape(groups, size)
    members = members.copy()
    for _ in range(8):
        moved = [_share_again(values, members, *pairs) for pairs in _rounds(groups)]
        if not any(moved):
            break
    return members


def _share_again(values: np.ndarray, members: np.ndarray, first: np.ndarray, second: np.ndarray) -> bool:
    """Share the channels of each pair of groups in the best way, in place; whether that moved any."""
    size = members.shape[1]
    both = np.concatenate([members[first], members[second]], axis=1)
    loss = values[both, second[:, None]] - values[both, first[:, None]]
    order = np.argsort(loss, axis=1, kind="stable")
    if not (order[:, :size] >= size).any():
        return False
    both = np.take_along_axis(both, order, axis=1)
    members[first], members[second] = both[:, :size], both[:, size:]
    return True


@lru_cache(maxsize=64)
def _rounds(groups: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Every pair of groups once, in rounds of disjoint pairs: the circle method of tournaments."""
    seats, rounds = list(range(groups + groups % 2)), []
    for _ in range(len(seats) - 1):
        pairs = [(a, b) for a, b in zip(seats, reversed(seats)) if a < b < groups or b < a < groups]
        pairs = sorted({(min(pair), max(pair)) for pair in pairs})
        first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        rounds.append((first, second))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return tuple(rounds)


# -- helpers ----------------------------------------------------------------------------------------------------------


def _identity(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(matrix.shape[0]), np.arange(matrix.shape[1])


def _members(order: np.ndarray, groups: int) -> np.ndarray:
    """float64 (N, G): 1 where channel n is in group g. Products with it are the sums over groups."""
    members = np.zeros((len(order), groups))
    members[order, np.repeat(np.arange(groups), len(order) // groups)] = 1.0
    return members


def _diagonal(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, groups: int) -> float:
    """Sum of the diagonal blocks."""
    rows, columns = rows.reshape(groups, -1, 1), columns.reshape(groups, 1, -1)
    return float(matrix[rows, columns].sum())


def _checked(scores: Tensor | np.ndarray, groups: int) -> np.ndarray:
    """The scores as a float64 matrix of their own."""
    if isinstance(scores, Tensor):
        scores = scores.detach().to("cpu", torch.float64).numpy()
    matrix = np.array(scores, dtype=np.float64, order="C")
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"scores have shape {matrix.shape}; they must be (output channels, input channels)")
    bad = int((~np.isfinite(matrix)).sum())
    if bad:
        raise ValueError(f"{bad} of {matrix.size} scores are not finite; the weights hold NaN or infinite values")
    check_groups(groups, *matrix.shape)
    return matrix


def check_groups(groups: int, *counts: int) -> None:
    check_integer("groups", groups, 1)
    for count in counts:
        if count % groups:
            fitting = math.gcd(*counts)
            raise ValueError(f"groups={groups} does not divide {count} channels; it must be a divisor of {fitting}")


def checked_order(name: str, order: Tensor | np.ndarray, count: int) -> np.ndarray:
    found = order.detach().cpu().numpy() if isinstance(order, Tensor) else np.asarray(order)
    if found.shape != (count,) or not np.array_equal(np.sort(found), np.arange(count)):
        raise ValueError(f"{name} of shape {found.shape} must be a permutation of 0..{count - 1}")
    return found.astype(np.int64)
