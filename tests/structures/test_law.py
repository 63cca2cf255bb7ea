"""The one law on random networks and random decisions, with plan, shapes and MACs."""

import math

import torch
from graph.channel_law import assert_law, random_stage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_mm.graph import trace
from prune_mm.structures.plan import Plan, count_macs

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def norm(kind, width):
    if kind == "gn":
        return nn.GroupNorm(2 if width % 2 == 0 else 1, width)
    return nn.BatchNorm2d(width) if kind == "bn" else nn.Identity()


class Unit(nn.Module):
    """conv, norm, activation."""

    def __init__(self, width_in, width, kind, kernel=3, groups=1, act=nn.ReLU):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, padding=kernel // 2, groups=groups, bias=kind != "bn")
        self.norm, self.act = norm(kind, width), act()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Block(nn.Module):
    """One of the usual building blocks, chosen by ``shape``; its output has ``width`` channels."""

    def __init__(self, shape, width_in, width, hidden, kind):
        super().__init__()
        self.shape = shape
        if shape == "plain":
            self.a = Unit(width_in, width, kind)
        elif shape in ("residual", "residual_gate"):
            self.a = Unit(width_in, hidden, kind)
            self.b = Unit(hidden, width, kind, act=nn.Identity)
            same = width_in == width and shape == "residual"
            self.down = nn.Identity() if same else Unit(width_in, width, kind, kernel=1, act=nn.Identity)
            self.squeeze, self.excite = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)
        elif shape == "concat":
            self.a, self.b = Unit(width_in, hidden, kind), Unit(width_in, 3, kind, act=nn.Sigmoid)
            self.out = Unit(hidden + 3 + width_in, width, kind, kernel=1)
        elif shape == "depthwise":
            self.a = Unit(width_in, hidden, kind, kernel=1)
            self.b = Unit(hidden, hidden, kind, groups=hidden, act=nn.Hardswish)
            self.out = Unit(hidden, width, kind, kernel=1, act=nn.Identity)
        elif shape == "grouped":
            self.a, self.b = Unit(width_in, 6, kind, kernel=1), Unit(6, 12, kind, groups=3)
            self.out = Unit(12, width, kind, kernel=1)
        else:  # shared
            self.a, self.b = Unit(width_in, hidden, kind), Unit(width_in, hidden, kind)
            self.out = Unit(hidden, width, kind)

    def forward(self, x):
        if self.shape == "plain":
            return self.a(x)
        if self.shape == "residual":
            return torch.relu(self.b(self.a(x)) + self.down(x))
        if self.shape == "residual_gate":
            y = self.b(self.a(x))
            gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
            return self.down(x) + y * gate
        if self.shape == "concat":
            return self.out(torch.cat([self.a(x), x, self.b(x)], 1))
        if self.shape in ("depthwise", "grouped"):
            return self.out(self.b(self.a(x)))
        return self.out(self.a(x)) + self.out(self.b(x))


class Network(nn.Module):
    """A few blocks and a linear head."""

    def __init__(self, spec, flatten):
        super().__init__()
        blocks, width_in = [], 3
        for shape, width, hidden, kind in spec:
            blocks.append(Block(shape, width_in, width, hidden, kind))
            width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(2 if flatten else 1)
        self.head = nn.Linear(width_in * (4 if flatten else 1), 5)

    def forward(self, x):
        return self.head(self.pool(self.blocks(x)).flatten(1))


SHAPES = ["plain", "residual", "residual_gate", "concat", "depthwise", "grouped", "shared"]
BLOCKS = st.tuples(
    st.sampled_from(SHAPES), st.sampled_from([4, 6]), st.sampled_from([3, 8]), st.sampled_from(["bn", "gn", "none"])
)
NETWORKS = st.tuples(st.lists(BLOCKS, min_size=1, max_size=4), st.booleans(), st.integers(0, 1000))


def build(drawn):
    spec, flatten, seed = drawn
    torch.manual_seed(seed)
    return Network(spec, flatten), seed


@torch.no_grad()
def macs_by_running(module, x):
    """Multiply-adds counted with hooks, and at how many positions every weight was applied."""
    total, positions = 0, {}

    def hook(name):
        def count(layer, args, output):
            nonlocal total
            weight = layer.weight
            places = output.numel() // weight.shape[0]
            total += weight.numel() * places
            positions[f"{name}.weight"] = positions.get(f"{name}.weight", 0) + places

        return count

    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    # A scattered projection has wide outputs, but only its rows cost anything: hooks in front of the scatter.
    handles = [m.register_forward_hook(hook(n), prepend=True) for n, m in layers]
    module(x)
    for handle in handles:
        handle.remove()
    return total, positions


@SETTINGS
@given(NETWORKS)
def test_masked_equals_compact_and_costs_what_was_foretold(drawn):
    net, seed = build(drawn)
    x = torch.randn(2, 3, 7, 6)
    graph = trace(net, x[:1])
    assert graph.prunable, graph.why_not()
    assert not any("fixes its width" in line for line in graph.why_not()), "the rules alone must be exact here"
    stage = random_stage(graph, seed)
    compact = assert_law(net, stage, (x,), seed)
    dense_macs, positions = macs_by_running(net.eval(), x)
    compact_macs, _ = macs_by_running(compact, x)
    dense = {name: tuple(p.shape) for name, p in net.named_parameters()}
    shapes = Plan("", (stage,)).shapes(dense)
    assert count_macs(dense, positions) == dense_macs
    assert count_macs(shapes, positions) == compact_macs
    assert sum(math.prod(shape) for shape in shapes.values()) == sum(p.numel() for p in compact.parameters())


@SETTINGS
@given(NETWORKS, st.booleans(), st.booleans())
def test_groups_or_shortcuts_alone(drawn, groups, shortcuts):
    net, seed = build(drawn)
    x = torch.randn(1, 3, 7, 6)
    graph = trace(net, x, verify=False)
    assert_law(net, random_stage(graph, seed, groups, shortcuts), (x,), seed)


@settings(SETTINGS, max_examples=15)
@given(NETWORKS)
def test_two_stages_and_training_of_the_compact_form(drawn):
    """The compact form is a network like any other: it can be traced, cut again and trained."""
    net, seed = build(drawn)
    x = torch.randn(1, 3, 7, 6)
    first = random_stage(trace(net, x), seed, shortcuts=False)
    once = assert_law(net, first, (x,), seed)
    again = trace(once, x)
    if not again.prunable:
        return
    second = random_stage(again, seed + 1, shortcuts=False)
    plan = Plan.from_json(Plan("", (first, second)).to_json())
    twice = plan.compact(build(drawn)[0])
    dense = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert {name: tuple(p.shape) for name, p in twice.named_parameters()} == plan.shapes(dense)
    twice = assert_law(once, second, (x,), seed)
    twice.train()
    twice(torch.randn(4, 3, 7, 6)).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in twice.parameters())


def test_plan_of_a_submodule():
    net, _ = build(([("plain", 4, 3, "bn"), ("residual", 6, 8, "bn")], False, 0))
    model = nn.Module()
    model.inner = net
    x = torch.randn(1, 3, 7, 6)
    stage = random_stage(trace(net.blocks, x), 3)
    plan = Plan("inner.blocks", (stage,))
    plan.apply_masks(model)
    net.eval()
    with torch.no_grad():
        expected = net(x)
        plan.compact(model)
        assert torch.allclose(net(x), expected, atol=1e-5)


def test_shortcut_whose_rows_all_leave_the_sum():
    """No live row of the projection is left: a single row of zeros stays."""
    from prune_mm.structures import ChannelSlice, ShortcutSlice

    net, _ = build(([("plain", 4, 3, "bn"), ("residual", 6, 8, "bn")], False, 0))
    x = torch.randn(2, 3, 7, 6)
    graph = trace(net, x)
    (cut,) = graph.shortcuts
    group = graph[cut.layer]
    even = torch.arange(6) % 2 == 0
    stage = (
        ChannelSlice.from_mask(group.name, even, group.slots),
        ShortcutSlice.from_shortcut(cut.layer, ~even, cut.slots, cut.end),
    )
    compact = assert_law(net, stage, (x,))
    assert compact.blocks[1].down.conv.weight.shape[0] == 1
    dense = Plan("", (stage,)).compact(net)
    assert float(dense.blocks[1].down.conv.weight.detach().abs().max()) == 0, (
        "also when the weights were not masked before"
    )


def test_producers_side_by_side_of_which_one_dies():
    """A gate over a concatenation ties both branches; when all channels of one are dead, one stays as zeros."""
    from prune_mm.structures import ChannelSlice

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.gate, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            y = torch.cat([self.a(x), self.b(x)], 1)
            return self.out(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())

    torch.manual_seed(0)
    net, x = Gated(), torch.randn(2, 3, 7, 6)
    graph = trace(net, x)
    (group,) = graph.prunable
    assert group.channels == 8
    stage = (ChannelSlice.from_mask(group.name, torch.arange(8) >= 5, group.slots),)
    compact = assert_law(net, stage, (x,))
    assert (compact.a.out_channels, compact.b.out_channels, compact.out.in_channels) == (1, 3, 4)
    net.eval()
    masked = Plan("", (stage,))
    with torch.no_grad():
        again = masked.compact(net)
    assert float(again.a.weight.detach().abs().max()) == 0, "also when the weights were not masked before"
