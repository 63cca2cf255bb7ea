"""One small network a rule: what is tied, what is frozen, and in which words."""

import pytest
import torch
import torch.nn.functional as F
from channel_law import assert_law_on_random_decisions
from small_nets import Net, X, conv, names, traced
from torch import nn

from prune_mm.graph import trace


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


def test_channel_split_in_two_halves():
    def forward(n, x):
        left, right = n.a(x).chunk(2, 1)
        return n.c(left) + n.d(right)

    graph = traced(forward, a=conv(8, 3), c=conv(2, 4), d=conv(2, 4))
    assert graph["a"].prunable or "split" in graph["a"].frozen


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


def test_masks_of_booleans_move_with_their_channels():
    def forward(n, x):
        y = n.a(x)
        alive = (y > 0).flatten(1)
        return n.b(torch.where(alive.view(y.shape), y, torch.zeros(())))

    assert names(traced(forward, a=conv(6, 3), b=conv(2, 6))) == ["a"]


def test_conv_like_module_without_groups():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_channels, self.out_channels = 6, 5
            self.weight = nn.Parameter(torch.randn(5, 6, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.weight)

    assert names(traced(lambda n, x: n.c(n.b(n.a(x))), a=conv(6, 3), b=Own(), c=conv(2, 5))) == ["a", "b"]
