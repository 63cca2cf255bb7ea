"""What a student is told by a teacher, as losses: pure functions of tensors. Logits: see
:func:`prune_mm.pruners.hinge_math.distillation_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: How features are compared.
MATCHES = ("correlation", "mse")


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], match: str = "correlation") -> Tensor:
    """Distance of feature maps, summed over levels.

    Args:
        student: maps ``(N, C, H, W)`` of each level (or vectors ``(N, C)``).
        teacher: maps of the same shapes; no gradient reaches them.
        match: ``correlation``: every channel is brought to mean 0 and variance 1 over images and positions, and half
            the mean squared difference is taken, which is 1 minus Pearson's correlation. So students need not copy
            scales. ``mse``: the mean squared difference as it is.

    Returns:
        The loss, ``()``.

    Raises:
        ValueError: the shapes differ, or ``match`` is unknown.

    Source: ``correlation``: Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson
    Correlation Coefficient, NeurIPS 2022, equations 2 and 3.
    """
    if match not in MATCHES:
        raise ValueError(f"match={match!r} must be one of {', '.join(MATCHES)}")
    shapes = [[tuple(level.shape) for level in levels] for levels in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"features of student and teacher must have the same shapes, got {shapes[0]} and {shapes[1]}")
    total = student[0].new_zeros(())
    for given, wanted in zip(student, teacher):
        if match == "mse":
            total = total + F.mse_loss(given, wanted.detach())
        else:
            total = total + F.mse_loss(standardised(given), standardised(wanted.detach())) / 2.0
    return total


def standardised(features: Tensor, eps: float = 1e-6) -> Tensor:
    """Features ``(N, C, ...)`` with mean 0 and variance 1 per channel; a constant channel becomes 0."""
    axes = [0, *range(2, features.ndim)]
    centred = features - features.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()


def head_losses(
    student: tuple[Sequence[Tensor], Sequence[Tensor]],
    teacher: tuple[Sequence[Tensor], Sequence[Tensor]],
    classes: int,
    sigmoid: bool = False,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Distance of what dense detection heads put out: divergence of class scores, and L1 of boxes.

    Most priors are background and say nothing about boxes. So boxes are weighted by the probability of foreground that
    the teacher gives them, and both losses are divided by the sum of these probabilities (at least 1), which takes the
    place of the number of positive priors in the loss of the head.

    Args:
        student: class scores ``(N, A * classes, H, W)`` and boxes ``(N, A * D, H, W)`` of each level, as they leave the
            head; A priors a position, D numbers a box.
        teacher: the same of the teacher; no gradient reaches it.
        classes: scores of a prior, with the background (the last one) where there is one.
        sigmoid: whether scores are independent of each other, and there is no background.
        temperature: T, which scores are divided by; the divergence is multiplied with its square.

    Returns:
        ``cls``: T^2 times the sum of KL(teacher || student), and ``bbox``: the weighted sum of absolute differences;
        both divided as said, ``()``.
    """
    given, wanted = (_by_prior(scores, classes) for scores in (student[0], teacher[0]))
    priors = given.shape[1]
    boxes, wanted_boxes = (_by_prior(maps, None, priors) for maps in (student[1], teacher[1]))
    wanted, wanted_boxes = wanted.detach(), wanted_boxes.detach()
    foreground = wanted.sigmoid().amax(-1) if sigmoid else 1.0 - wanted.softmax(-1)[..., -1]
    count = foreground.sum().clamp(min=1.0)
    divergence = (_bernoulli if sigmoid else _categorical)(given / temperature, wanted / temperature)
    differences = (boxes - wanted_boxes).abs().sum(-1)
    return {"cls": divergence * temperature**2 / count, "bbox": (foreground * differences).sum() / count}


def _by_prior(maps: Sequence[Tensor], size: int | None, priors: int | None = None) -> Tensor:
    """``(N, A * size, H, W)`` of each level as one ``(N, priors, size)``."""
    if size is None:
        size = sum(level[0].numel() for level in maps) // int(priors or 1)
    return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, size) for level in maps], dim=1)


def _categorical(given: Tensor, wanted: Tensor) -> Tensor:
    return F.kl_div(given.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)


def _bernoulli(given: Tensor, wanted: Tensor) -> Tensor:
    """Each score is a distribution of its own: yes or no."""
    return sum(
        F.kl_div(F.logsigmoid(sign * given), F.logsigmoid(sign * wanted), reduction="sum", log_target=True)
        for sign in (1.0, -1.0)
    )
