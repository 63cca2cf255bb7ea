"""One small network a rule: what is tied, what is frozen, and in which words."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from channel_law import assert_every_layer_is_accounted_for, assert_law_on_random_decisions
from torch import nn

from prune_mm.graph import trace

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers by name and a forward function."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def conv(rows, columns, kernel=3, **kwargs):
    return nn.Conv2d(columns, rows, kernel, padding=kernel // 2, **kwargs)


def traced(forward, x=X, **layers):
    """Trace, check that every layer is accounted for and that the law holds, return the graph."""
    torch.manual_seed(0)
    net = Net(forward, **layers)
    graph = trace(net, x)
    assert_every_layer_is_accounted_for(net, graph)
    assert_law_on_random_decisions(net, graph, (torch.randn(2, *x.shape[1:]),))
    return graph


def names(graph):
    return [group.name for group in graph.prunable]


def test_chain_of_two():
    graph = traced(lambda n, x: n.b(F.relu(n.a(x))), a=conv(6, 3), b=conv(4, 6))
    assert names(graph) == ["a"]
    assert [(s.role, s.tensor, s.axis) for s in graph["a"].slots] == [
        ("out", "a.weight", 0),
        ("bias", "a.bias", 0),
        ("in", "b.weight", 1),
    ]
    assert graph["b"].frozen == "output of the traced scope"
    assert graph["a"].stem


def test_cat_keeps_groups_apart():
    graph = traced(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 1)), a=conv(4, 3), b=conv(5, 3), c=conv(2, 9))
    assert names(graph) == ["a", "b"]
    assert graph["b"].slots[-1].channels == (-1,) * 4 + (0, 1, 2, 3, 4)


def test_cat_with_the_input():
    graph = traced(lambda n, x: n.c(torch.cat([x, n.a(x)], 1)), a=conv(4, 3), c=conv(2, 7))
    assert names(graph) == ["a"]


def test_add_couples():
    graph = traced(
        lambda n, x: n.d(n.a(x) + n.c(F.relu(n.b(x)))), a=conv(4, 3), b=conv(5, 3), c=conv(4, 5), d=conv(2, 4)
    )
    assert names(graph) == ["a", "b"]
    assert graph["a"].producers == ("a", "c")
    assert graph["a"].coupled
    assert graph["a"].ties == ("add at the top",)


def test_squeeze_and_excitation_gates_but_does_not_couple():
    def forward(n, x):
        y = n.a(x)
        gate = torch.sigmoid(n.up(F.relu(n.down(y.mean((2, 3), keepdim=True)))))
        return n.out(y * gate)

    graph = traced(forward, a=conv(8, 3), down=conv(4, 8, 1), up=conv(8, 4, 1), out=conv(2, 8))
    assert names(graph) == ["a", "down"]
    assert graph["a"].producers == ("a", "up")
    assert not graph["a"].coupled


def test_gate_of_one_channel_over_all():
    def forward(n, x):
        y = n.a(x)
        return n.out(y * torch.sigmoid(n.gate(y)))

    graph = traced(forward, a=conv(6, 3), gate=conv(1, 6, 1), out=conv(2, 6))
    assert names(graph) == ["a"]
    assert "broadcast over other channels" in graph["gate"].frozen


def test_depthwise():
    graph = traced(lambda n, x: n.c(F.relu6(n.b(n.a(x)))), a=conv(6, 3, 1), b=conv(6, 6, groups=6), c=conv(2, 6))
    assert names(graph) == ["a"]
    assert [s.tensor for s in graph["a"].slots if s.role == "depthwise"] == ["b.weight"]


def test_depthwise_with_a_multiplier():
    graph = traced(lambda n, x: n.c(n.b(n.a(x))), a=conv(4, 3), b=conv(12, 4, groups=4), c=conv(2, 12))
    assert graph["a"].channels == 4
    assert names(graph) == ["a"]


def test_depthwise_over_the_input_is_left_alone():
    graph = traced(lambda n, x: n.b(n.a(x)), a=conv(3, 3, groups=3), b=conv(2, 3))
    assert names(graph) == []
    assert "makes the channels" in graph.unprunable["a"]


@pytest.mark.parametrize("per_group", [1, 2, 4])
def test_grouped_conv_stays_balanced(per_group):
    width = 3 * per_group
    graph = traced(lambda n, x: n.c(F.relu(n.b(n.a(x)))), a=conv(width, 3), b=conv(12, width, groups=3), c=conv(2, 12))
    if per_group > 1:
        assert graph["a"].channels == per_group
        assert graph["b"].channels == 4
    assert names(graph)


def test_grouped_conv_cut_to_one_channel_per_group_is_not_depthwise():
    """The input columns may be cut before the rows: the layer must not be taken for depthwise in between."""
    from channel_law import assert_law

    from prune_mm.structures import ChannelSlice

    torch.manual_seed(0)
    net = Net(lambda n, x: n.c(n.b(n.a(x))), a=conv(8, 3), b=conv(16, 8, groups=4), c=conv(2, 16))
    graph = trace(net, X)
    first, second = torch.tensor([True, False]), torch.tensor([True, False, True, False])
    stage = tuple(ChannelSlice.from_mask(n, m, graph[n].slots) for n, m in (("a", first), ("b", second)))
    compact = assert_law(net, stage, (X,))
    assert (compact.b.groups, compact.b.in_channels, compact.b.out_channels) == (4, 4, 8)


def test_shared_conv_unites_both_uses():
    def forward(n, x):
        return n.out(n.shared(n.a(x)) + n.shared(n.b(x)))

    graph = traced(forward, a=conv(4, 3), b=conv(4, 3), shared=conv(6, 4), out=conv(2, 6))
    assert graph["a"].producers == ("a", "b")
    assert names(graph) == ["a", "shared"]


def test_module_under_two_names_is_one_module():
    layer = conv(4, 4)
    graph = traced(lambda n, x: n.out(n.c(n.b(n.a(x)))), a=conv(4, 3), b=layer, c=layer, out=conv(2, 4))
    assert names(graph) == ["a"]


def test_tied_weights_are_frozen():
    a, b, c = conv(4, 3, bias=False), conv(4, 4, bias=False), conv(4, 4, bias=False)
    c.weight = b.weight
    graph = traced(lambda n, x: n.out(n.c(F.relu(n.b(n.a(x))))), a=a, b=b, c=c, out=conv(2, 4))
    assert names(graph) == []
    assert any("tied to 'c.weight'" in line for line in graph.why_not())


def test_layer_scale():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(6, 3), conv(2, 6)
            self.gamma = nn.Parameter(torch.full((6,), 1e-6))

        def forward(self, x):
            return self.b(self.a(x) * self.gamma.view(1, -1, 1, 1))

    net = Scaled()
    graph = trace(net, X)
    assert names(graph) == ["a"]
    assert [s.tensor for s in graph["a"].slots if s.role == "scale"] == ["gamma"]
    assert_law_on_random_decisions(net, graph, (X,))


@pytest.mark.parametrize("act", [torch.sigmoid, F.hardsigmoid, lambda x: x + 1, lambda x: torch.exp(x)])
def test_dead_channels_that_are_not_zero_reach_a_conv(act):
    """The columns of the reader are masked, so sigmoid(0) = 0.5 does not matter."""
    assert names(traced(lambda n, x: n.b(act(n.a(x))), a=conv(6, 3), b=conv(2, 6))) == ["a"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_padding_beside_the_channels(value):
    graph = traced(lambda n, x: n.b(F.pad(n.a(x), (1, 2, 0, 1), value=value)), a=conv(6, 3), b=conv(2, 6))
    assert names(graph) == ["a"]


def test_padding_of_the_channel_axis():
    """ResNet's parameter-free shortcut: constant channels meet those of the branch."""

    def forward(n, x):
        y = n.a(x)
        return n.out(F.pad(y, (0, 0, 0, 0, 2, 2)) + n.c(n.b(y)))

    graph = traced(forward, a=conv(4, 3), b=conv(5, 4), c=conv(8, 5), out=conv(2, 8))
    assert "b" in names(graph)
    assert "c" not in names(graph)


def test_flatten_to_linear():
    graph = traced(lambda n, x: n.fc(n.a(x).flatten(1)), a=conv(5, 3), fc=nn.Linear(5 * 64, 7))
    assert names(graph) == ["a"]
    assert len(graph["a"].slots[-1].channels) == 320


def test_tokens_and_mlp():
    def forward(n, x):
        tokens = n.a(x).flatten(2).transpose(1, 2)
        return n.down(F.gelu(n.up(tokens)))

    graph = traced(forward, a=conv(6, 3), up=nn.Linear(6, 12), down=nn.Linear(12, 4))
    assert names(graph) == ["a", "up"]


def test_linear_over_positions_lets_channels_through():
    def forward(n, x):
        return n.b(n.mix(n.a(x).flatten(2)).unsqueeze(3))

    graph = traced(forward, a=conv(6, 3), mix=nn.Linear(64, 5, bias=False), b=conv(2, 6, 1))
    assert names(graph) == ["a"]
    assert "positions" in graph.unprunable["mix"]


def test_group_norm_and_what_must_be_zero_before_it():
    graph = traced(lambda n, x: n.b(F.relu(n.norm(n.a(x)))), a=conv(6, 3), norm=nn.GroupNorm(2, 6), b=conv(2, 6))
    assert names(graph) == ["a"]
    graph = traced(lambda n, x: n.b(n.norm(torch.sigmoid(n.a(x)))), a=conv(6, 3), norm=nn.GroupNorm(2, 6), b=conv(2, 6))
    assert "not zero" in graph["a"].frozen


def test_zero_is_lost_in_every_view_of_the_memory():
    def forward(n, x):
        y = n.a(x)
        y.view(-1).sigmoid_()
        return n.b(n.norm(y))

    graph = traced(forward, a=conv(6, 3), norm=nn.GroupNorm(2, 6), b=conv(2, 6))
    assert "not zero" in graph["a"].frozen


def test_group_norm_without_affine_is_frozen():
    norm = nn.GroupNorm(2, 6, affine=False)
    graph = traced(lambda n, x: n.b(n.norm(n.a(x))), a=conv(6, 3), norm=norm, b=conv(2, 6))
    assert "without affine" in graph["a"].frozen


@pytest.mark.filterwarnings("ignore:input's size")
@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm(affine):
    norm = nn.InstanceNorm2d(6, affine=affine)
    graph = traced(lambda n, x: n.b(n.norm(n.a(x))), a=conv(6, 3), norm=norm, b=conv(2, 6))
    assert graph["a"].prunable or "computed parameters" in graph["a"].frozen


@pytest.mark.parametrize("kwargs", [{"affine": False}, {"track_running_stats": False}, {}])
def test_batch_norm_variants(kwargs):
    norm = nn.BatchNorm2d(6, **kwargs)
    assert names(traced(lambda n, x: n.b(n.norm(n.a(x))), a=conv(6, 3), norm=norm, b=conv(2, 6))) == ["a"]


def test_norm_used_for_two_branches():
    def forward(n, x):
        return n.out(torch.cat([n.norm(n.a(x)), n.norm(n.b(x))], 1))

    graph = traced(forward, a=conv(4, 3), b=conv(4, 3), norm=nn.BatchNorm2d(4), out=conv(2, 8))
    assert graph["a"].producers == ("a", "b")


def test_layer_norm_over_channels():
    def forward(n, x):
        return n.b(n.norm(n.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    graph = traced(forward, a=conv(6, 3), norm=nn.LayerNorm(6), b=conv(2, 6))
    assert "layer norm" in graph["a"].frozen


def test_prelu():
    graph = traced(lambda n, x: n.b(n.act(n.a(x))), a=conv(6, 3), act=nn.PReLU(6), b=conv(2, 6))
    assert names(graph) == ["a"]
    assert "act.weight" in {slot.tensor for slot in graph["a"].slots}


def test_transposed_conv():
    up = nn.ConvTranspose2d(6, 5, 2, 2)
    assert names(traced(lambda n, x: n.b(n.up(n.a(x))), a=conv(6, 3), up=up, b=conv(2, 5))) == ["a", "up"]


def test_transposed_conv_with_groups_is_frozen():
    up = nn.ConvTranspose2d(6, 4, 2, 2, groups=2)
    graph = traced(lambda n, x: n.b(n.up(n.a(x))), a=conv(6, 3), up=up, b=conv(2, 4))
    assert names(graph) == []
    assert "transposed" in graph["a"].frozen


def test_depthwise_transposed_conv():
    up = nn.ConvTranspose2d(6, 6, 2, 2, groups=6)
    assert names(traced(lambda n, x: n.b(n.up(n.a(x))), a=conv(6, 3), up=up, b=conv(2, 6))) == ["a"]


def test_product_of_activations():
    def forward(n, x):
        q, k = n.a(x).flatten(2), n.b(x).flatten(2)
        return torch.bmm(q, k.transpose(1, 2))

    graph = traced(forward, a=conv(4, 3), b=conv(5, 3))
    assert "product of two activations" in graph["a"].frozen


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


def test_channel_split_in_two_halves():
    def forward(n, x):
        left, right = n.a(x).chunk(2, 1)
        return n.c(left) + n.d(right)

    graph = traced(forward, a=conv(8, 3), c=conv(2, 4), d=conv(2, 4))
    assert graph["a"].prunable or "split" in graph["a"].frozen


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


def test_frozen_parameters_are_traced():
    a = conv(6, 3)
    a.requires_grad_(False)
    assert names(traced(lambda n, x: n.b(n.a(x)), a=a, b=conv(2, 6))) == ["a"]


class Result:
    """A result object as detectors return them."""

    def __init__(self, boxes):
        self.boxes = {"xyxy": [boxes]}
        self.me = self


@pytest.mark.parametrize(
    "wrap", [lambda y: {"y": [y]}, lambda y: (y, {"again": y}), lambda y: (None, Result(y), "text")]
)
def test_outputs_in_containers_and_objects(wrap):
    net = Net(lambda n, x: wrap(n.b(n.a(x))), a=conv(6, 3), b=conv(2, 6))
    graph = trace(net, X)
    assert names(graph) == ["a"]
    assert graph["b"].frozen == "output of the traced scope"


def test_the_same_group_returned_twice():
    def forward(n, x):
        y = n.b(n.a(x))
        return y, F.relu(y), y[:, :1]

    graph = traced(forward, a=conv(6, 3), b=conv(2, 6))
    assert names(graph) == ["a"]


def test_layer_that_is_not_called():
    graph = traced(lambda n, x: n.b(n.a(x)), a=conv(6, 3), b=conv(2, 6), spare=conv(4, 4))
    assert graph.unprunable == {"spare": "not used in the traced call"}


def test_index_that_comes_from_channels():
    def forward(n, x):
        y = n.a(x)
        return n.b(y)[:, :, (y.mean((1, 2, 3)) > 0).long()]

    graph = traced(forward, a=conv(6, 3), b=conv(2, 6))
    assert "a" not in names(graph)


def test_masks_of_booleans_move_with_their_channels():
    def forward(n, x):
        y = n.a(x)
        alive = (y > 0).flatten(1)
        return n.b(torch.where(alive.view(y.shape), y, torch.zeros(())))

    assert names(traced(forward, a=conv(6, 3), b=conv(2, 6))) == ["a"]


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


def test_conv_like_module_without_groups():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_channels, self.out_channels = 6, 5
            self.weight = nn.Parameter(torch.randn(5, 6, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.weight)

    assert names(traced(lambda n, x: n.c(n.b(n.a(x))), a=conv(6, 3), b=Own(), c=conv(2, 5))) == ["a", "b"]
