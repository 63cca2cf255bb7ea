"""mmcv's deformable operators, on torchvision, against convolutions of shifted maps."""

import sys

import pytest
import torch
import torch.nn.functional as F
from mmcv_operators import DOUBLE, ops
from torch.utils._python_dispatch import TorchDispatchMode


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
        return ops.deform_conv2d(x, offset, weight, 1, (1, 0), 1, 2, 2)

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
    assert torch.autograd.gradcheck(ops.modulated_deform_conv2d, tensors, fast_mode=True)


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
