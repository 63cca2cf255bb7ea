"""Scores of output channels: which channels matter, as pure functions of weights or features.

A higher score means a more important channel. Scores of weights are float64, so that a ranking depends
neither on the order of summation nor on the device; a dead channel (all weights exactly zero) scores 0 under
`l1_scores` and `css_scores`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Eigenvectors of the Gram matrix err by about machine epsilon over this relative gap, so by 1e-8 at most.
_SAFE_GRAM_GAP = 2e-8


def filter_rows(weight: Tensor) -> Tensor:
    """One row an output channel, in float64.

    Args:
        weight: (C, ...), output channels first, any number of trailing axes.

    Returns:
        float64 (C, d) with d the product of the trailing axes.

    Raises:
        ValueError: `weight` has no output channel.
    """
    if weight.ndim == 0 or weight.shape[0] == 0:
        raise ValueError(f"weight needs at least one output channel, got shape {tuple(weight.shape)}")
    return weight.detach().to(torch.float64).reshape(weight.shape[0], -1)


def numerical_rank_floor(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Singular values of `rows` at or below this are indistinguishable from rounding.

    Storing a matrix in `dtype` perturbs its singular values by at most eps(dtype) * ||rows||_F (Weyl), and
    computing them in float64 by about max(shape) * eps(float64) * ||rows||_F.

    Args:
        rows: float64 matrix (C, d).
        dtype: the floating dtype in which the values of `rows` were stored.

    Returns:
        float64 scalar.
    """
    eps = max(torch.finfo(dtype).eps, max(rows.shape) * torch.finfo(torch.float64).eps)
    return eps * torch.linalg.matrix_norm(rows)


def l1_scores(weight: Tensor) -> Tensor:
    """Sum of absolute weights of every output channel.

    Args:
        weight: (C, ...), output channels first, any number of trailing axes.

    Returns:
        float64 (C,); exactly 0 for a dead channel, and only for one.

    Raises:
        ValueError: `weight` has no output channel.

    Source: CHEX (CVPR 2022, arXiv 2203.15794), the ranking of its initial mask.
    """
    return filter_rows(weight).abs().sum(dim=1)


def css_scores(weight: Tensor, keep: int) -> Tensor:
    """Leverage score of every output channel in the best rank-`keep` approximation (column subset selection).

    With X = reshape(weight, (C, d))^T = U S V^T (thin SVD, singular values descending), the score of channel
    j is ||V[j, :keep]||_2: the square root of the usual leverage score, in [0, 1], the squares summing to
    min(keep, rank). A wide layer (d < C) has no rank to select C columns from and is scored by `l1_scores`.

    Null-space vectors do not count: only singular values above the rounding of `weight` enter. Where `keep`
    exceeds the rank the published code lets arbitrary null-space vectors in, and a dead channel may get any
    score; here it scores 0. With keep = C there is nothing to choose and every channel scores 1.

    Args:
        weight: (C, ...), output channels first; masked channels are all-zero rows.
        keep: number of channels that are to be kept; more than C counts as C.

    Returns:
        float64 (C,); zeros for keep = 0 (but not in the wide case).

    Raises:
        ValueError: `keep` is negative, or `weight` has no output channel or is not finite.

    Source: CHEX (CVPR 2022, arXiv 2203.15794), channel pruning by column subset selection.
    """
    if keep < 0:
        raise ValueError(f"keep must be at least 0, got {keep}")
    rows = filter_rows(weight)
    if rows.shape[1] < rows.shape[0]:
        return l1_scores(weight)
    scores = torch.zeros(rows.shape[0], dtype=rows.dtype, device=rows.device)
    if keep == 0:
        return scores
    if keep >= rows.shape[0]:
        return torch.ones_like(scores)
    if not torch.isfinite(rows).all():
        raise ValueError("weight holds NaN or infinite values, which have no leverage score")
    # Dead rows are left out of the decomposition, so that round-off cannot give them a share.
    alive = rows.ne(0).any(dim=1)
    if alive.any():
        scores[alive] = _leverage(rows[alive], keep, weight.dtype)
    return scores


def _leverage(rows: Tensor, keep: int, dtype: torch.dtype) -> Tensor:
    """Leverage scores of the rows of a float64 (n, d) matrix, n <= d, that was stored in `dtype`."""
    n = rows.shape[0]
    keep = min(keep, n)
    # Overflow of the squares would spoil huge weights, underflow tiny ones; leverage ignores a common scale.
    rows = rows / rows.abs().max()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = values.flip(0), vectors.flip(1)
    below = values[keep] if keep < n else values.new_zeros(())
    if values[keep - 1] - below > _SAFE_GRAM_GAP * values[0]:
        basis = vectors[:, :keep]
    else:
        # Squaring lost the digits that separate the kept subspace (near rank deficiency, or a close pair at
        # the cut): the SVD, up to ten times slower, still has them.
        u, sigma, _ = torch.linalg.svd(rows, full_matrices=False)
        rank = int((sigma > numerical_rank_floor(rows, dtype)).sum())
        basis = u[:, : min(keep, rank)]
    if basis.shape[1] == n:
        # Exactly tied scores, so that the ranking falls back on the index and not on round-off.
        return torch.ones_like(values)
    return torch.linalg.vector_norm(basis, dim=1).clamp(max=1.0)


def laplacian_scores(weight: Tensor) -> Tensor:
    """Sum of Euclidean distances from every filter to all the others: how unlike the rest a filter is.

    Args:
        weight: (C, ...), output channels first. Dead channels count as filters at the origin.

    Returns:
        float64 (C,).

    Raises:
        ValueError: `weight` has no output channel.

    Source: CHEX (CVPR 2022, arXiv 2203.15794), an alternative criterion of its published code.
    """
    rows = filter_rows(weight)
    # Distances ignore a common shift, and the centred rows lose fewer digits in the matrix product.
    rows = rows - rows.mean(dim=0)
    distances = torch.cdist(rows, rows)
    return distances.fill_diagonal_(0.0).sum(dim=1)


def spatial_information(feature_map: Tensor) -> Tensor:
    """Standard deviation over space of the Sobel gradient magnitude of every feature map.

    With G_x, G_y the depthwise 3x3 Sobel responses (taps .5, 1, .5; zero padding 1) and g = sqrt(G_x^2 +
    G_y^2), the score is sqrt(mean(g^2) - mean(g)^2) over H and W. The variance is taken in two passes and in
    at least float32, so it is never negative: where one-pass round-off can give NaN this gives 0.

    Args:
        feature_map: (N, C, H, W), the output of a conv, before its norm; any floating dtype.

    Returns:
        (N, C), float32 or wider; the mean over N is the score of a batch.

    Raises:
        ValueError: `feature_map` does not have four axes.

    Source: CHEX (CVPR 2022, arXiv 2203.15794), the detection criterion of its published code.
    """
    if feature_map.ndim != 4:
        raise ValueError(f"feature_map must be (N, C, H, W), got shape {tuple(feature_map.shape)}")
    x = feature_map.detach().to(torch.promote_types(feature_map.dtype, torch.float32))
    x = F.pad(x, (1, 1, 1, 1))
    # Sliced and separable, this is several times faster than a depthwise conv, and autocast leaves it alone.
    rows = 0.5 * x[..., :-2, :] + x[..., 1:-1, :] + 0.5 * x[..., 2:, :]
    columns = 0.5 * x[..., :-2] + x[..., 1:-1] + 0.5 * x[..., 2:]
    horizontal = rows[..., 2:] - rows[..., :-2]
    vertical = columns[..., 2:, :] - columns[..., :-2, :]
    return torch.hypot(horizontal, vertical).flatten(2).std(dim=2, correction=0)


WEIGHT_CRITERIA: dict[str, Callable[[Tensor, int], Tensor]] = {
    "css": css_scores,
    "l1": lambda weight, keep: l1_scores(weight),
    "laplacian": lambda weight, keep: laplacian_scores(weight),
}
"""Criteria by name, each called as fn(weight (C, ...), keep) -> float64 scores (C,)."""
