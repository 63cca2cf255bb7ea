"""Folding: masked == compact == compact with folded permutations, with as few gathers as the network allows."""

import copy

import pytest
import torch
import torchvision
from graph.channel_law import assert_law, random_stage, randomised, tensors
from graph.group_law import KINDS, assert_group_law, random_conv, random_convs
from hypothesis import given, settings
from hypothesis import strategies as st
from structures.test_law import NETWORKS, build
from torch import nn

from prune_mm.graph import count_gathers, fold, trace
from prune_mm.structures import ChannelOrder, GroupedConv, Plan

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def drawn_network(drawn):
    """In double precision, where a wrong channel cannot hide behind round-off."""
    net, seed = build(drawn)
    return net.double(), seed, torch.randn(2, 3, 7, 6, dtype=torch.float64)


@SETTINGS
@given(NETWORKS, st.booleans())
def test_random_networks_and_decisions(drawn, mixed):
    net, seed, x = drawn_network(drawn)
    graph = trace(net, x[:1], grouping=True)
    assert not any("does more than" in reason for reason in graph.not_groupable.values())
    assert_group_law(net, graph, random_convs(graph, seed, KINDS if mixed else ("random",)), (x,), seed, 1e-12)


@settings(SETTINGS, max_examples=25)
@given(NETWORKS, st.sampled_from(["divide", "slice"]), st.sampled_from(["divide", "slice"]))
def test_two_stages(drawn, first, second):
    """The compact form is traced and compressed like any other network: divided further, sliced and divided, ..."""
    net, seed, x = drawn_network(drawn)
    net = randomised(net, seed)
    stages, module = [], copy.deepcopy(net)
    for number, kind in enumerate((first, second)):
        graph = trace(module, x[:1], grouping=True)
        if kind == "divide":
            module, stage = assert_group_law(module, graph, random_convs(graph, seed + number), (x,), seed, 1e-12)
        else:
            stage = random_stage(graph, seed + number, shortcuts=number == 0)
            module = assert_law(module, stage, (x,), seed)
        stages.append(tuple(stage))
    plan = Plan.from_json(Plan("", tuple(stages)).to_json())
    compact = plan.compact(copy.deepcopy(net))
    dense = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert plan.shapes(dense) == {name: tuple(p.shape) for name, p in compact.named_parameters()}
    found = compact(x)
    assert found.shape == (2, 5)
    compact.train()
    compact(torch.randn(4, 3, 7, 6, dtype=torch.float64)).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in compact.parameters())


class Chain(nn.Module):
    """conv, norm, activation, conv: the inner channels can be in any order."""

    def __init__(self, inputs=8, inner=12, outputs=8, dense_end=False):
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Conv2d(3, inputs, 1)
        self.a, self.norm, self.act = nn.Conv2d(inputs, inner, 3), nn.BatchNorm2d(inner), nn.PReLU(inner)
        self.b = nn.Conv2d(inner, outputs, 3)
        self.end = nn.Conv2d(outputs, 5, 1) if dense_end else nn.Identity()

    def forward(self, x):
        return self.end(self.b(self.act(self.norm(self.a(self.start(x))))))


def folded(module, convs, x=None):
    """The law on given decisions: gathers of each layer of the folded form."""
    module, x = module.double(), torch.randn(2, 3, 9, 9, dtype=torch.float64) if x is None else x
    graph = trace(module, x[:1], grouping=True)
    compact, stage = assert_group_law(module, graph, convs, (x,), rel=1e-12)
    names = ("gather_in", "gather_out")
    gathers = {c.name: tuple(n for n in names if hasattr(compact.get_submodule(c.name), n)) for c in convs}
    return gathers, stage


INNER = [5, 0, 11, 3, 8, 6, 1, 2, 10, 4, 9, 7]


def test_equal_partitions_need_no_gather_in_between():
    convs = [
        GroupedConv.from_perms("a", 2, INNER, [3, 0, 6, 1, 2, 4, 5, 7]),
        GroupedConv.from_perms("b", 2, [1, 0, 3, 2, 5, 4, 7, 6], [*INNER[5::-1], *INNER[:5:-1]]),
    ]
    gathers, stage = folded(Chain(), convs)
    assert gathers == {"a": (), "b": ()}
    assert [structure.name for structure in stage] == ["start", "a", "a", "b"]


@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (2, 2), (4, 4)])
def test_nested_partitions_need_no_gather_in_between(first, second):
    convs = [
        GroupedConv.from_perms("a", first, INNER, [3, 0, 6, 1, 2, 4, 5, 7]),
        GroupedConv.from_perms("b", second, [3, 0, 6, 1, 2, 4, 5, 7], INNER),
    ]
    gathers, _ = folded(Chain(dense_end=True), convs)
    assert gathers == {"a": (), "b": ()}


def test_differing_partitions_shuffle_once():
    convs = [
        GroupedConv.from_perms("a", 2, range(12), range(8)),
        GroupedConv.from_perms("b", 2, range(8), [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]),
    ]
    gathers, stage = folded(Chain(), convs)
    assert sum(map(len, gathers.values())) == 1
    assert count_gathers(convs) == 1, "as many as there were"
    assert stage == convs, "so nothing moves"


def test_dense_neighbours_absorb_everything():
    """Rows and columns of the layers before and behind take up the permutations of a single divided layer."""
    convs = [GroupedConv.from_perms("b", 4, [3, 0, 6, 1, 2, 4, 5, 7], INNER)]
    gathers, stage = folded(Chain(dense_end=True), convs)
    assert gathers == {"b": ()}
    assert [structure.name for structure in stage if isinstance(structure, ChannelOrder)] == ["a", "b"]


def test_an_output_of_the_scope_keeps_its_order():
    convs = [GroupedConv.from_perms("b", 4, [3, 0, 6, 1, 2, 4, 5, 7], INNER)]
    gathers, stage = folded(Chain(), convs)
    assert gathers == {"b": ("gather_out",)}
    assert [structure.name for structure in stage if isinstance(structure, ChannelOrder)] == ["a"]


def test_blocks_follow_a_side_that_cannot_move():
    """The outputs lie block by block, last block first, and are frozen: the inputs are ordered likewise."""
    convs = [GroupedConv.from_perms("b", 2, [4, 5, 6, 7, 0, 1, 2, 3], [1, 3, 5, 7, 9, 11, 0, 2, 4, 6, 8, 10])]
    gathers, _ = folded(Chain(), convs)
    assert gathers == {"b": ()}


def test_a_linear_layer_behind_a_flatten_absorbs_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 3))
    convs = [GroupedConv.from_perms("1", 2, [0, 2, 4, 6, 1, 3, 5, 7], [0, 2, 1, 3])]
    gathers, stage = folded(net, convs)
    assert gathers == {"1": ()}
    assert len(stage) == 3


class Residual(nn.Module):
    """Two branches that are added: their channels lie in one order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Conv2d(3, 8, 1)
        self.a, self.b, self.end = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.start(x)
        return self.end(self.a(x) + self.b(x))


def test_a_residual_sum_of_differing_partitions_keeps_a_gather():
    """Two layers read one tensor and are added: where their partitions differ, one of them gathers on each side."""
    even, odd = [0, 2, 4, 6, 1, 3, 5, 7], [0, 1, 4, 5, 2, 3, 6, 7]
    same = [GroupedConv.from_perms(name, 2, even, odd) for name in "ab"]
    assert sum(map(len, folded(Residual(), same)[0].values())) == 0
    differing = [GroupedConv.from_perms("a", 2, even, odd), GroupedConv.from_perms("b", 2, odd, even)]
    assert count_gathers(differing) == 4
    assert sum(map(len, folded(Residual(), differing)[0].values())) == 2


def test_readers_of_a_concatenation_are_not_made_worse():
    """Ordering a branch for its producer would cost each of its readers a gather that it does not need yet."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.c, self.d, self.end = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.a(x)
            x = torch.cat([x, self.b(x)], 1)
            return self.end(self.c(x) * self.d(x))

    convs = [GroupedConv.from_perms(name, 4, range(4), range(8)) for name in "cd"]
    convs.append(GroupedConv.from_perms("b", 2, [0, 2, 1, 3], range(4)))
    assert count_gathers(convs) == 1
    gathers, stage = folded(Dense(), convs)
    assert gathers == {"b": ("gather_out",), "c": (), "d": ()}
    assert stage == convs


class Stages(nn.Module):
    """ResNet as a backbone: the sums behind its stages are outputs, so their channels stay as they are."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        net, outputs = self.net, []
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            outputs.append(x)
        return outputs


@pytest.mark.parametrize(("as_backbone", "left"), [(False, 67), (True, 71)])
def test_gathers_left_in_resnet50(as_backbone, left):
    """All 52 convolutions behind the stem in two random groups: each channel group that may be re-ordered saves one."""
    torch.manual_seed(0)
    net = torchvision.models.resnet50(num_classes=10)
    net = Stages(net) if as_backbone else net
    graph = trace(net, torch.randn(1, 3, 64, 64), grouping=True)
    generator = torch.Generator().manual_seed(0)
    convs = [random_conv(layer, generator, groups=2) for layer in graph.convs]
    assert (len(convs), count_gathers(convs)) == (52, 104)
    _, stage = assert_group_law(net, graph, convs, (torch.randn(1, 3, 96, 64),))
    assert count_gathers(stage) == left == 104 - len(graph.orderable)


def test_gathers_left_in_resnet50_when_partitions_agree():
    """Every layer in two groups of even and odd channels: no gather is left."""
    torch.manual_seed(0)
    net = torchvision.models.resnet50(num_classes=10)
    graph = trace(net, torch.randn(1, 3, 64, 64), grouping=True)
    sides = [[*range(0, c, 2), *range(1, c, 2)] for layer in graph.convs for c in (layer.outputs, layer.inputs)]
    convs = [
        GroupedConv.from_perms(layer.name, 2, *perms) for layer, *perms in zip(graph.convs, sides[::2], sides[1::2])
    ]
    _, stage = assert_group_law(net, graph, convs, (torch.randn(1, 3, 64, 64),))
    assert (count_gathers(convs), count_gathers(stage)) == (104, 0)


#: Network: convolutions that can be divided, gathers around random groups of all of them, and how many are left.
FAMILIES = {
    "densenet121": (119, 225, 116),
    "resnext50_32x4d": (52, 92, 87),
    "mobilenet_v3_small": (40, 76, 51),
    "shufflenet_v2_x0_5": (37, 70, 52),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_torchvision(name):
    """Concatenations; groups from the start; depthwise convolutions and gates; shuffles of a fixed width."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None, num_classes=10)
    graph = trace(net, torch.randn(1, 3, 64, 64), grouping=True)
    convs = random_convs(graph, 0)
    _, stage = assert_group_law(net, graph, convs, (torch.randn(1, 3, 96, 64),))
    assert (len(convs), count_gathers(convs), count_gathers(stage)) == FAMILIES[name]


@pytest.mark.parametrize("name", ["res2net", "cspdarknet", "hrnet", "trident", "hourglass", "group norm"])
def test_families_of_mmdetection(name):
    """Splits, cross-stage concatenations, sums of many branches, one weight at three dilations, nested hourglasses."""
    pytest.importorskip("mmdet.models", exc_type=ImportError)
    from graph.test_mmdet_backbones import FREE
    from graph.test_mmdet_backbones import build as build_backbone

    config, size, _ = FREE[name]
    module = build_backbone(config)
    graph = trace(module, torch.randn(1, 3, size, size), grouping=True)
    names = {name for name, child in module.named_modules() if isinstance(child, nn.Conv2d)}
    assert names <= {conv.name for conv in graph.convs} | set(graph.not_groupable)
    _, stage = assert_group_law(module, graph, random_convs(graph, 0), (torch.randn(1, 3, size + 64, size),))
    moved = [structure for structure in stage if isinstance(structure, ChannelOrder)]
    assert bool(moved) == (name != "group norm")


def test_fold_is_repeatable_and_leaves_its_arguments():
    net = Chain(dense_end=True)
    graph = trace(net, torch.randn(1, 3, 9, 9), grouping=True)
    convs = random_convs(graph, 3)
    before = list(convs), list(graph.orderable)
    assert fold(convs, graph.orderable) == fold(tuple(convs), iter(graph.orderable))
    assert (convs, graph.orderable) == before
    assert fold([], graph.orderable) == []
    assert fold(convs, []) == convs


# -- ChannelOrder alone -----------------------------------------------------------------------------------------------


@settings(SETTINGS, max_examples=30)
@given(NETWORKS)
def test_another_order_is_the_same_network(drawn):
    net, seed, x = drawn_network(drawn)
    graph = trace(net, x[:1], grouping=True)
    net, generator = randomised(net, seed), torch.Generator().manual_seed(seed)
    stage = tuple(
        ChannelOrder(group.name, tuple(torch.randperm(group.channels, generator=generator).tolist()), group.slots)
        for group in graph.orderable
    )
    plan = Plan.from_json(Plan("", (stage,)).to_json())
    assert plan == Plan("", (stage,))
    expected = [t.detach() for t in tensors(net(x))]
    dense = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert plan.shapes(dense) == dense
    before = copy.deepcopy(net.state_dict())
    plan.apply_masks(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    plan.compact(net)
    for want, got in zip(expected, tensors(net(x).detach())):
        assert float((want - got).abs().max()) <= 1e-12 * (float(want.abs().max()) + 1e-12)
