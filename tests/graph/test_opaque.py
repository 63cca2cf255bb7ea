"""What tracing cannot follow or check is frozen, and it is said why."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, X, conv, names, traced
from torch import nn

from prune_mm.graph import trace


def test_unknown_operator_is_named():
    graph = traced(lambda n, x: n.b(torch.cumsum(n.a(x), 1)), a=conv(6, 3), b=conv(2, 6))
    assert "'cumsum'" in graph["a"].frozen


def test_mean_over_channels():
    def forward(n, x):
        y = n.a(x)
        return n.b(y * y.mean(1, keepdim=True))

    graph = traced(forward, a=conv(6, 3), b=conv(2, 6))
    assert "reduced over all channels" in graph["a"].frozen


def test_minimum_with_a_constant_does_not_keep_zero():
    """min(0, -0.5) is not 0, so the group norm behind it would see dead channels."""
    floor = nn.Parameter(torch.tensor(-0.5))

    def forward(n, x):
        return n.b(n.norm(torch.minimum(n.a(x), n.floor)))

    graph = traced(forward, a=conv(6, 3), floor=floor, norm=nn.GroupNorm(2, 6), b=conv(2, 6))
    assert "not zero" in graph["a"].frozen


class ThroughNumpy(torch.autograd.Function):
    """A kernel that no dispatcher sees."""

    @staticmethod
    def forward(ctx, x, weight):
        return torch.from_numpy(np.einsum("nchw,oc->nohw", x.numpy(), weight.detach().numpy()))


class IntoBuffer(torch.autograd.Function):
    """As compiled mmcv operators do: the result is written into an empty buffer."""

    @staticmethod
    def forward(ctx, x, weight):
        output = x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])
        output.numpy()[:] = np.einsum("nchw,oc->nohw", x.numpy(), weight.detach().numpy())
        return output


class Visible(torch.autograd.Function):
    """Made of ordinary operators: nothing is hidden."""

    @staticmethod
    def forward(ctx, x, weight):
        return F.conv2d(x, weight[:, :, None, None])


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.function = function

    def forward(self, x):
        return self.function.apply(x, self.weight)


@pytest.mark.parametrize("function", [ThroughNumpy, IntoBuffer])
def test_invisible_kernel_freezes_what_it_reads(function):
    graph = traced(
        lambda n, x: n.c(F.relu(n.b(n.custom(n.a(x))))),
        a=conv(6, 3),
        custom=Custom(function),
        b=conv(4, 5),
        c=conv(2, 4),
    )
    assert names(graph) == ["b"]
    assert "cannot see" in graph["a"].frozen
    assert "cannot see" in graph.unprunable["custom"]


def test_weight_computed_on_the_fly():
    graph = traced(lambda n, x: n.c(n.custom(n.a(x))), a=conv(6, 3), custom=Custom(Visible), c=conv(2, 5))
    assert "computed on the fly" in graph["a"].frozen
    assert "computed on the fly" in graph.unprunable["custom"]


def test_weight_standardisation_is_frozen():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            return self._conv_forward(x, w - w.mean((1, 2, 3), keepdim=True), self.bias)

    graph = traced(lambda n, x: n.c(n.b(n.a(x))), a=conv(6, 3), b=Standardised(6, 4, 3, padding=1), c=conv(2, 4))
    assert names(graph) == []
    assert "computed on the fly" in graph.unprunable["b"]


@pytest.mark.parametrize("operation", ["copy", "fill", "add"])
def test_in_place_write_into_a_slice(operation):
    def forward(n, x):
        y, z = n.a(x), n.b(x)
        if operation == "copy":
            y[:, :3] = z
        elif operation == "fill":
            y[:, :3] = 0
        else:
            y[:, :3] += z
        return n.c(y)

    graph = traced(forward, a=conv(6, 3), b=conv(3, 3), c=conv(2, 6))
    assert "a" not in names(graph)
    assert "in place" in graph["a"].frozen or "fixes its width" in graph["a"].frozen


def test_in_place_write_into_an_empty_tensor():
    def forward(n, x):
        y = x.new_zeros(1, 6, 8, 8) if x.shape[0] == 1 else x.new_zeros(2, 6, 8, 8)
        y[:, :3] = n.a(x)
        y[:, 3:] = n.b(x)
        return n.c(y)

    graph = traced(forward, a=conv(3, 3), b=conv(3, 3), c=conv(2, 6))
    assert "in place" in graph["a"].frozen


def test_hard_coded_width():
    graph = traced(
        lambda n, x: n.c(F.relu(n.b(n.a(x).view(-1, 2, 3, 8, 8).flatten(1, 2)))),
        a=conv(6, 3),
        b=conv(5, 6),
        c=conv(2, 5),
    )
    assert names(graph) == ["b"]
    assert graph["a"].frozen.startswith("the code fixes its width (view")


def test_constant_as_wide_as_the_channels():
    constant = torch.randn(1, 6, 8, 8)
    graph = traced(lambda n, x: n.b(n.a(x) + constant), a=conv(6, 3), b=conv(2, 6))
    assert "fixed width" in graph["a"].frozen


def test_index_that_comes_from_channels():
    def forward(n, x):
        y = n.a(x)
        return n.b(y)[:, :, (y.mean((1, 2, 3)) > 0).long()]

    graph = traced(forward, a=conv(6, 3), b=conv(2, 6))
    assert "a" not in names(graph)


@pytest.mark.parametrize(
    "outer", [lambda a, b: a.unsqueeze(1) + b.unsqueeze(2), lambda a, b: a[:, None] * b[:, :, None]]
)
def test_channels_that_meet_along_other_axes(outer):
    def forward(n, x):
        return outer(n.a(x).mean((2, 3)), n.b(x).mean((2, 3)))

    graph = traced(forward, a=conv(4, 3), b=conv(5, 3))
    assert names(graph) == []


def test_several_inputs_and_errors():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(4, 3), conv(2, 4)

        def forward(self, x, y):
            return self.b(self.a(x) + self.a(y))

    assert names(trace(Two(), (X, X))) == ["a"]
    with pytest.raises(TypeError, match="example_inputs must hold a tensor, got str"):
        trace(nn.Identity(), "no tensor")
    with pytest.raises(TypeError, match="must return tensors, got NoneType"):
        trace(Net(lambda n, x: None), X)


def test_printing_says_what_and_why():
    graph = traced(lambda n, x: n.b(torch.cumsum(n.a(x), 1)), a=conv(6, 3), b=conv(2, 6), spare=conv(4, 4))
    text = str(graph)
    assert "2 channel groups, 0 prunable (0 channels), 0 shortcut projections" in text
    assert "a: 6 channels, FROZEN: passes through the operator 'cumsum', which has no rule, stem" in text
    assert "spare: not prunable: not used in the traced call" in text
    with pytest.raises(KeyError, match="no channel group is made by 'spare'"):
        graph["spare"]


def test_names_on_the_stack_after_an_error():
    net = Net(lambda n, x: n.a(x[:, :2]), a=conv(6, 3))
    with pytest.raises(RuntimeError):
        trace(net, X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_what_cannot_be_checked_is_frozen():
    dice = Net(lambda n, x: n.b(n.a(x)) + torch.rand(()), a=conv(6, 3), b=conv(2, 6))
    assert "computes something else at every call" in trace(dice, X)["a"].frozen
    broken = Net(lambda n, x: n.b(n.a(x)) / 0.0, a=conv(6, 3), b=conv(2, 6))
    assert "not finite" in trace(broken, X)["a"].frozen


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30, 1e-30])
def test_weights_that_are_not_initialised_yet_hide_nothing(garbage):
    net = Net(lambda n, x: n.b(n.a(x)), a=conv(6, 3), b=conv(2, 6))
    nn.init.constant_(net.a.weight, garbage)
    assert trace(net, X)["a"].prunable
