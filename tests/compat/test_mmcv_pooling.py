"""mmcv's pooling of regions, on torchvision, against bilinear samples in plain Python."""

import pytest
import torch
import torch.nn.functional as F
from mmcv_operators import DOUBLE, ops


def bilinear(plane, y, x):
    height, width = plane.shape
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    return float(
        (1 - dy) * ((1 - dx) * plane[top, left] + dx * plane[top, right])
        + dy * ((1 - dx) * plane[bottom, left] + dx * plane[bottom, right])
    )


def slow_roi_align(features, roi, size, scale, samples, aligned):
    """One region, samples x samples bilinear points a bin (the region stays inside the map)."""
    shift = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (float(v) * scale - shift for v in roi[1:])
    step_y, step_x = (y2 - y1) / size, (x2 - x1) / size
    out = torch.zeros(features.shape[1], size, size, dtype=DOUBLE)
    for c in range(features.shape[1]):
        for i in range(size * samples):
            for j in range(size * samples):
                value = bilinear(
                    features[int(roi[0]), c],
                    y1 + step_y * (i + 0.5) / samples,
                    x1 + step_x * (j + 0.5) / samples,
                )
                out[c, i // samples, j // samples] += value / samples**2
    return out


ROIS = torch.tensor([[0, 2.0, 2.0, 11.0, 13.0], [1, 1.5, 3.0, 9.0, 7.5]], dtype=DOUBLE)


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_samples_bilinearly(aligned):
    features = torch.rand(2, 2, 8, 8, dtype=DOUBLE)
    out = ops.RoIAlign(2, spatial_scale=0.5, sampling_ratio=2, aligned=aligned)(features, ROIS)
    expected = torch.stack([slow_roi_align(features, roi, 2, 0.5, 2, aligned) for roi in ROIS])
    torch.testing.assert_close(out, expected)


def test_roi_align_of_a_constant_map_is_the_constant():
    out = ops.RoIAlign(3, spatial_scale=0.5)(torch.full((2, 1, 8, 8), 7.0), ROIS.float())
    torch.testing.assert_close(out, torch.full((2, 1, 3, 3), 7.0))


def test_roi_align_backward():
    features = torch.rand(2, 1, 6, 6, dtype=DOUBLE, requires_grad=True)
    layer = ops.RoIAlign(2, spatial_scale=0.5, sampling_ratio=2)
    assert torch.autograd.gradcheck(lambda x: layer(x, ROIS), features)


def test_roi_align_without_regions_and_in_half():
    features = torch.rand(2, 1, 6, 6, requires_grad=True)
    ops.RoIAlign(2)(features, torch.zeros(0, 5)).sum().backward()
    assert features.grad.abs().sum() == 0
    half = ops.RoIAlign(2, spatial_scale=0.5)(features.detach().half(), ROIS.half())
    assert half.dtype == torch.float16
    full = ops.RoIAlign(2, spatial_scale=0.5)(features.detach(), ROIS.float())
    torch.testing.assert_close(half.float(), full, atol=2e-3, rtol=2e-3)


def test_roi_align_max_mode_says_what_to_do():
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        ops.RoIAlign(2, pool_mode="max")(torch.rand(2, 1, 8, 8), ROIS.float())


def test_roi_pool_forward_and_backward():
    features = torch.rand(2, 3, 8, 8, dtype=DOUBLE, requires_grad=True)
    rois = torch.tensor([[1, 0, 0, 3, 3], [0, 2, 4, 5, 7], [0, 2, 4, 5, 7]], dtype=DOUBLE)  # inclusive corners
    layer = ops.RoIPool(2)
    windows = torch.stack([features[1, :, :4, :4], features[0, :, 4:, 2:6], features[0, :, 4:, 2:6]])
    expected = F.max_pool2d(windows, 2)
    torch.testing.assert_close(layer(features, rois), expected)
    weights = torch.rand_like(expected)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), features)
    (got,) = torch.autograd.grad((layer(features, rois) * weights).sum(), features)
    torch.testing.assert_close(got, wanted)
