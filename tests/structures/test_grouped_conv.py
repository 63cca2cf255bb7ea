"""GroupedConv on single layers: a dense convolution with zeros equals gather, grouped convolution, gather."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_mm.structures import GroupedConv, Plan
from prune_mm.structures.grouped_conv import arrange, common_divisors
from prune_mm.structures.plan import count_macs

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def random_structure(conv, groups, seed=0, name=""):
    """A random division of each group of ``conv`` into ``groups``."""
    generator = torch.Generator().manual_seed(seed)
    perms = []
    for count in (conv.out_channels, conv.in_channels):
        width = count // conv.groups
        parts = [base * width + torch.randperm(width, generator=generator) for base in range(conv.groups)]
        perms.append(torch.cat(parts))
    return GroupedConv.from_perms(name, conv.groups * groups, *perms, base=conv.groups)


def forms(conv, structure, rows=None):
    """Masked and compact copies, the compact one through JSON."""
    plan = Plan("", ((structure,),))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    masked = copy.deepcopy(conv)
    plan.apply_masks(masked)
    compact = again.compact(copy.deepcopy(conv))
    shapes = plan.shapes({name: tuple(p.shape) for name, p in conv.named_parameters()})
    assert shapes == {name: tuple(p.shape) for name, p in compact.named_parameters()}
    return masked, compact


def assert_same(conv, structure, x, tolerance=2e-6):
    masked, compact = forms(conv, structure)
    want, got = masked(x).detach(), compact(x).detach()
    assert want.shape == got.shape
    assert float((want - got).abs().max()) <= tolerance * (1 + float(want.abs().max()))
    return masked, compact


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base", [1, 2])
def test_dimensions_bias_and_groups(dims, bias, base):
    torch.manual_seed(0)
    conv = CONVS[dims](8, 12, 3, padding=1, bias=bias, groups=base)
    masked, compact = assert_same(conv, random_structure(conv, 2), torch.randn(2, 8, *[5] * dims))
    assert type(compact) is CONVS[dims]
    assert compact.groups == 2 * base
    assert compact.weight.shape == (12, 8 // (2 * base), *[3] * dims)
    assert int((masked.weight == 0).sum()) == masked.weight.numel() // 2


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (2, 1), "padding": (0, 2)},
        {"dilation": 2, "padding": 2},
        {"kernel_size": (1, 5), "padding": "same"},
        {"padding": "valid"},
        {"padding": 2, "padding_mode": "zeros"},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": (1, 2), "padding_mode": "replicate"},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
    ],
    ids=str,
)
def test_options_of_a_convolution(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 9, **{"kernel_size": 3, **options})
    assert_same(conv, random_structure(conv, 3), torch.randn(2, 6, 7, 8))


@pytest.mark.parametrize(
    ("outputs", "inputs", "base", "groups"),
    [
        (6, 6, 1, 6),
        (3, 12, 1, 3),
        (35, 10, 1, 5),
        (4, 4, 4, 1),
        (14, 21, 7, 1),
        (12, 18, 2, 3),
        (24, 12, 3, 4),
        (1, 1, 1, 1),
    ],
)
def test_numbers_of_channels_and_groups(outputs, inputs, base, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, 1, groups=base)
    _, compact = assert_same(conv, random_structure(conv, groups), torch.randn(3, inputs, 4, 5))
    assert compact.weight.shape[1] == inputs // (base * groups)


def test_unbatched_channels_last_and_no_images():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3)
    structure = random_structure(conv, 2)
    assert_same(conv, structure, torch.randn(6, 5, 5))
    assert_same(conv, structure, torch.randn(3, 6, 5, 7).to(memory_format=torch.channels_last))
    assert_same(conv.to(memory_format=torch.channels_last), structure, torch.randn(2, 5, 5, 6).permute(0, 3, 1, 2))
    assert_same(conv, structure, torch.randn(2, 12, 5, 5)[:, ::2])
    assert forms(conv, structure)[1](torch.randn(0, 6, 5, 5)).shape == (0, 4, 3, 3)
    line = nn.Conv1d(6, 4, 3)
    assert_same(line, random_structure(line, 2), torch.randn(6, 9))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_layer_and_decision_in_double_precision(data):
    """Double precision leaves no room for a wrong channel; the weights and buffers keep the precision, too."""
    dims, base, groups = (data.draw(st.integers(1, high)) for high in (3, 3, 4))
    outputs, inputs = (base * groups * data.draw(st.integers(1, 3)) for _ in range(2))
    padding, stride, kernel = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    conv = CONVS[dims](inputs, outputs, kernel, stride, padding, groups=base, bias=data.draw(st.booleans())).double()
    structure = random_structure(conv, groups, data.draw(st.integers(0, 99)))
    x = torch.randn(data.draw(st.integers(1, 3)), inputs, *[4] * dims, dtype=torch.float64)
    _, compact = assert_same(conv, structure, x, 1e-13)
    assert compact.weight.dtype == torch.float64


def test_order_inside_a_block_and_of_blocks_does_not_matter():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3)
    one = GroupedConv.from_perms("", 2, [0, 2, 4, 6, 1, 3, 5, 7], range(8))
    two = GroupedConv.from_perms("", 2, [7, 5, 3, 1, 6, 4, 2, 0], [7, 6, 5, 4, 3, 2, 1, 0])
    assert torch.equal(one.mask(), two.mask())
    assert torch.equal(forms(conv, one)[1].weight, forms(conv, two)[1].weight)
    assert two.gathers() == 1, "inputs lie block by block already"


def test_layers_that_need_no_gather_have_none():
    conv = nn.Conv2d(4, 6, 1)
    for out_perm, in_perm, gathers in (
        ([2, 0, 1, 5, 4, 3], [1, 0, 2, 3], ()),
        ([5, 4, 3, 0, 1, 2], [2, 3, 0, 1], ()),
        ([0, 1, 2, 3, 4, 5], [2, 3, 0, 1], ("gather_in",)),
        ([0, 1, 2, 3, 5, 4], [0, 2, 1, 3], ("gather_in",)),
        ([0, 2, 4, 1, 3, 5], [0, 1, 2, 3], ("gather_out",)),
        ([0, 2, 4, 1, 3, 5], [0, 2, 1, 3], ("gather_in", "gather_out")),
    ):
        structure = GroupedConv.from_perms("", 2, out_perm, in_perm)
        assert structure.gathers() == len(gathers)
        _, compact = assert_same(conv, structure, torch.randn(2, 4, 3, 3))
        assert tuple(name for name, _ in compact.named_buffers()) == gathers
        assert len(compact._forward_pre_hooks) + len(compact._forward_hooks) == len(gathers)


def test_the_narrower_side_is_gathered_when_both_could_be():
    blocks = {"out": np.repeat([0, 1], 4), "in": np.repeat([1, 0], 2)}
    narrow_in = arrange(blocks["out"], blocks["in"], 2)
    assert narrow_in.gather_in.tolist() == [2, 3, 0, 1]
    assert narrow_in.gather_out is None
    narrow_out = arrange(blocks["in"], blocks["out"], 2)
    assert narrow_out.gather_in is None
    assert narrow_out.gather_out.tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("base", [1, 2])
def test_gradients_are_those_of_the_masked_layer(base):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=base).double()
    structure = random_structure(conv, 2)
    masked, compact = forms(conv, structure)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, own in zip((masked, compact), inputs):
        layer(own).sin().sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-12)
    # Carry the gradient of the masked layer into the compact shape by cutting it like a weight.
    carrier = copy.deepcopy(conv)
    carrier.weight.data, carrier.bias.data = masked.weight.grad.clone(), masked.bias.grad.clone()
    Plan("", ((structure,),)).compact(carrier)
    assert torch.allclose(compact.weight.grad, carrier.weight, atol=1e-12)
    assert torch.allclose(compact.bias.grad, carrier.bias, atol=1e-12)


def test_training_keeps_both_forms_equal():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1).double()
    structure = random_structure(conv, 3)
    masked, compact = forms(conv, structure)
    steps = [torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.01) for layer in (masked, compact)]
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    for _ in range(3):
        for layer, step in zip((masked, compact), steps):
            step.zero_grad()
            layer(x).sin().sum().backward()
            step.step()
        structure.apply_mask(masked)
    assert torch.allclose(masked(x), compact(x), atol=1e-12)


def test_copies_and_state_of_the_compact_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU())
    net[0].weight.requires_grad_(False)
    plan = Plan("", ((GroupedConv.from_perms("0", 2, [0, 2, 1, 3], [0, 2, 4, 1, 3, 5]),),))
    compact = plan.compact(copy.deepcopy(net))
    assert not compact[0].weight.requires_grad
    assert compact[0].bias.requires_grad
    assert list(compact.state_dict()) == list(net.state_dict()) == ["0.weight", "0.bias"], "gathers are in the plan"
    assert {name for name, _ in compact.named_buffers()} == {"0.gather_in", "0.gather_out"}
    x = torch.randn(2, 6, 5, 5)
    expected = compact(x)
    for again in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact))):
        assert torch.equal(again(x), expected)
        again[0].gather_in.zero_()
    assert torch.equal(compact(x), expected), "copies have buffers of their own"
    fresh = plan.compact(nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU()))
    fresh.load_state_dict(compact.state_dict())
    assert torch.equal(fresh(x), expected)


def test_scripted_copies_export_and_devices():
    """Tracing sees plain index operations; ``meta`` stands for any other device."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3)
    _, compact = forms(conv, random_structure(conv, 2))
    x = torch.randn(2, 6, 5, 5)
    traced = torch.jit.trace(compact, x)
    other = torch.randn(3, 6, 8, 8)
    assert torch.equal(traced(other), compact(other)), "no size is frozen"
    moved = copy.deepcopy(compact).to("meta")
    assert moved.gather_in.is_meta
    assert moved(x.to("meta")).shape == (2, 4, 3, 3)


def test_shapes_parameters_and_macs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 12, 3), nn.Conv2d(12, 8, 1, groups=2))
    stage = (random_structure(net[0], 3, name="0"), random_structure(net[1], 2, name="1"))
    dense = {name: tuple(p.shape) for name, p in net.named_parameters()}
    shapes = Plan("", (stage,)).shapes(dense)
    assert shapes == {"0.weight": (12, 2, 3, 3), "0.bias": (12,), "1.weight": (8, 3, 1, 1), "1.bias": (8,)}
    positions = {"0.weight": 25, "1.weight": 25}
    assert count_macs(dense, positions) == 25 * (12 * 6 * 9 + 8 * 6)
    assert count_macs(shapes, positions) == 25 * (12 * 2 * 9 + 8 * 3)
    compact = Plan("", (stage,)).compact(net)
    assert sum(math.prod(shape) for shape in shapes.values()) == sum(p.numel() for p in compact.parameters())
    assert Plan("", (stage,)).shapes({"1.bias": (8,)}) == {"1.bias": (8,)}


def test_a_plan_of_several_stages_divides_further():
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 24, 3).double()
    first = random_structure(conv, 2)
    once = Plan("", ((first,),)).compact(copy.deepcopy(conv))
    second = random_structure(once, 3, seed=1)
    assert (second.base, second.groups) == (2, 6)
    x = torch.randn(2, 12, 4, 4, dtype=torch.float64)
    masked = copy.deepcopy(once)
    second.apply_mask(masked)
    twice = Plan.from_json(Plan("", ((first,), (second,))).to_json()).compact(copy.deepcopy(conv))
    assert torch.allclose(masked(x), twice(x), atol=1e-13)
    assert twice.weight.shape == (24, 2, 3, 3)
    assert len(twice._forward_pre_hooks) == len(twice._forward_hooks) == 1, "gathers are merged"


def test_json_is_small_and_flat():
    structure = GroupedConv.from_perms("a.b", 2, torch.tensor([1, 0]), np.array([3, 2, 1, 0]))
    (entry,) = json.loads(Plan("", ((structure,),)).to_json())["stages"][0]
    assert entry == {
        "type": "GroupedConv",
        "name": "a.b",
        "groups": 2,
        "base": 1,
        "out_perm": [1, 0],
        "in_perm": [3, 2, 1, 0],
    }


def test_common_divisors():
    assert common_divisors(12, 18) == [1, 2, 3, 6]
    assert common_divisors(7, 3) == [1]
    assert common_divisors(64, 256) == [1, 2, 4, 8, 16, 32, 64]


# -- published numbers ------------------------------------------------------------------------------------------------


def gumi_layer():
    """Specification 13.3: weights, and the groups that the published sorting finds."""
    conv = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False)
    conv.weight.data = torch.from_numpy(np.random.RandomState(0).randn(6, 8, 3, 3).astype(np.float32))
    return conv, GroupedConv.from_perms("", 2, [4, 2, 1, 0, 3, 5], [3, 5, 1, 0, 6, 7, 4, 2])


def test_gumi_layer_of_the_specification():
    conv, structure = gumi_layer()
    rows = ["".join(str(int(kept)) for kept in row) for row in structure.mask()]
    assert rows == ["00101011", "11010100", "11010100", "00101011", "11010100", "00101011"]
    norms = conv.weight.detach().flatten(2).norm(dim=2)
    assert float(norms[structure.mask()].sum() / norms.sum()) == pytest.approx(0.53371978, rel=1e-6)
    x = torch.from_numpy(np.random.RandomState(5).randn(2, 8, 7, 7).astype(np.float32))
    masked, compact = assert_same(conv, structure, x)
    for layer in (masked, compact):
        outputs = layer(x).detach()
        assert float(outputs.sum()) == pytest.approx(149.704837, rel=1e-5)
        assert float(outputs.abs().sum()) == pytest.approx(829.302584, rel=1e-5)
    assert torch.allclose(masked(x), compact(x), rtol=0, atol=2e-6)
    assert compact.weight.shape == (6, 4, 3, 3)
    assert compact.gather_in.tolist() == [0, 1, 3, 5, 2, 4, 6, 7]
    assert compact.gather_out.tolist() == [3, 0, 1, 4, 2, 5]


def test_gumi_parities_of_the_specification():
    """Specification 13.4, 8 x 4: kernels stay where row and column are both even or both odd."""
    conv = nn.Conv2d(4, 8, 3)
    structure = GroupedConv.from_perms("", 2, [0, 2, 4, 6, 1, 3, 5, 7], [0, 2, 1, 3])
    parity = torch.arange(8)[:, None] % 2 == torch.arange(4) % 2
    assert torch.equal(structure.mask(), parity)
    _, compact = forms(conv, structure)
    assert compact.gather_in.tolist() == [0, 2, 1, 3]
    assert compact.gather_out.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(compact.weight[:4], conv.weight[::2, ::2])
    assert torch.equal(compact.weight[4:], conv.weight[1::2, 1::2])


def test_gumi_halves_of_the_specification():
    """Specification 13.4, 32 x 16: off-diagonal blocks; only one side needs a gather, and the narrower one has it."""
    conv = nn.Conv2d(16, 32, 1)
    structure = GroupedConv.from_perms("", 2, [*range(16, 32), *range(16)], range(16))
    assert not structure.mask()[:16, :8].any()
    assert not structure.mask()[16:, 8:].any()
    _, compact = assert_same(conv, structure, torch.randn(1, 16, 2, 2))
    assert compact.gather_in.tolist() == [*range(8, 16), *range(8)]
    assert not hasattr(compact, "gather_out")


@pytest.mark.parametrize("bias", [False, True])
def test_strucspars_layer_of_the_specification(bias):
    """Specification 12.8; and section 6: with a bias, too, which the published code adds in the wrong order."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, bias=bias)
    structure = random_structure(conv, 4)
    masked, compact = assert_same(conv, structure, torch.randn(2, 8, 9, 9), 1e-6)
    assert compact.weight.shape == (16, 2, 3, 3)
    assert int((masked.weight != 0).sum()) == 288
    if bias:
        rows = torch.tensor(structure.arrangement().rows)
        assert not torch.equal(rows, torch.arange(16))
        assert torch.equal(compact.bias, conv.bias[rows])
