"""The mathematics of CHEX: how much to regrow, which channels, and how they are drawn.

Pure functions of tensors, they know neither modules nor a training loop. Source throughout: CHEX, Channel
Exploration (CVPR 2022, arXiv 2203.15794), and the behaviour of its published code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prune_mm.criteria import filter_rows, numerical_rank_floor


def regrow_share(step: int, last_step: int, initial: float) -> float:
    """Share of a layer's channels to regrow at a step: initial * (1 + cos(pi * step / last_step)) / 2.

    Args:
        step: current epoch or iteration, from 0.
        last_step: last step at which channels change, in the same unit; from there on the share is exactly 0.
        initial: share at step 0, in [0, 1].

    Returns:
        The share, in [0, initial].

    Raises:
        ValueError: `step` or `last_step` is negative, or `initial` is outside [0, 1].

    Source: CHEX, cosine decay of the regrowing factor.
    """
    if step < 0 or last_step < 0:
        raise ValueError(f"steps must be at least 0, got step={step}, last_step={last_step}")
    if not 0.0 <= initial <= 1.0:
        raise ValueError(f"initial must be in [0, 1], got {initial}")
    if step >= last_step:
        return 0.0
    return initial * (1.0 + math.cos(math.pi * step / last_step)) / 2.0


def uniform_regrow_count(channels: int, kept: int, share: float) -> int:
    """Channels to regrow in a layer when every layer regrows the same share: min(floor(share * C), C - kept).

    Args:
        channels: channels C of the dense layer.
        kept: channels already kept, in [0, C].
        share: share of C to regrow, in [0, 1], as from `regrow_share`.

    Returns:
        The count; the floor forgives round-off (share 0.1 of 30 channels is 3).

    Raises:
        ValueError: `kept` is outside [0, C], or `share` is outside [0, 1].

    Source: CHEX, detection and segmentation code.
    """
    if not 0 <= kept <= channels or not 0.0 <= share <= 1.0:
        raise ValueError(f"need 0 <= kept <= channels and 0 <= share <= 1; got {kept}, {channels}, {share}")
    return min(math.floor(share * channels + 1e-9), channels - kept)


def rank_channels(scores: Tensor) -> Tensor:
    """Channels from the most to the least important; equal scores keep the lower index first.

    Args:
        scores: (C,).

    Returns:
        int64 (C,), a permutation.

    Raises:
        ValueError: a score is NaN, which has no place in an order.
    """
    if scores.isnan().any():
        raise ValueError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN: channels cannot be ranked")
    return torch.sort(scores, descending=True, stable=True).indices


def _row_space(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthonormal basis (rank, d) of the row space of a float64 matrix (k, d) that was stored in `dtype`."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    alive = norms.squeeze(1) > 0
    # The span ignores the length of a channel; unit rows keep short channels clear of the rounding floor.
    rows = rows[alive] / norms[alive]
    if rows.shape[0] == 0:
        return rows
    if rows.shape[0] < rows.shape[1]:
        # The SVD of the small factor reveals the rank as well as that of the long matrix, sooner.
        q, r = torch.linalg.qr(rows.T)
        u, sigma, _ = torch.linalg.svd(r)
        basis = (q @ u).T
    else:
        _, sigma, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sigma > numerical_rank_floor(rows, dtype)]


def regrow_residuals(weight: Tensor, kept: Tensor, pool: Tensor) -> Tensor:
    """Distance of every candidate channel from the span of the kept ones: r_j = ||(I - P) x_j||_2.

    P is the orthogonal projector on the span of the kept filters, as M (M^T M)^+ M^T with M the d x k matrix
    of their columns, so dependent or dead kept filters are allowed. The candidate is projected and
    subtracted, twice, rather than its squared norms being subtracted, so a residual is accurate to float64
    round-off of ||x_j||.

    Args:
        weight: (C, ...), output channels first; dead candidates hold their restored weights.
        kept: int64 (k,), indices of the kept channels; empty means P = 0.
        pool: int64 (m,), indices of the candidates.

    Returns:
        float64 (m,), in the order of `pool`.

    Raises:
        ValueError: `weight` has no output channel.

    Source: CHEX, channel regrowing by orthogonal projection.
    """
    rows = filter_rows(weight)
    kept, pool = (torch.as_tensor(index, dtype=torch.int64, device=rows.device) for index in (kept, pool))
    basis = _row_space(rows[kept], weight.dtype)
    residual = rows[pool]
    for _ in range(2):
        residual = residual - (residual @ basis.T) @ basis
    return torch.linalg.vector_norm(residual, dim=1)


def sample_regrow(residuals: Tensor, count: int, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
    """Draw candidates without replacement, with probability softmax(residuals / temperature).

    The draw is `torch.multinomial` on CPU in float32, as published, so equal seeds give the published choice.
    When fewer than `count` probabilities survive float32 underflow, the same distribution is drawn by Gumbel
    top-k on the log-probabilities in float64, where nothing underflows.

    Args:
        residuals: (m,), from `regrow_residuals`.
        count: number of channels to draw, in [0, m].
        generator: CPU generator; count 0 leaves its state alone.
        temperature: above 0; high values approach a uniform draw.

    Returns:
        int64 (count,), distinct positions in the pool, on the device of `residuals`.

    Raises:
        ValueError: `count` is outside [0, m], `temperature` is not positive, or a residual is not finite.

    Source: CHEX, importance sampling of regrown channels.
    """
    if not 0 <= count <= residuals.numel():
        raise ValueError(f"cannot draw {count} channels from a pool of {residuals.numel()}")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not torch.isfinite(residuals).all():
        raise ValueError("residuals hold NaN or infinite values")
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=residuals.device)
    # Subtracting the largest first keeps a small temperature from overflowing to inf - inf.
    logits = residuals.detach().to("cpu", torch.float64)
    logits = (logits - logits.max()) / temperature
    probabilities = torch.softmax(logits, dim=0).to(torch.float32)
    if int(probabilities.count_nonzero()) >= count:
        drawn = torch.multinomial(probabilities, count, replacement=False, generator=generator)
    else:
        exponential = torch.empty_like(logits).exponential_(generator=generator)
        drawn = (logits - exponential.log()).topk(count).indices
    return drawn.to(residuals.device)


def uniform_regrow(pool_size: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw candidates without replacement, all equally likely.

    Args:
        pool_size: number of candidates m.
        count: number of channels to draw, in [0, m].
        generator: CPU generator; count 0 leaves its state alone.

    Returns:
        int64 (count,), distinct positions in the pool.

    Raises:
        ValueError: `count` is outside [0, m].

    Source: CHEX, detection and segmentation code.
    """
    if not 0 <= count <= pool_size:
        raise ValueError(f"cannot draw {count} channels from a pool of {pool_size}")
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    return torch.randperm(pool_size, generator=generator)[:count]
