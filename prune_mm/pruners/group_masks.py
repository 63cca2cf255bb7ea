"""Masks of grouped convolutions and the orders behind them, both ways; and the orders of ungrouped baselines.

Source: Zhao and Luk (arXiv 1811.09341), and the behaviour of its published code.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prune_mm.pruners.gconv_math import check_groups, checked_order


def mask_of(out_perm: Tensor, in_perm: Tensor, groups: int) -> Tensor:
    """The kernels that G groups keep.

    Args:
        out_perm: int64 (F,), a permutation; group g has positions g*F/G..(g+1)*F/G-1.
        in_perm: int64 (C,), likewise.
        groups: G, a divisor of F and C.

    Returns:
        bool (F, C), on the device of ``out_perm``.

    Raises:
        ValueError: naming what is wrong with an argument.
    """
    check_groups(groups, out_perm.numel(), in_perm.numel())
    ids = []
    for name, order in (("out_perm", out_perm), ("in_perm", in_perm)):
        count = order.numel()
        checked_order(name, order, count)
        group = torch.arange(count, device=order.device) // (count // groups)
        ids.append(torch.empty_like(group).scatter_(0, order.to(torch.int64), group))
    return ids[0][:, None] == ids[1].to(ids[0].device)[None, :]


def allocate_groups(mask: Tensor | np.ndarray, groups: int | None = None) -> tuple[Tensor, Tensor] | None:
    """Read the groups off a mask.

    Args:
        mask: (F, C), non-zero where a kernel is kept.
        groups: the number there must be; None: any.

    Returns:
        int64 (F,) and (C,), the group of every output and input channel, counted from 1 in the order of the smallest
        input channel; or None when the mask is no group sparsity pattern (equal groups, each output in exactly one).

    Raises:
        ValueError: the mask is no matrix or is empty.

    Source: the export of the published code.
    """
    matrix = torch.as_tensor(mask).detach() != 0
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"mask has shape {tuple(matrix.shape)}; it must be (output channels, input channels)")
    if not matrix.any(dim=1).all() or not matrix.any(dim=0).all():
        return None
    # The first kept kernel of a row tells its group, and the first kept kernel of a column whose row it shares.
    opened, rows = torch.unique(matrix.int().argmax(dim=1), return_inverse=True)
    columns = rows[matrix.int().argmax(dim=0)]
    count = opened.numel()
    equal = all(bool((torch.bincount(ids, minlength=count) * count == ids.numel()).all()) for ids in (rows, columns))
    whole = bool((matrix == (rows[:, None] == columns[None, :])).all())
    if not (equal and whole) or groups not in (None, count):
        return None
    return rows + 1, columns + 1


def orders_of_mask(mask: Tensor | np.ndarray) -> tuple[Tensor, Tensor, int]:
    """Orders that make a mask block-diagonal, and its number of groups; the inverse of :func:`mask_of`.

    Args:
        mask: (F, C).

    Returns:
        ``out_perm`` int64 (F,), ``in_perm`` int64 (C,) and G. Groups come in the order of their smallest input
        channel, and within a group channels ascend. (The published export stores the inverse of ``out_perm``.)

    Raises:
        ValueError: the mask is no group sparsity pattern.
    """
    ids = allocate_groups(mask)
    if ids is None:
        raise ValueError(
            f"the {'x'.join(map(str, mask.shape))} mask is no group sparsity pattern: its rows must be equal or "
            "disjoint, and split outputs and inputs into groups of one size"
        )
    return torch.argsort(ids[0], stable=True), torch.argsort(ids[1], stable=True), int(ids[0].max())
