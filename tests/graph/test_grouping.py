"""Which convolutions can be divided into groups and which channels re-ordered, and why others cannot."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from prune_mm.graph import ConvLayer, trace


class Standardised(nn.Conv2d):
    """Weight standardisation: zeros between groups do not stay zero."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=self.padding)


class Deaf(nn.Conv2d):
    """A forward of its own that does not know of groups."""

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class Shifted(nn.Conv2d):
    """A forward of its own that is as good as the usual one."""

    def forward(self, x):
        return super().forward(x) + super().forward(-x).abs()


class Skipping(nn.Conv2d):
    """Adds its inputs, which the compact form has gathered, to its outputs, which it has not yet put back."""

    def forward(self, x):
        return super().forward(x) + x


class Behind(nn.Module):
    """Convolves with the weight of a child that is never called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(x) + self.b(x)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x


class Sandwich(nn.Module):
    """Something between two plain convolutions."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 8, 1), inner, nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


def traced(inner):
    torch.manual_seed(0)
    module = Sandwich(inner)
    return trace(module, torch.randn(2, 3, 9, 9), grouping=True)


@pytest.mark.parametrize(
    ("make", "layer", "reason"),
    [
        (lambda: Standardised(8, 8, 3, padding=1), "inner", "computed on the fly"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), "inner", "computed on the fly"),
        (lambda: Deaf(8, 8, 3, padding=1), "inner", r"does more than a plain convolution \(.* raises RuntimeError\)"),
        (lambda: Skipping(8, 8, 3, padding=1), "inner", "does more than a plain convolution"),
        (Behind, "inner.conv", "does more than a plain convolution"),
        (Tied, "inner.a", "shares its weight"),
        (Tied, "inner.b", "tied to"),
        (Unused, "inner.conv", "not used in the traced call"),
        (lambda: nn.ConvTranspose2d(8, 8, 2), "inner", "transposed"),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), "inner", "depthwise"),
        (lambda: nn.Sequential(nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1)), "inner.0", "one channel"),
        (lambda: nn.Sequential(nn.Conv2d(8, 9, 1), nn.Conv2d(9, 8, 1)), "inner.0", "9 outputs and 8 inputs have no"),
    ],
)
def test_layers_left_out_with_a_reason(make, layer, reason):
    torch.manual_seed(0)
    graph = traced(make())
    assert re.search(reason, graph.not_groupable[layer]), graph.not_groupable[layer]
    assert "last" in [conv.name for conv in graph.convs], "the others are not harmed"
    assert not {conv.name for conv in graph.convs} & set(graph.not_groupable)


def test_every_convolution_is_accounted_for():
    graph = traced(nn.Sequential(Shifted(8, 8, 1), nn.Conv2d(8, 8, 3, groups=2), Deaf(8, 8, 1), Unused()))
    assert [conv.name for conv in graph.convs] == ["inner.0", "inner.1", "last"]
    assert set(graph.not_groupable) == {"first", "inner.2", "inner.3.conv"}


def test_what_is_known_of_a_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 12, 3), nn.Conv2d(12, 18, (1, 3), groups=2), nn.Conv1d(18, 6, 1))
    net[1].weight.requires_grad_(False)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return net[2](net[1](net[0](x)).flatten(2))

    graph = trace(Net(), torch.randn(1, 4, 9, 9), grouping=True)
    assert graph.convs == [
        ConvLayer("net.0", 12, 4, 1, 9, stem=True, trains=True),
        ConvLayer("net.1", 18, 12, 2, 3, stem=False, trains=False),
        ConvLayer("net.2", 6, 18, 1, 1, stem=False, trains=True),
    ]
    assert (graph.convs[1].rows, graph.convs[1].columns, graph.convs[1].choices()) == (9, 6, [1, 3])
    assert graph.convs[2].choices() == [1, 2, 3, 6]


def test_it_is_only_done_when_asked():
    graph = trace(Sandwich(nn.Identity()), torch.randn(1, 3, 9, 9))
    assert graph.convs is None
    assert graph.orderable == []


def test_frozen_groups_are_never_ordered():
    graph = trace(torchvision.models.resnet18(num_classes=4), torch.randn(1, 3, 64, 64), grouping=True)
    names = [group.name for group in graph.orderable]
    assert names == [group.name for group in graph.prunable]
    assert "fc" not in names
    assert not any(group.frozen for group in graph.orderable)


def test_a_group_norm_keeps_the_order_of_its_channels():
    graph = traced(nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)))
    assert [conv.name for conv in graph.convs] == ["inner.1", "last"]
    assert [group.name for group in graph.orderable] == ["inner.1"]


def test_order_that_the_code_knows():
    """A constant per channel is no parameter that could be permuted along."""

    class Scaled(nn.Module):
        def forward(self, x):
            return x * torch.arange(1.0, 9).view(8, 1, 1)

    graph = traced(nn.Sequential(nn.Conv2d(8, 8, 1), Scaled()))
    assert [group.name for group in graph.orderable] == ["first"]
    assert [conv.name for conv in graph.convs] == ["inner.0", "last"], "dividing changes no order"


def test_producers_side_by_side_are_not_ordered():
    """A gate ties two branches of one channel each; random orders of two channels would often pass by luck."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gate = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1)
            self.out = nn.Conv2d(2, 8, 1)

        def forward(self, x):
            return self.out(torch.cat([self.a(x), self.b(x)], 1) * self.gate(x).sigmoid())

    graph = traced(Gated())
    assert [group.name for group in graph.prunable] == ["first", "inner.a", "inner.out"]
    assert [group.name for group in graph.orderable] == ["first", "inner.out"]


def test_a_module_that_cannot_be_checked():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    graph = traced(Noisy())
    assert graph.convs == graph.orderable == []
    assert "no grouping can be checked" in graph.not_groupable["last"]


def test_the_module_is_left_as_it_was():
    torch.manual_seed(0)
    module = torchvision.models.resnext50_32x4d(num_classes=4).train()
    module.layer1.eval()
    module.layer2.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    attributes = [{k: repr(v) for k, v in vars(child).items() if not k.startswith("_")} for child in module.modules()]
    tensors = [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
    graph = trace(module, torch.randn(1, 3, 64, 64), grouping=True)
    assert len(graph.convs) == 52
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert tensors == [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
    again = [{k: repr(v) for k, v in vars(child).items() if not k.startswith("_")} for child in module.modules()]
    assert attributes == again
    for child in module.modules():
        assert not {**child._forward_hooks, **child._forward_pre_hooks}
        assert not child._non_persistent_buffers_set
        assert not hasattr(child, "gather_in")
    assert all(p.grad is None for p in module.parameters())


def test_the_same_graph_every_time():
    graphs = [traced(nn.Sequential(nn.Conv2d(8, 8, 3), Deaf(8, 8, 1))) for _ in range(2)]
    assert graphs[0].convs == graphs[1].convs
    assert graphs[0].not_groupable == graphs[1].not_groupable
    assert graphs[0].orderable == graphs[1].orderable
