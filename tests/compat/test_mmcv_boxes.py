"""mmcv's operators on boxes, on torchvision, against suppression and overlap in plain Python."""

import numpy as np
import pytest
import torch
from mmcv_operators import DOUBLE, ops


def random_boxes(count, size=20.0, dtype=torch.float32):
    corner = torch.rand(count, 2, dtype=dtype) * size
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, dtype=dtype) * size / 2], dim=1)


def iou(a, b, offset=0, mode="iou"):
    """Overlap of two boxes given as lists, in plain Python."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return width * height / (areas[0] if mode == "iof" else sum(areas) - width * height)


def greedy_nms(boxes, scores, threshold, offset=0):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    for i in order:
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_is_greedy_suppression(offset):
    boxes, scores = random_boxes(60), torch.rand(60)
    dets, kept = ops.nms(boxes, scores, 0.3, offset=offset)
    assert kept.tolist() == greedy_nms(boxes.tolist(), scores.tolist(), 0.3, offset)
    assert 1 < len(kept) < 60
    torch.testing.assert_close(dets, torch.cat([boxes, scores[:, None]], 1)[kept])


def test_nms_offset_changes_the_result():
    boxes = torch.tensor([[0.0, 0, 1, 1], [1, 0, 2, 1]])  # as inclusive pixels they share one column of two
    scores = torch.tensor([0.9, 0.8])
    assert len(ops.nms(boxes, scores, 0.3, offset=0)[1]) == 2
    assert len(ops.nms(boxes, scores, 0.3, offset=1)[1]) == 1


def test_nms_of_nothing_half_and_numpy():
    assert len(ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)[1]) == 0
    boxes, scores = random_boxes(20), torch.rand(20)
    kept = ops.nms(boxes.half(), scores.half(), 0.5)[1]
    expected = greedy_nms(boxes.half().tolist(), scores.half().tolist(), 0.5)
    assert kept.tolist() == expected
    array = ops.nms(boxes.numpy(), scores.numpy(), 0.5, score_threshold=0.2, max_num=3)[1]
    above = [i for i in greedy_nms(boxes.tolist(), scores.tolist(), 0.5) if scores[i] > 0.2]
    assert isinstance(array, np.ndarray)
    assert array.tolist() == above[:3]


def test_batched_nms_keeps_classes_apart():
    boxes, scores, labels = random_boxes(40), torch.rand(40), torch.arange(40) % 3
    dets, kept = ops.batched_nms(boxes, scores, labels, {"type": "nms", "iou_threshold": 0.3})
    expected = []
    for label in range(3):
        index = (labels == label).nonzero().flatten()
        expected += index[greedy_nms(boxes[index].tolist(), scores[index].tolist(), 0.3)].tolist()
    assert sorted(kept.tolist()) == sorted(expected)
    torch.testing.assert_close(dets[:, :4], boxes[kept])
    assert (dets[:-1, 4] >= dets[1:, 4]).all()


def slow_soft_nms(boxes, scores, threshold, sigma, min_score, method):
    alive, kept = dict(enumerate(scores)), []
    while alive:
        best = max(alive, key=alive.get)
        kept.append((best, alive.pop(best)))
        for i in list(alive):
            overlap = iou(boxes[best], boxes[i])
            if method == "gaussian":
                alive[i] *= float(np.exp(-(overlap**2) / sigma))
            elif overlap >= threshold:
                alive[i] *= (1 - overlap) if method == "linear" else 0.0
            if alive[i] < min_score:
                del alive[i]
    return kept


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_decays_scores(method):
    boxes, scores = random_boxes(30), torch.rand(30)
    dets, kept = ops.soft_nms(boxes, scores, 0.3, sigma=0.5, min_score=0.05, method=method)
    expected = slow_soft_nms(boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.05, method)
    assert kept.tolist() == [index for index, _ in expected]
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]))
    torch.testing.assert_close(dets[:, :4], boxes[kept])
    assert 1 < len(kept) < 30


def test_soft_nms_of_boxes_without_area():
    boxes = torch.tensor([[3.0, 1, 3, 1]] * 3)
    dets, _ = ops.soft_nms(boxes, torch.tensor([0.9, 0.5, 0.0]), 0.6, method="gaussian")
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.5]))
    assert len(ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))[1]) == 0


def test_nms_match_groups_suppressed_boxes_with_their_survivor():
    dets = torch.tensor([[0.0, 0, 9, 9, 0.5], [0, 0, 10, 10, 0.9], [50, 50, 60, 60, 0.7], [1, 1, 10, 10, 0.6]])
    groups = [group.tolist() for group in ops.nms_match(dets, 0.5)]
    assert groups == [[1, 3, 0], [2]]


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("offset", [0, 1])
def test_bbox_overlaps(mode, offset):
    a, b = random_boxes(5, dtype=DOUBLE), random_boxes(5, dtype=DOUBLE)
    expected = torch.tensor([[iou(x, y, offset, mode) for y in b.tolist()] for x in a.tolist()], dtype=DOUBLE)
    torch.testing.assert_close(ops.bbox_overlaps(a, b[:3], mode, offset=offset), expected[:, :3])
    torch.testing.assert_close(ops.bbox_overlaps(a, b, mode, aligned=True, offset=offset), expected.diagonal())
