"""The mathematics of Hinge: proximal operators, survivors, the initial pair, penalties and learning rates.

Pure functions of tensors and numbers, they know neither modules nor a training loop. A is a sparsity-inducing matrix
``(r, n)`` behind a convolution: row i belongs to intermediate channel i, column j to output j. Source throughout:
Hinge, Group Sparsity (CVPR 2020, arXiv 2003.08935), and the behaviour of its published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_mm.pruners.options import check_choice

#: From group norms, float64 and not empty, and tau to what every group is multiplied with.
ProximalOperator = Callable[[Tensor, float], Tensor]

#: Proximal operators by the name of the regulariser.
REGULARIZERS: dict[str, ProximalOperator] = {}

#: Guards divisions by a norm; also the shift inside the logarithm of ``logsum``. As published.
EPS = 1e-8

#: Ways to make the first pair; see :func:`init_pair`.
INIT_METHODS = ("svd2", "svd", "p-identity", "p-random", "t-random", "p-disturbance-u", "p-disturbance-n")

AXES = ("row", "col", "both")


# -- proximal operators -----------------------------------------------------------------------------------------------


def regularizer(name: str) -> Callable[[ProximalOperator], ProximalOperator]:
    """Register a proximal operator under a name."""

    def register(operator: ProximalOperator) -> ProximalOperator:
        REGULARIZERS[name] = operator
        return operator

    return register


@regularizer("l1")
def _l1(v: Tensor, tau: float) -> Tensor:
    """Group soft threshold: 1 - tau / v, at least 0."""
    return (1.0 - tau / (v + EPS)).clamp(min=0.0)


@regularizer("l1-2")
def _l1_minus_l2(v: Tensor, tau: float) -> Tensor:
    """L1 minus L2 of the norms: the soft threshold, stretched by 1 + tau / ||w||_2 with w = max(v - tau, 0)."""
    length = torch.linalg.vector_norm((v - tau).clamp(min=0.0))
    # As published this is 0 / 0 when every norm is below tau; the soft threshold is zero there.
    return _l1(v, tau) * (1.0 + torch.where(length > 0.0, tau / length, 0.0))


@regularizer("l1d2")
def _l1_half(v: Tensor, tau: float) -> Tensor:
    """L1/2: the exact minimiser of (x - v)^2 + tau sqrt(x), so half as strong as tau says in the convention of l1."""
    live = v > 54.0 ** (1.0 / 3.0) / 4.0 * tau ** (2.0 / 3.0)
    # tau / 8 * (v / 3)^-1.5, in an order that neither overflows nor multiplies infinity with zero.
    angle = torch.arccos(((tau / 8.0) ** (2.0 / 3.0) / (torch.where(live, v, 1.0) / 3.0)).pow(1.5).clamp(max=1.0))
    return torch.where(live, 2.0 / 3.0 * (1.0 + torch.cos(2.0 / 3.0 * (math.pi - angle))), 0.0)


@regularizer("logsum")
def _log_sum(v: Tensor, tau: float) -> Tensor:
    """Log-sum: the larger stationary point, (v + sqrt(v^2 - 4 tau)) / 2, without asking whether 0 were better."""
    safe = torch.where(v > 0.0, v, 1.0)
    shift = EPS / safe
    discriminant = (1.0 - shift).square() - 4.0 * (tau / safe.square() - shift)
    scale = (1.0 - shift + discriminant.clamp(min=0.0).sqrt()) / 2.0
    return torch.where((v > 0.0) & (discriminant > 0.0), scale.clamp(min=0.0), 0.0)


@regularizer("l0")
def _l0(v: Tensor, tau: float) -> Tensor:
    """L0: the minimiser of 0.5 (x - v)^2 + tau [x != 0], a hard threshold at sqrt(2 tau)."""
    return (v > math.sqrt(2.0 * tau)).to(v.dtype)


def prox_scale(norms: Tensor | Sequence[float], tau: float, regularizer: str) -> Tensor:
    """What the proximal operator multiplies every group with.

    Args:
        norms: L2 norms of the groups, ``(groups,)``, at least 0; may be empty.
        tau: strength of the step, lambda times learning rate, at least 0.
        regularizer: ``l1``, ``l1-2``, ``l1d2``, ``logsum`` or ``l0`` (or another one in :data:`REGULARIZERS`).

    Returns:
        ``(groups,)`` in the type of ``norms``, computed in float64: at least 0, at most 1 (``l1-2`` may exceed 1). A
        norm that is NaN gives NaN, and nothing else does.

    Raises:
        ValueError: the regulariser is unknown, or tau is negative or not finite.

    Source: Hinge, equations of the l_q family; l0 was announced but not published.
    """
    check_choice("regularizer", regularizer, REGULARIZERS)
    tau = float(tau)
    if not 0.0 <= tau < math.inf:
        raise ValueError(f"tau must be at least 0 and finite, got {tau}")
    v = norms.detach() if isinstance(norms, Tensor) else torch.tensor(norms, dtype=torch.float64)
    if v.numel() == 0:
        return v.clone()
    scale = REGULARIZERS[regularizer](v.double(), tau)
    return torch.where(v.isnan(), math.nan, scale).to(v.dtype if v.is_floating_point() else torch.float64)


def group_norms(parts: Sequence[Tensor]) -> Tensor:
    """L2 norm of every group, float64 ``(groups,)``.

    Args:
        parts: tensors ``(groups, ...)``; a group is what lies at its index in all of them. The rows of A are
            ``[A]``, its columns ``[A.T]``, a cardinality group of ResNeXt its rows of conv1 and columns of conv3.
    """
    return torch.stack([part.detach().double().flatten(1).square().sum(1) for part in parts]).sum(0).sqrt()


@torch.no_grad()
def prox_groups_(parts: Sequence[Tensor], tau: float, regularizer: str) -> None:
    """Proximal step on groups that lie in several tensors, in place; see :func:`group_norms`."""
    scale = prox_scale(group_norms(parts), tau, regularizer)
    for part in parts:
        part.mul_(scale.to(part.dtype).view(-1, *[1] * (part.ndim - 1)))


@torch.no_grad()
def prox_(matrix: Tensor, axis: str, tau: float, regularizer: str) -> None:
    """Proximal step on A, in place (a view of a parameter will do).

    Args:
        matrix: ``(r, n)``.
        axis: ``row``, ``col``, or ``both``: rows, then columns of the result, each with the full tau.
        tau: see :func:`prox_scale`.
        regularizer: see :func:`prox_scale`.

    Raises:
        ValueError: for another axis or regulariser.
    """
    check_choice("axis", axis, AXES)
    for group, view in (("row", matrix), ("col", matrix.T)):
        if axis in (group, "both"):
            prox_groups_([view], tau, regularizer)


def penalty(norms: Tensor, q: float = 1.0) -> float:
    """Group-sparsity penalty of one matrix, (sum of v^q)^(1/q), in float64; 0 without groups.

    Raises:
        ValueError: q is not positive.
    """
    if not q > 0.0:
        raise ValueError(f"q must be above 0, got {q}")
    return float(norms.detach().double().pow(q).sum()) ** (1.0 / q)


# -- survivors --------------------------------------------------------------------------------------------------------


def select_groups(norms: Tensor | Sequence[float], threshold: float, min_share: float) -> Tensor:
    """Groups that stay: all with v >= min(threshold, m-th largest v), where m = floor(n * min_share) and at least 1.

    Threshold 0 keeps every v > 0. When fewer than m groups are above zero, those stay and the first m do too.

    Args:
        norms: ``(n,)``, at least 0.
        threshold: in the unit of the norms; it is rounded to their type first, so a norm that was written as the
            same number is not below it.
        min_share: share of the groups that stay at least, in [0, 1].

    Returns:
        int64 ``(k,)``, ascending, k >= 1 (0 without groups).

    Raises:
        ValueError: a norm is NaN, or min_share is out of range.

    Source: Hinge, nullifying threshold.
    """
    v = _norms(norms)
    if not 0.0 <= min_share <= 1.0:
        raise ValueError(f"min_share must be in [0, 1], got {min_share}")
    # The floor forgives round-off: a share of 0.29 of 100 groups is 29.
    least = max(math.floor(v.numel() * min_share + 1e-9), 1)
    return _survivors(v, least, float(threshold))


def top_groups(norms: Tensor | Sequence[float], count: int) -> Tensor:
    """The ``count`` groups with the largest norms, and those that tie with the last of them.

    When fewer are above zero, those stay and the first ``count`` do too.

    Args:
        norms: ``(n,)``, at least 0.
        count: in 1..n.

    Returns:
        int64 ``(k,)``, ascending.

    Raises:
        ValueError: a norm is NaN, or the count is out of range.

    Source: Hinge, same ratio for the second matrix of a block.
    """
    v = _norms(norms)
    if not 1 <= count <= v.numel():
        raise ValueError(f"cannot keep {count} of {v.numel()} groups")
    return _survivors(v, count, math.inf)


def _norms(norms: Tensor | Sequence[float]) -> Tensor:
    v = norms.detach() if isinstance(norms, Tensor) else torch.tensor(norms, dtype=torch.float64)
    if v.ndim != 1 or bool(v.isnan().any()):
        raise ValueError(f"norms must be a vector without NaN, got shape {tuple(v.shape)}")
    return v


def _survivors(v: Tensor, least: int, threshold: float) -> Tensor:
    if v.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=v.device)
    last = v.topk(least).values[-1]
    if not bool(last > 0):
        keep = v > 0
        keep[:least] = True
    else:
        bound = torch.minimum(torch.tensor(max(threshold, 0.0), dtype=v.dtype, device=v.device), last)
        keep = (v >= bound) & (v > 0)
    return keep.nonzero().flatten()


# -- the pair ---------------------------------------------------------------------------------------------------------


def pair_rank(shape: Sequence[int], method: str) -> int:
    """Intermediate channels of the pair that :func:`init_pair` makes of a kernel ``(n, c, k, ...)``."""
    check_choice("init_method", method, INIT_METHODS)
    return min(shape[0], math.prod(shape[1:])) if method == "svd2" else shape[0]


@torch.no_grad()
def init_pair(
    weight: Tensor,
    method: str = "svd2",
    seed: int | torch.Generator = 0,
    scale: float = 0.05,
    normalize: str = "col",
) -> tuple[Tensor, Tensor]:
    """Split a dense kernel: a convolution with W, then a 1x1 convolution with A^T, gives what the kernel gave.

    With W0 the matrix ``(d, n)`` whose columns are the n filters of d = c * k * k weights, and W0 = U S V^T:

    - ``svd2``: the first columns of U, and S V^T. Row norms of A are the singular values, column norms the filters'
      norms. When d < n there are d intermediate channels.
    - ``svd``: U S, and V^T, which is orthonormal. When d < n the last filters of W are zero.
    - ``p-identity``: the kernel itself and the identity.
    - ``p-random``: the kernel and a Xavier-normal A; ``t-random``: both Kaiming-uniform, for training from scratch.
      Neither computes what the kernel did.
    - ``p-disturbance-u``, ``p-disturbance-n``: the kernel, and the identity plus ``scale`` times uniform [0, 1) or
      normal noise, with columns (or rows) of unit length. It computes nearly what the kernel did.

    Args:
        weight: ``(n, c, k, ...)``, of a convolution without groups.
        method: one of :data:`INIT_METHODS`.
        seed: seed, or a CPU generator, of whatever is random.
        scale: of the noise.
        normalize: ``col`` or ``row``: which lines of a disturbed A have unit length.

    Returns:
        W ``(r, c, k, ...)`` and A ``(r, n)``, in the type and on the device of ``weight``; computed in float64 on CPU.

    Raises:
        ValueError: an argument is unknown, or the kernel holds NaN or infinite values.

    Source: Hinge, section on initialisation, and the options of its code.
    """
    rank, (n, shape) = pair_rank(weight.shape, method), (weight.shape[0], weight.shape[1:])
    check_choice("normalize", normalize, ("row", "col"))
    columns = weight.detach().to("cpu", torch.float64).flatten(1).T
    if not bool(torch.isfinite(columns).all()):
        raise ValueError("the kernel holds NaN or infinite values, it cannot be split")
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    if method in ("svd", "svd2"):
        filters, matrix = _svd(columns, rank, into_filters=method == "svd")
    elif method == "t-random":
        # Kaiming with a = sqrt(5): uniform in +-1 / sqrt(fan in).
        draws = (torch.rand(size, n, generator=generator, dtype=torch.float64) for size in columns.shape)
        filters, matrix = ((2.0 * draw - 1.0) / math.sqrt(draw.shape[0]) for draw in draws)
    else:
        filters, matrix = columns, _mixing(n, method, generator, scale, normalize)
    return filters.T.reshape(rank, *shape).to(weight), matrix.contiguous().to(weight)


def _svd(columns: Tensor, rank: int, into_filters: bool) -> tuple[Tensor, Tensor]:
    """W ``(d, rank)`` and A ``(rank, n)``; the singular values go into the filters, or into A."""
    d, n = columns.shape
    # V is completed to a basis where A must be square (d < n); U, which may be long, never is.
    u, sigma, vh = torch.linalg.svd(columns, full_matrices=d < n and rank == n)
    if not into_filters:
        return u, sigma[:, None] * vh[: sigma.numel()]
    filters = columns.new_zeros(d, rank)
    filters[:, : sigma.numel()] = u * sigma
    return filters, vh


def _mixing(n: int, method: str, generator: torch.Generator, scale: float, normalize: str) -> Tensor:
    """A ``(n, n)`` of the methods that leave the kernel alone."""
    eye = torch.eye(n, dtype=torch.float64)
    if method == "p-identity":
        return eye
    if method == "p-disturbance-u":
        noise = torch.rand(n, n, generator=generator, dtype=torch.float64)
    else:
        noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if method == "p-random":
        return noise / math.sqrt(n)  # Xavier: the variance is 2 / (fan in + fan out)
    return F.normalize(eye + scale * noise, dim=0 if normalize == "col" else 1)


# -- schedules and losses ---------------------------------------------------------------------------------------------


def annealed(strength: float, value: float, factor: float, high: float, low: float) -> float:
    """Strength lambda of the regulariser while the penalty falls: divided by ``factor`` at or below ``high``, twice
    at or below ``low``. The penalty may rise again, and the strength with it.

    Args:
        strength: lambda.
        value: penalty of the network now.
        factor: 0: no annealing.
        high: t1.
        low: t2.

    Source: Hinge, annealing.
    """
    if factor == 0 or value > high:
        return strength
    return strength / factor if value > low else strength / factor**2


def gradient_ratio(
    first: float,
    second: float,
    previous: float | None,
    momentum: float = 0.9,
    bounds: tuple[float, float] = (5 / 9, 9 / 5),
    faithful: bool = False,
) -> float:
    """Running ratio of the gradients of a block's two matrices, which learning rates are corrected with.

    Args:
        first: sum over layers and groups of the L2 norms of the first matrices' gradients.
        second: the same of the second matrices.
        previous: ratio of the step before; None at the first step.
        momentum: weight of the new ratio beside the previous one.
        bounds: the result is clipped to them.
        faithful: leave the first ratio as it is, as published.

    Returns:
        The ratio. Gradients that vanish or are not finite leave it as it was (1 at the first step).
    """
    usable = 0.0 < first < math.inf and 0.0 < second < math.inf
    if not usable:
        return 1.0 if previous is None else previous
    ratio = first / second
    if previous is None:
        return ratio if faithful else min(max(ratio, bounds[0]), bounds[1])
    return min(max((1.0 - momentum) * previous + momentum * ratio, bounds[0]), bounds[1])


def learning_rates(
    base: Sequence[float], ratio: float, method: str = "p1", exponent: float = 1.35, rescale_first: bool = True
) -> list[float]:
    """Learning rates of the parameter groups that keep both matrices shrinking at one pace.

    Args:
        base: scheduled rates: ordinary weights, first matrices, second matrices (always the last).
        ratio: from :func:`gradient_ratio`.
        method: ``p1``: all but the last are divided by ratio^exponent; ``p2``: the last is multiplied with it.
        exponent: 1.35 as published.
        rescale_first: whether ``p1`` also rescales the ordinary weights, as published.

    Raises:
        ValueError: the method is unknown, or the ratio not positive.
    """
    check_choice("lr_adjust_method", method, ("p1", "p2"))
    if not 0.0 < ratio < math.inf:
        raise ValueError(f"the ratio of gradients must be positive, got {ratio}")
    power = ratio**exponent
    if method == "p2":
        return [*base[:-1], base[-1] * power]
    return [rate if index == 0 and not rescale_first else rate / power for index, rate in enumerate(base[:-1])] + [
        base[-1]
    ]


def balance_factor(norms: Tensor) -> float:
    """Layer balancing: mean group norm of a matrix at the start, which its tau is multiplied with; 1 without groups."""
    return float(norms.detach().double().mean()) if norms.numel() else 1.0


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Knowledge distillation: T^2 times the mean over the batch of KL(softmax(teacher / T) || softmax(student / T)).

    Args:
        student: logits ``(B, classes)``.
        teacher: logits ``(B, classes)`` of a teacher in eval mode; no gradient reaches it.
        temperature: T.

    Returns:
        The loss, ``()``.

    Raises:
        ValueError: the temperature is not positive.

    Source: Hinton et al. (2015), as used by Hinge with weight 0.4 beside 0.6 of cross entropy.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    wanted = F.log_softmax(teacher.detach() / temperature, dim=1)
    given = F.log_softmax(student / temperature, dim=1)
    return F.kl_div(given, wanted, reduction="sum", log_target=True) * (temperature**2 / max(student.shape[0], 1))
