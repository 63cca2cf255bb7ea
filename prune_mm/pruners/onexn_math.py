"""The mathematics of 1xN block pruning: which blocks of N filters go, and in which order the filters form blocks.

Pure functions of weights, they know neither modules nor a training loop. A *block* is the kernels of N consecutive
filters at one input channel, N * kh * kw weights; with N = 1 it is one kernel. Source throughout: 1xN Pattern for
Pruning Convolutional Neural Networks (TPAMI 2022, arXiv 2105.14713), and the behaviour of its published code, but for
two defects of it: blocks never run from one input channel into the next, and random blocks are drawn without
replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from prune_mm.criteria import l1_scores

Tail = Literal["dense", "pad", "error"]


@dataclass(frozen=True)
class BlockMask:
    """Which weights stay.

    Attributes:
        mask: boolean, of the weight's own shape (O, I, ...), filters in the order of the weight; True stays.
        out_perm: int64 (O,) on the weight's device, the order in which each N consecutive filters are a block row:
            ``mask[out_perm]`` is the 1xN pattern. ``arange(O)`` where filters are not rearranged.
    """

    mask: Tensor
    out_perm: Tensor


def _check(weight: Tensor, n: int, rate: float, tail: str) -> None:
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"weight must have shape (O, I, ...) and not be empty, got {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinite values, which have no place in a ranking")
    _check_sizes(weight.shape[0], n, rate, tail)


def _check_sizes(outputs: int, n: int, rate: float, tail: str) -> None:
    if type(n) is not int or n < 1:
        raise ValueError(f"n must be an integer of at least 1, got {n!r}")
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must be in [0, 1], got {rate!r}")
    if tail not in get_args(Tail):
        raise ValueError(f"tail must be one of {', '.join(get_args(Tail))}, got {tail!r}")
    if tail == "error" and outputs % n:
        raise ValueError(
            f"n={n} does not divide the {outputs} filters; tail='dense' keeps the last {outputs % n} whole, "
            f"tail='pad' makes smaller blocks of them"
        )


def block_counts(outputs: int, inputs: int, n: int, rate: float, tail: Tail = "dense") -> tuple[int, int]:
    """How many blocks a layer has, and how many go: ``int(blocks * rate)``.

    Args:
        outputs: filters O.
        inputs: input channels I.
        n: filters of a block.
        rate: share of the blocks that goes, in [0, 1].
        tail: what becomes of the last O mod N filters, see :func:`block_mask`.

    Returns:
        Blocks that may go; blocks that go.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    _check_sizes(outputs, n, rate, tail)
    rows = outputs // n if tail == "dense" else -(-outputs // n)
    return rows * inputs, int(rows * inputs * rate)


def filter_order(weight: Tensor) -> Tensor:
    """Filters by ascending L1 norm, so that those of a block are alike; equal norms keep the lower index first.

    Args:
        weight: (O, I, ...).

    Returns:
        int64 (O,), a permutation.

    Source: 1xN, filter rearrangement. (The paper sorts descending: the same blocks where N divides O.)
    """
    return torch.sort(l1_scores(weight), stable=True).indices


def block_scores(weight: Tensor, n: int) -> Tensor:
    """L1 norm of every block.

    Args:
        weight: (O, I, ...), filters in block order.
        n: filters of a block.

    Returns:
        float64 (ceil(O / N), I); a last row of fewer than N filters sums over those there are.
    """
    kernels = weight.detach().to(torch.float64).abs().reshape(weight.shape[0], weight.shape[1], -1).sum(2)
    return _by_block(kernels, n).sum(1)


def _by_block(rows: Tensor, n: int) -> Tensor:
    """(O, I) as (ceil(O / N), N, I), padded with zeros or False."""
    padding = rows.new_zeros(-rows.shape[0] % n, rows.shape[1])
    return torch.cat([rows, padding]).reshape(-1, n, rows.shape[1])


def _expand(kept: Tensor, weight: Tensor, n: int, order: Tensor) -> BlockMask:
    """Kept blocks (row blocks, I), perhaps without the last O mod N filters, as a mask of the weight's shape."""
    rows = kept.repeat_interleave(n, dim=0)[: weight.shape[0]]
    mask = torch.ones(weight.shape[:2], dtype=torch.bool, device=weight.device)
    mask[order[: rows.shape[0]]] = rows
    mask = mask.reshape(*mask.shape, *[1] * (weight.ndim - 2))
    return BlockMask(mask.expand(weight.shape).contiguous(), order)


def _identity(weight: Tensor) -> Tensor:
    return torch.arange(weight.shape[0], device=weight.device)


def _drop(scores: Tensor, count: int) -> Tensor:
    """Boolean of the shape of ``scores``: False at the ``count`` smallest; of equal scores the first ones go."""
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[torch.sort(scores.flatten(), stable=True).indices[:count]] = False
    return kept.reshape(scores.shape)


def block_mask(weight: Tensor, n: int, rate: float, rearrange: bool = False, tail: Tail = "dense") -> BlockMask:
    """Drop the blocks with the smallest L1 norm, exactly ``int(blocks * rate)`` of them.

    Of blocks with equal norms the lower index goes first, blocks being counted as published: all block rows of input
    channel 0, then those of channel 1, and so on.

    Args:
        weight: (O, I, ...) of a convolution with one group, or (O, I) of a linear layer.
        n: filters of a block.
        rate: share of the blocks that goes, in [0, 1].
        rearrange: form blocks of filters with similar norms, see :func:`filter_order`.
        tail: when N does not divide O, ``'dense'`` keeps the last O mod N filters (in block order) whole and outside
            the count of blocks; ``'pad'`` makes them blocks as well, as if zero filters were added; ``'error'``
            refuses.

    Returns:
        The mask in the weight's own shape and order, and the order in which it is 1xN.

    Raises:
        ValueError: naming the argument that is out of range, or a weight that is no matrix or not finite.

    Source: 1xN, Eq. 4 and 5, and filter rearrangement.
    """
    _check(weight, n, rate, tail)
    order = filter_order(weight) if rearrange else _identity(weight)
    blocks, count = block_counts(weight.shape[0], weight.shape[1], n, rate, tail)
    scores = block_scores(weight[order], n)[: blocks // weight.shape[1]]
    return _expand(_drop(scores.T, count).T, weight, n, order)


def random_block_mask(
    weight: Tensor, n: int, rate: float, generator: torch.Generator | int = 0, tail: Tail = "dense"
) -> BlockMask:
    """Drop random blocks, exactly ``int(blocks * rate)`` of them, all equally likely.

    Args:
        weight: (O, I, ...); only its shape counts.
        n: filters of a block.
        rate: share of the blocks that goes, in [0, 1].
        generator: CPU generator, or the seed of one.
        tail: see :func:`block_mask`.

    Returns:
        As :func:`block_mask`, filters in order.

    Raises:
        ValueError: as :func:`block_mask`.

    Source: 1xN, baseline of random blocks; the published code draws with replacement, and so drops fewer.
    """
    _check(weight, n, rate, tail)
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    blocks, count = block_counts(weight.shape[0], weight.shape[1], n, rate, tail)
    kept = torch.ones(blocks, dtype=torch.bool)
    kept[torch.randperm(blocks, generator=generator)[:count]] = False
    kept = kept.reshape(weight.shape[1], -1).T
    return _expand(kept.to(weight.device), weight, n, _identity(weight))


def kernel_mask(weight: Tensor, rate: float) -> BlockMask:
    """Drop the kernels with the smallest L1 norm: blocks of one filter; see :func:`block_mask`.

    Source: 1xN, baseline of kernel-wise pruning.
    """
    return block_mask(weight, 1, rate)


def unstructured_mask(weight: Tensor, rate: float) -> BlockMask:
    """Drop the ``int(weights * rate)`` smallest magnitudes; of equal ones the first in memory order go.

    Returns:
        The mask, filters in order. It is no 1xN pattern, except for 1 x 1 kernels and N = 1.

    Raises:
        ValueError: naming the argument that is out of range.

    Source: 1xN, baseline of weight pruning.
    """
    _check(weight, 1, rate, "error")
    scores = weight.detach().to(torch.float64).abs()
    return BlockMask(_drop(scores, int(weight.numel() * rate)), _identity(weight))


def filter_mask(weight: Tensor, rate: float) -> BlockMask:
    """Drop the ``int(O * rate)`` filters with the smallest L1 norm; of equal ones the lower index goes first.

    Returns:
        The mask, filters in order.

    Raises:
        ValueError: naming the argument that is out of range.

    Source: 1xN, baseline of filter pruning.
    """
    _check(weight, 1, rate, "error")
    kept = _drop(l1_scores(weight), int(weight.shape[0] * rate))
    return _expand(kept.unsqueeze(1).expand(weight.shape[:2]), weight, 1, _identity(weight))


#: Criteria by name, each called as fn(weight, n, rate, rearrange, tail, generator); what a criterion has no use for it
#: ignores.
MASK_CRITERIA: dict[str, Callable[..., BlockMask]] = {
    "l1": lambda weight, n, rate, rearrange, tail, generator: block_mask(weight, n, rate, rearrange, tail),
    "random": lambda weight, n, rate, rearrange, tail, generator: random_block_mask(weight, n, rate, generator, tail),
    "kernel": lambda weight, n, rate, rearrange, tail, generator: kernel_mask(weight, rate),
    "weight": lambda weight, n, rate, rearrange, tail, generator: unstructured_mask(weight, rate),
    "filter": lambda weight, n, rate, rearrange, tail, generator: filter_mask(weight, rate),
}


def block_share(mask: Tensor, n: int, out_perm: Tensor | None = None) -> float:
    """Share of the N x 1 blocks that are not empty: 1 - rate for a true 1xN pattern, up to the rounding of counts.

    Args:
        mask: mask or weight (O, I, ...).
        n: filters of a block; a last block of fewer filters counts as one.
        out_perm: (O,), the order of the filters to look at; None: as they are.

    Raises:
        ValueError: `n` is not positive, or the mask is no matrix.
    """
    if mask.ndim < 2 or mask.numel() == 0:
        raise ValueError(f"mask must have shape (O, I, ...) and not be empty, got {tuple(mask.shape)}")
    _check_sizes(mask.shape[0], n, 0.0, "pad")
    kernels = mask.detach().reshape(*mask.shape[:2], -1).ne(0).any(2)
    kernels = kernels if out_perm is None else kernels[out_perm]
    blocks = _by_block(kernels, n).any(1)
    return int(blocks.sum()) / blocks.numel()


def cubic_rate(step: int, begin: int, end: int, final: float) -> float:
    """Rate of a gradual schedule: final * (1 - (1 - t)^3) with t = (step - begin) / (end - begin).

    Args:
        step: current epoch or iteration.
        begin: step at which pruning begins; 0 before it.
        end: step from which on the rate is exactly ``final``, at least ``begin``; equal: one-shot at ``begin``.
        final: rate at the end, in [0, 1].

    Returns:
        The rate, in [0, final], never falling.

    Raises:
        ValueError: `end` is before `begin`, or `final` is outside [0, 1].

    Source: To prune, or not to prune (Zhu and Gupta, 2017, arXiv 1710.01878), Eq. 1 from an initial rate of 0.
    """
    if end < begin:
        raise ValueError(f"end={end} must not be before begin={begin}")
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"final must be in [0, 1], got {final!r}")
    if step < begin:
        return 0.0
    if step >= end:
        return final
    return final * (1.0 - (1.0 - (step - begin) / (end - begin)) ** 3)
