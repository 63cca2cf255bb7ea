"""The losses of distillation as numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prune_mm.engine.distillation_losses import feature_loss, head_losses


def randn(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def test_correlation_of_features():
    """Half the squared difference of standardised channels is 1 minus Pearson's correlation; levels add up."""
    shapes = [(3, 4, 5, 6), (3, 2, 2, 3)]
    student, teacher = ([randn(*shape, seed=seed + number) for number, shape in enumerate(shapes)] for seed in (0, 9))
    expected = 0.0
    for given, wanted in zip(student, teacher):
        pairs = zip(given.movedim(1, 0).flatten(1).numpy(), wanted.movedim(1, 0).flatten(1).numpy())
        expected += np.mean([1.0 - np.corrcoef(a, b)[0, 1] for a, b in pairs])
    assert float(feature_loss(student, teacher)) == pytest.approx(expected, rel=1e-4)
    scaled = [7.0 * level + 3.0 for level in student]
    assert float(feature_loss(student, scaled)) == pytest.approx(0.0, abs=1e-9)
    assert float(feature_loss(student, [-level for level in student])) == pytest.approx(4.0, rel=1e-4)


def test_squared_difference_of_features():
    student, teacher = [randn(2, 3, 4, 4)], [randn(2, 3, 4, 4, seed=1)]
    assert float(feature_loss(student, teacher, "mse")) == pytest.approx(
        float((student[0] - teacher[0]).square().mean())
    )


def test_features_without_variance_and_of_one_value():
    flat = [torch.ones(2, 3, 4, 4, requires_grad=True), torch.ones(1, 3, 1, 1, requires_grad=True)]
    loss = feature_loss(flat, [randn(2, 3, 4, 4).float(), randn(1, 3, 1, 1).float()])
    loss.backward()
    assert all(bool(torch.isfinite(level.grad).all()) for level in flat)


def test_gradients_reach_the_student_only():
    student, teacher = randn(2, 3, 4, 4).requires_grad_(), randn(2, 3, 4, 4, seed=1).requires_grad_()
    for match in ("correlation", "mse"):
        feature_loss([student], [teacher], match).backward()
    sum(head_losses(([student], [student]), ([teacher], [teacher]), 3).values()).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_features_of_different_shapes():
    with pytest.raises(ValueError, match=r"must have the same shapes, got \[\(2, 3, 4, 4\)\] and \[\(2, 3, 4, 5\)\]"):
        feature_loss([randn(2, 3, 4, 4)], [randn(2, 3, 4, 5)])
    with pytest.raises(ValueError, match="match='cosine' must be one of correlation, mse"):
        feature_loss([], [], "cosine")


def by_hand(student, teacher, classes, sigmoid, temperature):
    """Prior by prior, with plain Python."""

    def priors(outputs):
        found = []
        for scores, boxes in zip(*outputs):
            anchors = scores.shape[1] // classes
            size = boxes.shape[1] // anchors
            for image in range(len(scores)):
                for anchor in range(anchors):
                    for y, x in np.ndindex(*scores.shape[2:]):
                        found.append((scores[image, anchor * classes : (anchor + 1) * classes, y, x].numpy(),
                                      boxes[image, anchor * size : (anchor + 1) * size, y, x].numpy()))  # fmt: skip
        return found

    def probabilities(scores):
        if sigmoid:
            yes = 1.0 / (1.0 + np.exp(-scores))
            return np.stack([yes, 1.0 - yes])
        return np.exp(scores) / np.exp(scores).sum()

    count = cls = bbox = 0.0
    for (scores, boxes), (wanted, wanted_boxes) in zip(priors(student), priors(teacher)):
        foreground = probabilities(wanted)[0].max() if sigmoid else 1.0 - probabilities(wanted)[-1]
        p, q = probabilities(wanted / temperature), probabilities(scores / temperature)
        count += foreground
        cls += (p * np.log(p / q)).sum()
        bbox += foreground * np.abs(boxes - wanted_boxes).sum()
    return cls * temperature**2 / max(count, 1.0), bbox / max(count, 1.0)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_head(sigmoid, temperature):
    classes, levels = 3, [(2, 4, 5), (3, 2, 1)]  # priors a position, height, width

    def outputs(seed):
        return tuple(
            [randn(2, anchors * size, height, width, seed=seed + 10 * number + size)
             for number, (anchors, height, width) in enumerate(levels)]
            for size in (classes, 4)
        )  # fmt: skip

    student, teacher = outputs(0), outputs(100)
    found = head_losses(student, teacher, classes, sigmoid, temperature)
    cls, bbox = by_hand(student, teacher, classes, sigmoid, temperature)
    assert float(found["cls"]) == pytest.approx(cls, rel=1e-9)
    assert float(found["bbox"]) == pytest.approx(bbox, rel=1e-9)
    assert all(
        float(loss) == pytest.approx(0.0, abs=1e-12) for loss in head_losses(student, student, 3, sigmoid).values()
    )


def test_priors_that_are_background_count_little():
    """Where the teacher sees nothing, boxes are not compared; and the count is never below one."""
    background = torch.tensor([-20.0, -20.0, 20.0]).view(1, 3, 1, 1).repeat(1, 1, 4, 4)
    found = head_losses(([background], [torch.ones(1, 4, 4, 4)]), ([background], [torch.zeros(1, 4, 4, 4)]), 3)
    assert float(found["bbox"]) == pytest.approx(0.0, abs=1e-6)
    assert float(found["cls"]) == pytest.approx(0.0, abs=1e-6)
