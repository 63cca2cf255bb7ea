"""CompactGroupNorm computes what a GroupNorm computes whose dead channels are zero."""

import pytest
import torch
from torch import nn

from prune_mm.structures import ChannelSlice, Plan, Slot
from prune_mm.structures.group_norm import CompactGroupNorm

MASKS = {
    "even": [1, 0, 1, 0, 1, 0, 1, 0],
    "uneven": [1, 1, 1, 1, 0, 0, 0, 1],
    "a group that lost all": [0, 0, 1, 1, 0, 1, 1, 0],
    "one channel": [0, 0, 0, 0, 0, 1, 0, 0],
}


def norm_and_input(mask, groups=4, dtype=torch.float64):
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, 8).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        norm.weight.mul_(mask.to(dtype))
        norm.bias.mul_(mask.to(dtype))
    x = torch.randn(3, 8, 4, 5, dtype=dtype) * mask.view(1, 8, 1, 1)
    return norm, x.to(dtype)


def slots(bias=True):
    every = tuple(range(8))
    return (Slot("0.weight", 0, every, "scale"), *([Slot("0.bias", 0, every, "shift")] if bias else []))


def compacted(norm, mask):
    model = nn.Sequential(norm)
    Plan("", ((ChannelSlice.from_mask("0", mask, slots(norm.bias is not None)),),)).compact(model)
    return model[0]


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("name", MASKS)
def test_value_and_gradients_in_double_precision(name, groups):
    mask = torch.tensor(MASKS[name], dtype=torch.bool)
    norm, x = norm_and_input(mask, groups)
    wide = x.clone().requires_grad_()
    narrow = x[:, mask].clone().requires_grad_()
    expected = norm(wide)
    target = torch.randn_like(expected)
    (expected * target).sum().backward()
    weight_gradient, bias_gradient = norm.weight.grad[mask], norm.bias.grad[mask]
    compact = compacted(norm, mask)
    assert isinstance(compact, CompactGroupNorm)
    found = compact(narrow)
    torch.testing.assert_close(found, expected[:, mask], rtol=1e-10, atol=1e-12)
    assert float(expected[:, ~mask].detach().abs().sum()) == 0
    (found * target[:, mask]).sum().backward()
    torch.testing.assert_close(narrow.grad, wide.grad[:, mask], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(compact.weight.grad, weight_gradient, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(compact.bias.grad, bias_gradient, rtol=1e-8, atol=1e-10)


def test_gradcheck():
    mask = torch.tensor(MASKS["uneven"], dtype=torch.bool)
    norm, x = norm_and_input(mask)
    compact = compacted(norm, mask)
    assert torch.autograd.gradcheck(compact, (x[:1, mask, :2, :2].clone().requires_grad_(),))


def test_cut_twice_equals_cut_once():
    mask = torch.tensor(MASKS["uneven"], dtype=torch.bool)
    norm, x = norm_and_input(mask)
    with torch.no_grad():
        expected = norm(x)
        first = torch.tensor([1, 1, 1, 1, 1, 0, 0, 1], dtype=torch.bool)
        model = nn.Sequential(compacted(norm, first))
        rest = mask[first]
        own = tuple(range(6))
        pieces = (Slot("0.weight", 0, own, "scale"), Slot("0.bias", 0, own, "shift"))
        Plan("", ((ChannelSlice.from_mask("0", rest, pieces),),)).compact(model)
        torch.testing.assert_close(model(x[:, mask]), expected[:, mask], rtol=1e-10, atol=1e-12)


def test_without_bias_and_frozen():
    mask = torch.tensor(MASKS["even"], dtype=torch.bool)
    norm, x = norm_and_input(mask)
    norm.register_parameter("bias", None)
    norm.weight.requires_grad_(False)
    with torch.no_grad():
        expected = norm(x)[:, mask]
    compact = compacted(norm, mask)
    assert compact.bias is None
    assert not compact.weight.requires_grad
    torch.testing.assert_close(compact(x[:, mask]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 2, 3, 4)])
def test_any_number_of_positions(shape):
    mask = torch.tensor(MASKS["uneven"], dtype=torch.bool)
    norm, _ = norm_and_input(mask)
    x = torch.randn(shape, dtype=torch.float64) * mask.view(1, 8, *[1] * (len(shape) - 2))
    with torch.no_grad():
        expected = norm(x)[:, mask]
        torch.testing.assert_close(compacted(norm, mask)(x[:, mask]), expected, rtol=1e-10, atol=1e-12)


def test_a_norm_with_two_names_is_replaced_in_both():
    mask = torch.tensor(MASKS["even"], dtype=torch.bool)
    norm, _ = norm_and_input(mask)
    model = nn.Sequential(norm, norm)
    Plan("", ((ChannelSlice.from_mask("0", mask, slots()),),)).compact(model)
    assert model[0] is model[1]
    assert isinstance(model[1], CompactGroupNorm)


def test_no_cut_keeps_the_module():
    norm = nn.GroupNorm(4, 8)
    assert compacted(norm, torch.ones(8, dtype=torch.bool)) is norm


def test_keys_of_the_state_and_printing():
    mask = torch.tensor(MASKS["uneven"], dtype=torch.bool)
    norm, _ = norm_and_input(mask)
    compact = compacted(norm, mask)
    assert set(compact.state_dict()) == {"weight", "bias"}
    assert "4, 5 of 8" in repr(compact)
