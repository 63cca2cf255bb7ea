"""The mathematics of StrucSpars: tiers of a layer, group levels, the regulariser, the threshold, the coefficient.

Pure functions of tensors and numbers, they know neither modules nor a training loop. A layer is seen as the matrix
of the L1 norms of its kernels, out x in. Halving both sides again and again gives *tiers*: tier t is the two
off-diagonal quadrants of every block that t splits left. *Level* L removes tiers 0..L-2, so that 2^(L-1) diagonal
blocks remain: the groups of a grouped convolution. *Ordered* matrices have their rows and columns permuted already,
`norms[out_perm][:, in_perm]`; the permutations come from `prune_mm.pruners.assignment`.

Source throughout: StrucSpars, Structured Sparsification with Joint Optimization of Group Convolution and Channel
Shuffle (UAI 2021, arXiv 2002.08127), and the behaviour of its published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from prune_mm.pruners.strucspars_tiers import check_level, cost_matrix, depth, level_mask, tier_masses

__all__ = [
    "active_coefficient",
    "bisect_threshold",
    "cost_matrix",
    "depth",
    "find_threshold",
    "group_level",
    "kernel_norms",
    "level_fractions",
    "level_mask",
    "model_sparsity",
    "next_coefficient",
    "regularizer",
    "tier_masses",
]

# Added to the mass of a layer by the published code, against division by zero; it also decides exact ties.
_EPSILON = 1e-12


def kernel_norms(weight: Tensor) -> Tensor:
    """L1 norm of every kernel of a convolution.

    Args:
        weight: (O, I, *kernel), any number of kernel axes; a linear layer's (O, I) too.

    Returns:
        float64 (O, I), detached, on the device of `weight`.

    Raises:
        ValueError: the weight has fewer than two axes.
    """
    if weight.ndim < 2:
        raise ValueError(f"a weight needs an output and an input axis, got shape {tuple(weight.shape)}")
    norms = weight.detach().to(torch.float64).abs()
    return norms.flatten(2).sum(dim=2) if norms.ndim > 2 else norms


def level_fractions(ordered_norms: Tensor | np.ndarray) -> np.ndarray:
    """Share of a layer's mass that every level keeps: f_t = mass outside tiers 0..t-1 / (mass + 1e-12).

    The small number is the published one: it puts f_0 a hair below 1 and makes a zero layer all zeros.

    Args:
        ordered_norms: (O, I) kernel norms, rows and columns permuted.

    Returns:
        float64 (D + 1,), never rising; f_t belongs to level t + 1, 2^t groups.

    Raises:
        ValueError: as `check_norms`.

    Source: StrucSpars, group level.
    """
    return _fractions(tier_masses(ordered_norms))


def _fractions(masses: np.ndarray) -> np.ndarray:
    """f_t from tier masses, summed from the inside out so that they never rise, and an empty tier costs nothing."""
    kept = np.cumsum(masses[::-1])[::-1]
    return kept / (kept[0] + _EPSILON)


def _lossless_fractions(masses: np.ndarray) -> np.ndarray:
    """f_t, but exactly 1 where level t + 1 removes nothing at all."""
    fractions = _fractions(masses)
    fractions[np.concatenate(([0.0], np.cumsum(masses[:-1]))) == 0.0] = 1.0
    return fractions


def _level(fractions: np.ndarray, threshold: float, faithful: bool) -> int:
    """First t with f_t < 1 - threshold; when none is, one past the last t, or as published the last one itself."""
    below = fractions < 1.0 - threshold
    if below.any():
        return int(below.argmax())
    return len(fractions) - 1 if faithful else len(fractions)


def group_level(ordered_norms: Tensor | np.ndarray, threshold: float, faithful: bool = False) -> int:
    """Deepest level of a layer that loses at most a share `threshold` of its mass: 2^(level - 1) groups.

    Level L stands when every f_t up to t = L - 1 is at least 1 - threshold, with `level_fractions`' f_t; a level
    that removes nothing always stands, so the result is 1 to D + 1.

    Args:
        ordered_norms: (O, I) kernel norms, rows and columns permuted.
        threshold: share of the layer's mass that may go, in [0, 1].
        faithful: give the published code's value: it never passes D, and is 0 for a layer that cannot be halved,
            for a zero layer, and for most layers at threshold 0.

    Returns:
        The level.

    Raises:
        ValueError: `threshold` is outside [0, 1], or as `check_norms`.

    Source: StrucSpars, group level.
    """
    return level_of_masses(tier_masses(ordered_norms), threshold, faithful)


def level_of_masses(masses: np.ndarray, threshold: float, faithful: bool = False) -> int:
    """As :func:`group_level`, from the tier masses of a layer (or summed over several that share a level).

    Raises:
        ValueError: `threshold` is outside [0, 1].
    """
    _check_threshold(threshold)
    return _level(_fractions(masses) if faithful else _lossless_fractions(masses), threshold, faithful)


def _check_threshold(threshold: float) -> None:
    """Raise ValueError unless 0 <= threshold <= 1."""
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold, the share of mass that may go, must be in [0, 1], got {threshold}")


def regularizer(out_perm: Tensor, in_perm: Tensor, level: int, power: float = 0.5) -> Tensor:
    """Strength of the structured L1 on every kernel of a layer at a level, in original coordinates.

    It covers the tiers the level removes and the next one, to push the layer on; the last level has no next one.
    The sub-gradient is `coefficient * sign(weight) * R`, R broadcast over the kernel.

    Args:
        out_perm: int64 (O,), row `out_perm[a]` sits at position a of the ordered layer.
        in_perm: int64 (I,), the same for columns.
        level: current level, 1 to D + 1.
        power: decay from tier to tier, in (0, 1].

    Returns:
        float64 (O, I), on the device of `out_perm`.

    Raises:
        ValueError: the layer has no such level, or `power` is outside (0, 1].

    Source: StrucSpars, structured regularisation.
    """
    rows, columns = out_perm.numel(), in_perm.numel()
    check_level(level, depth(rows, columns), f"{rows} x {columns}")
    cost = cost_matrix(rows, columns, level, power).to(out_perm.device)
    return cost[out_perm.argsort()][:, in_perm.to(out_perm.device).argsort()]


def bisect_threshold(
    sparsity_at: Callable[[float], float], target: float, margin: float = 0.01, rounds: int = 10
) -> float:
    """Threshold in [0, 1] whose sparsity is at least a target, by bisection from 0.5.

    Args:
        sparsity_at: sparsity at a threshold, never falling.
        target: sparsity to reach.
        margin: stop as soon as the sparsity is in [target, target + margin].
        rounds: bisections at most.

    Returns:
        The threshold: the last middle, or when that falls short the lowest threshold known to suffice; 1.0 when
        the target was not reached anywhere.

    Raises:
        ValueError: `margin` or `rounds` is negative, or `target` is outside [0, 1].

    Source: StrucSpars, threshold of the target sparsity.
    """
    if not 0.0 <= target <= 1.0:
        raise ValueError(f"target, the share of weights to remove, must be in [0, 1], got {target}")
    if not margin >= 0.0 or rounds < 0:
        raise ValueError(f"margin and rounds must be at least 0, got margin={margin}, rounds={rounds}")
    low, middle, high = 0.0, 0.5, 1.0
    for _ in range(rounds):
        sparsity = sparsity_at(middle)
        if 0.0 <= sparsity - target <= margin:
            return middle
        low, high = (low, middle) if sparsity >= target else (middle, high)
        middle = (low + high) / 2.0
    return middle if sparsity_at(middle) >= target else high


def model_sparsity(
    ordered_norms_list: Sequence[Tensor | np.ndarray],
    kernel_areas: Sequence[int],
    threshold: float,
    faithful: bool = False,
) -> float:
    """Share of the groupable weights that go when every layer takes its level at a threshold.

    A layer holds out * in * area weights dense and that over 2^(level - 1) grouped: exact counts, whatever the
    kernel. (The published code guesses the kernel from the layer's name.)

    Args:
        ordered_norms_list: (O, I) kernel norms of every layer, permuted; at least one.
        kernel_areas: weights of one kernel of every layer, 9 for 3x3.
        threshold: as `group_level`.
        faithful: as `group_level`; level 0 counts as published, twice the dense weights.

    Returns:
        The sparsity, in [0, 1); below 0 only if `faithful`.

    Raises:
        ValueError: as `find_threshold`, or `threshold` is outside [0, 1].
    """
    _check_threshold(threshold)
    return _sparsity_at(ordered_norms_list, kernel_areas, faithful)(threshold)


def _sparsity_at(
    ordered_norms_list: Sequence[Tensor | np.ndarray], kernel_areas: Sequence[int], faithful: bool
) -> Callable[[float], float]:
    """Sparsity as a function of the threshold; the fractions of every layer are worked out once, here."""
    layers, areas = list(ordered_norms_list), list(kernel_areas)
    if not layers or len(layers) != len(areas):
        raise ValueError(
            f"need one kernel area for each of one or more layers, got {len(layers)} layers, {len(areas)} areas"
        )
    if any(area < 1 for area in areas):
        raise ValueError(f"kernel_areas counts the weights of one kernel, at least 1, got {min(areas)}")
    all_masses = [tier_masses(norms) for norms in layers]
    fractions = [_fractions(masses) if faithful else _lossless_fractions(masses) for masses in all_masses]
    weights = [math.prod(norms.shape) * area for norms, area in zip(layers, areas)]

    def sparsity_at(threshold: float) -> float:
        kept = sum(w / 2.0 ** (_level(f, threshold, faithful) - 1) for f, w in zip(fractions, weights))
        return 1.0 - kept / sum(weights)

    return sparsity_at


def find_threshold(
    ordered_norms_list: Sequence[Tensor | np.ndarray],
    kernel_areas: Sequence[int],
    target: float,
    faithful: bool = False,
) -> tuple[float, float]:
    """One threshold for all layers at which a target share of the groupable weights goes.

    Args:
        ordered_norms_list: (O, I) kernel norms of every layer, permuted; at least one.
        kernel_areas: weights of one kernel of every layer, 9 for 3x3.
        target: share of weights to remove, in [0, 1).
        faithful: as `group_level`.

    Returns:
        The threshold, and the sparsity there; it is at least `target`, unless no threshold reaches that: then 1.0
        and the largest sparsity there is.

    Raises:
        ValueError: `target` is outside [0, 1), the lists do not match or are empty, an area is below 1, or a
            matrix is as `check_norms` does not like it.

    Source: StrucSpars, threshold of the target sparsity.
    """
    if not 0.0 <= target < 1.0:
        raise ValueError(f"target, the share of weights to remove, must be in [0, 1), got {target}")
    sparsity_at = _sparsity_at(ordered_norms_list, kernel_areas, faithful)
    threshold = bisect_threshold(sparsity_at, target)
    return threshold, sparsity_at(threshold)


def active_coefficient(coefficient: float, epoch: int, warmup: int) -> float:
    """Regularisation coefficient in force during an epoch: 0 in the first `warmup` ones.

    Args:
        coefficient: the controller's current value.
        epoch: from 0.
        warmup: epochs without regularisation.

    Returns:
        The coefficient to use.
    """
    return 0.0 if epoch < warmup else coefficient


def next_coefficient(
    coefficient: float,
    sparsity: float,
    last_sparsity: float,
    target: float,
    epoch: int,
    epochs: int,
    warmup: int,
    delta: float,
) -> float:
    """Regularisation coefficient after an epoch: one step up when sparsity lags, one down when it is reached.

    Sparsity lags when it is below the target and grew less than (target - sparsity) / (epochs - epoch), what
    every remaining epoch has to add. The coefficient starts at `delta` and never falls below 0.

    Args:
        coefficient: value used in this epoch, at least 0.
        sparsity: sparsity at the end of this epoch.
        last_sparsity: sparsity at the end of the epoch before, warm-up included; 0 before the first.
        target: sparsity to reach.
        epoch: the epoch that ended, from 0 to epochs - 1.
        epochs: epochs of the search.
        warmup: epochs without regularisation, after which the controller wakes.
        delta: size of a step, at least 0.

    Returns:
        The coefficient of the next epoch.

    Raises:
        ValueError: `epoch` is outside [0, epochs), or `coefficient` or `delta` is negative.

    Source: StrucSpars, automatic adjustment of the coefficient.
    """
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch must be in [0, epochs), got epoch={epoch}, epochs={epochs}")
    if not (coefficient >= 0.0 and delta >= 0.0):
        raise ValueError(f"coefficient and delta must be at least 0, got {coefficient} and {delta}")
    if epoch < warmup:
        return coefficient
    if sparsity >= target:
        return max(coefficient - delta, 0.0)
    if sparsity - last_sparsity < (target - sparsity) / (epochs - epoch):
        return coefficient + delta
    return coefficient
