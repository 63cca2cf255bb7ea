"""mmcv's public operators, on torchvision, against formulas written out here."""

import copy
import importlib
import pickle
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from prune_mm.compat import install_mmcv_ops

if not install_mmcv_ops():
    pytest.skip("mmcv is absent, or has its own compiled operators", allow_module_level=True)

import mmcv.ops as ops
from mmcv.ops.deform_conv import deform_conv2d
from mmcv.ops.modulated_deform_conv import modulated_deform_conv2d
from mmcv.utils import ext_loader

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


# --- the module


def test_install_is_idempotent_and_binds_the_submodule():
    import mmcv

    before = sys.modules["mmcv._ext"]
    assert install_mmcv_ops()
    assert sys.modules["mmcv._ext"] is before is mmcv._ext


def test_compiled_module_already_loaded_is_left_alone(monkeypatch):
    compiled = ModuleType("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    assert not install_mmcv_ops()
    assert sys.modules["mmcv._ext"] is compiled


def test_compiled_module_on_disk_wins(monkeypatch, tmp_path):
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in [name for name in sys.modules if name.split(".")[0] == "mmcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert install_mmcv_ops()  # no _ext there yet
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    (package / "_ext.py").write_text("")
    importlib.invalidate_caches()  # the finder caches directories by modification time
    assert not install_mmcv_ops()
    assert "mmcv._ext" not in sys.modules


def test_no_mmcv_at_all(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv", None)
    assert not install_mmcv_ops()
    assert "mmcv._ext" not in sys.modules


def test_missing_operator_raises_only_when_called():
    module = ext_loader.load_ext("_ext", ["psamask_forward"])
    with pytest.raises(NotImplementedError, match=r"psamask_forward.*MMCV_WITH_OPS"):
        module.psamask_forward(1, two=2)
    with pytest.raises(NotImplementedError, match="box_iou_rotated"):
        ops.box_iou_rotated(torch.rand(1, 5), torch.rand(1, 5))


def test_dunder_names_behave_as_in_any_module():
    module = sys.modules["mmcv._ext"]
    for name in ("__file__", "__path__", "__wrapped__", "__deepcopy__", "_private"):
        assert not hasattr(module, name)
    assert "nms" in dir(module)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(module)
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(module)


def test_versions_say_that_nothing_was_compiled():
    assert "not compiled" in ops.get_compiler_version()
    assert "not compiled" in ops.get_compiling_cuda_version()
    assert ext_loader.check_ops_exist()


def test_fresh_process_is_cheap_until_mmcv_asks():
    code = (
        "import sys; import prune_mm.compat.mmcv_ext as c; heavy = 'mmcv' in sys.modules; "
        "assert c.install_mmcv_ops() and heavy == ('mmcv' in sys.modules); "
        "import mmcv.ops, mmdet.models; assert mmcv._ext is sys.modules['mmcv._ext']; "
        "from mmdet.registry import MODELS; "
        "assert MODELS.get('MaskRCNN') and MODELS.get('SSDHead'); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("ok"), done.stderr


# --- boxes


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


# --- region pooling


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


# --- deformable convolution


def shift_map(x, dy, dx):
    """y[i, j] = x[i + dy, j + dx], zero outside."""
    return F.pad(x, (-min(dx, 0), max(dx, 0), -min(dy, 0), max(dy, 0)))[
        :, :, max(dy, 0) : max(dy, 0) + x.shape[2], max(dx, 0) : max(dx, 0) + x.shape[3]
    ]


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups", "deform_groups"),
    [(1, 1, 1, 1, 1), (2, (1, 0), 1, 2, 1), (1, 2, 2, 4, 2), ((1, 2), 1, 1, 1, 4)],
)
def test_deform_conv_without_offset_is_convolution(stride, padding, dilation, groups, deform_groups):
    layer = ops.DeformConv2d(4, 8, 3, stride, padding, dilation, groups, deform_groups)
    x = torch.rand(2, 4, 9, 7)
    expected = F.conv2d(x, layer.weight, None, stride, padding, dilation, groups)
    offset = torch.zeros(2, 18 * deform_groups, *expected.shape[2:])
    torch.testing.assert_close(layer(x, offset), expected)


def test_deform_conv_integer_offset_is_a_shift():
    layer = ops.DeformConv2d(3, 5, 1)
    x = torch.rand(1, 3, 6, 6)
    offset = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 6, 6).contiguous()  # (y, x)
    torch.testing.assert_close(layer(x, offset), F.conv2d(shift_map(x, 1, -2), layer.weight))


def test_deform_groups_shift_their_own_channels():
    layer = ops.DeformConv2d(4, 5, 1, deform_groups=2)
    x = torch.rand(1, 4, 6, 6)
    offset = torch.tensor([0.0, 1.0, -1.0, 0.0]).view(1, 4, 1, 1).expand(1, 4, 6, 6).contiguous()
    moved = torch.cat([shift_map(x[:, :2], 0, 1), shift_map(x[:, 2:], -1, 0)], dim=1)
    torch.testing.assert_close(layer(x, offset), F.conv2d(moved, layer.weight))


def test_deform_conv_backward():
    x = torch.rand(2, 4, 4, 4, dtype=DOUBLE, requires_grad=True)
    # kept off whole numbers, where bilinear interpolation has a kink
    offset = (torch.rand(2, 16, 5, 3, dtype=DOUBLE) * 0.8 + 0.1).requires_grad_()
    weight = torch.rand(2, 2, 2, 2, dtype=DOUBLE, requires_grad=True)

    def run(x, offset, weight):
        return deform_conv2d(x, offset, weight, 1, (1, 0), 1, 2, 2)

    assert torch.autograd.gradcheck(run, (x, offset, weight), fast_mode=True)


def test_weight_gradient_of_deform_conv_accumulates_with_scale():
    ext = sys.modules["mmcv._ext"]
    x, weight, upstream = torch.rand(1, 2, 4, 4), torch.zeros(3, 2, 1, 1), torch.rand(1, 3, 4, 4)
    buffer = torch.ones_like(weight)
    geometry = {"kW": 1, "kH": 1, "dW": 1, "dH": 1, "padW": 0, "padH": 0, "dilationW": 1, "dilationH": 1}
    ext.deform_conv_backward_parameters(
        x, torch.zeros(1, 2, 4, 4), upstream, buffer, x.new_empty(0), x.new_empty(0),
        **geometry, group=1, deformable_group=1, scale=0.5, im2col_step=1,
    )  # fmt: skip
    expected = 1 + 0.5 * torch.einsum("nohw,nihw->oi", upstream, x)
    torch.testing.assert_close(buffer[:, :, 0, 0], expected)


def test_fresh_dcnv2_is_half_a_convolution():
    layer = ops.ModulatedDeformConv2dPack(4, 6, 3, stride=2, padding=1, groups=2, deform_groups=2)
    torch.nn.init.uniform_(layer.bias)
    x = torch.rand(2, 4, 8, 8)
    expected = F.conv2d(x, layer.weight * 0.5, layer.bias, 2, 1, 1, 2)  # offsets 0, mask sigmoid(0)
    torch.testing.assert_close(layer(x), expected)
    layer.bias = None
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight * 0.5, None, 2, 1, 1, 2))


@pytest.mark.parametrize("with_bias", [True, False])
def test_dcnv2_backward(with_bias):
    shapes = [(2, 2, 4, 4), (2, 8, 3, 3), (2, 4, 3, 3), (3, 2, 2, 2)] + [(3,)] * with_bias
    tensors = [(torch.rand(shape, dtype=DOUBLE) * 0.8 + 0.1).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(modulated_deform_conv2d, tensors, fast_mode=True)


def test_dcnv2_under_autocast_trains():
    layer = ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    x = torch.rand(1, 4, 6, 6)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 36.0))


def test_dispatcher_sees_deform_conv():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        ops.DeformConv2d(2, 2, 1)(torch.rand(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    assert "torchvision::deform_conv2d" in seen


# --- the rest


@pytest.mark.parametrize("gamma", [2.0, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(gamma, weighted):
    logits = torch.randn(7, 4, dtype=DOUBLE, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 4, 1])  # 4 is the background
    weight = torch.rand(4, dtype=DOUBLE) if weighted else None
    one_hot = F.one_hot(target, 5)[:, :4].to(DOUBLE)
    p = logits.sigmoid()
    alpha = 0.3
    expected = -alpha * (1 - p) ** gamma * p.log() * one_hot
    expected = expected - (1 - alpha) * p**gamma * (1 - p).log() * (1 - one_hot)
    if weighted:
        expected = expected * torch.cat([weight, torch.ones(1, dtype=DOUBLE)])[target][:, None]
    out = ops.sigmoid_focal_loss(logits, target, gamma, alpha, weight, "none")
    torch.testing.assert_close(out, expected)
    upstream = torch.rand_like(out)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), logits)
    (got,) = torch.autograd.grad((out * upstream).sum(), logits)
    torch.testing.assert_close(got, wanted)
    mean = ops.sigmoid_focal_loss(logits, target, gamma, alpha, weight, "mean")
    torch.testing.assert_close(mean, expected.sum() / 7)


def test_sigmoid_focal_loss_is_finite_at_saturation():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    ops.sigmoid_focal_loss(logits, torch.tensor([0]), 0.5, 0.25, None, "sum").backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def test_masked_conv_computes_only_where_the_mask_is():
    layer = ops.MaskedConv2d(3, 4, 3, padding=1)
    x, mask = torch.rand(1, 3, 6, 5), torch.rand(1, 6, 5) > 0.5
    torch.testing.assert_close(layer(x, mask), layer(x) * mask)


def test_deformable_attention_forward_and_backward():
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    shapes, starts = torch.tensor([[2, 3]]), torch.tensor([0])
    value = torch.rand(1, 6, 1, 2, dtype=DOUBLE, requires_grad=True)
    # one query at the centre of cell (1, 2), the last key
    location = torch.tensor([2.5 / 3, 1.5 / 2], dtype=DOUBLE).view(1, 1, 1, 1, 1, 2)
    weight = torch.full((1, 1, 1, 1, 1), 0.25, dtype=DOUBLE)
    out = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, location, weight, 64)
    torch.testing.assert_close(out, 0.25 * value[:, 5])
    location = (location * 0.7).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, p, w: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, p, w, 64),
        (value, location, weight.requires_grad_()),
    )


def test_nan_offsets_give_nan_instead_of_a_crash():
    conv = ops.DeformConv2d(2, 3, 3, padding=1)
    x, offset = torch.randn(1, 2, 4, 4), torch.full((1, 18, 4, 4), float("nan"))
    assert conv(x, offset).isnan().all()
