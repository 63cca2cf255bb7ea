"""Tiers of a layer: the nested 2 x 2 splits of its kernel norms, what they cost, and what lies in them.

A layer is seen as the matrix of the L1 norms of its kernels, out x in. Halving both sides again and again gives
*tiers*: tier t is the two off-diagonal quadrants of every block that t splits left. *Ordered* matrices have their rows
and columns permuted already, `norms[out_perm][:, in_perm]`.

Source: StrucSpars (UAI 2021, arXiv 2002.08127), and the behaviour of its published code.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def depth(out_channels: int, in_channels: int) -> int:
    """Number of times D that both sides of a layer can be halved; at most 2^D groups are possible.

    Args:
        out_channels: rows, at least 1.
        in_channels: columns, at least 1.

    Returns:
        D, 0 when either side is odd.

    Raises:
        ValueError: a side is below 1.
    """
    if out_channels < 1 or in_channels < 1:
        raise ValueError(f"a layer needs at least 1 channel on both sides, got {out_channels} x {in_channels}")
    common = math.gcd(out_channels, in_channels)
    return (common & -common).bit_length() - 1


def check_power(power: float) -> None:
    """Raise ValueError unless 0 < power <= 1."""
    if not 0.0 < power <= 1.0:
        raise ValueError(f"power, the decay of the cost from tier to tier, must be in (0, 1], got {power}")


def check_level(level: int, deepest: int, what: str) -> None:
    """Raise ValueError unless 1 <= level <= deepest + 1."""
    if not 1 <= level <= deepest + 1:
        raise ValueError(f"a {what} layer has levels 1 to {deepest + 1} (1 to {2**deepest} groups), got level {level}")


def cost_matrix(out_channels: int, in_channels: int, levels: int | None = None, power: float = 0.5) -> Tensor:
    """Cost of mass at every position of an ordered layer: power^t in tier t, 0 in the innermost diagonal blocks.

    Args:
        out_channels: rows O.
        in_channels: columns I.
        levels: number of tiers that cost anything, at least 0; None means all D of them, and so does more than D.
        power: decay from tier to tier, in (0, 1].

    Returns:
        float64 (O, I).

    Raises:
        ValueError: a side is below 1, `levels` is negative or `power` is outside (0, 1].

    Source: StrucSpars, cost matrix of the channel assignment and structured L1.
    """
    check_power(power)
    if levels is not None and levels < 0:
        raise ValueError(f"levels, the number of tiers, must be at least 0 or None for all, got {levels}")
    tiers = depth(out_channels, in_channels)
    tiers = tiers if levels is None else min(tiers, levels)
    cost = torch.zeros(out_channels, in_channels, dtype=torch.float64)
    rows, columns = torch.arange(out_channels), torch.arange(in_channels)
    # From the deepest tier up: a coarser split overwrites what the finer ones said outside its own blocks.
    for tier in reversed(range(tiers)):
        blocks = 2 ** (tier + 1)
        row_block, column_block = rows * blocks // out_channels, columns * blocks // in_channels
        cost[row_block[:, None] != column_block[None, :]] = power**tier
    return cost


def level_mask(out_channels: int, in_channels: int, level: int) -> Tensor:
    """Positions of an ordered layer that a level keeps: 2^(level - 1) equal diagonal blocks.

    Args:
        out_channels: rows O.
        in_channels: columns I.
        level: 1 (everything) to D + 1.

    Returns:
        bool (O, I), True where weights stay.

    Raises:
        ValueError: the layer has no such level. (The published code gives an all-zero mask.)

    Source: StrucSpars, group level.
    """
    check_level(level, depth(out_channels, in_channels), f"{out_channels} x {in_channels}")
    groups = 2 ** (level - 1)
    rows = torch.arange(out_channels) * groups // out_channels
    columns = torch.arange(in_channels) * groups // in_channels
    return rows[:, None] == columns[None, :]


def check_norms(norms: Tensor | np.ndarray, name: str = "norms") -> np.ndarray:
    """A matrix of kernel norms as a float64 array, after checks.

    Args:
        norms: (O, I), finite and not negative; a tensor on any device, or an array.
        name: what to call it in messages.

    Returns:
        float64 (O, I); it may share memory with `norms`.

    Raises:
        ValueError: it is not a matrix, is empty, or holds NaN, infinite or negative values.
    """
    if isinstance(norms, Tensor):
        norms = norms.detach().to("cpu", torch.float64).numpy()
    matrix = np.asarray(norms, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"{name} must be a matrix of kernel norms, out x in, got shape {matrix.shape}")
    # NaN spreads to both ends, so two reductions see everything without a temporary.
    low, high = float(matrix.min()), float(matrix.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int((~np.isfinite(matrix)).sum())
        raise ValueError(f"{name} holds NaN or infinite values ({bad} of {matrix.size}); kernel norms are finite")
    if low < 0.0:
        raise ValueError(f"{name} holds negative values (lowest {low}); kernel norms are at least 0")
    return matrix


def tier_masses(ordered_norms: Tensor | np.ndarray) -> np.ndarray:
    """Mass of every tier of an ordered layer, and of its innermost diagonal blocks.

    Args:
        ordered_norms: (O, I) kernel norms, rows and columns permuted.

    Returns:
        float64 (D + 1,): tiers 0..D-1, then what no tier holds. Their sum is the mass of the layer.

    Raises:
        ValueError: as `check_norms`.
    """
    return unchecked_tier_masses(check_norms(ordered_norms, "ordered_norms"))


def unchecked_tier_masses(matrix: np.ndarray) -> np.ndarray:
    """As `tier_masses`, of a matrix that is known to be fit."""
    tiers = depth(*matrix.shape)
    masses = np.zeros(tiers + 1)
    blocks, tier = [matrix], 0
    # Every entry is read once: quadrants off the diagonal are summed and left behind. While blocks are few and large
    # that is done one by one, then for all the small ones together.
    while tier < min(tiers, 4):
        halves = []
        for block in blocks:
            row, column = block.shape[0] // 2, block.shape[1] // 2
            masses[tier] += block[:row, column:].sum() + block[row:, :column].sum()
            halves += [block[:row, :column], block[row:, column:]]
        blocks, tier = halves, tier + 1
    small = np.stack(blocks)
    count, rows, columns = small.shape
    leaves = 2 ** (tiers - tier)
    sums = small.reshape(count, leaves, rows // leaves, leaves, columns // leaves).sum(axis=(2, 4))
    masses[tiers] = np.einsum("gll->", sums)
    for deep in reversed(range(tier, tiers)):
        side = 2 ** (deep - tier)
        quads = sums.reshape(count, side, 2, side, 2)
        masses[deep] = np.einsum("gll->", quads[:, :, 0, :, 1]) + np.einsum("gll->", quads[:, :, 1, :, 0])
        sums = quads.sum(axis=(2, 4))
    return masses
