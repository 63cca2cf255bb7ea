"""GroupedConv of impossible decisions, and plans for another network, are refused."""

import copy

import pytest
import torch
from torch import nn

from prune_mm.structures import ChannelOrder, ChannelSlice, GroupedConv, Plan, Slot


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, [0, 1], [0, 0]), "GroupedConv 'a': in_perm must hold every index below its length, 2, once"),
        ((2, [0, 2], [0, 1]), "out_perm must hold every index below its length, 2, once"),
        ((2, [], [0, 1]), "out_perm must hold every index"),
        ((2, torch.tensor([0.5, 1.0]), [0, 1]), "out_perm must be a list of integers"),
        ((2, [0, 1, 2], [0, 1]), "3 channels of out_perm are not divisible by groups=2"),
        ((2, [0, 1], [0, 1, 2]), "3 channels of in_perm are not divisible by groups=2"),
        ((3, [0, 1], [0, 1], 2), "groups=3 must be a multiple of the 2 groups it has"),
        ((2, [0, 2, 1, 3], range(4), 2), "out_perm moves channels between the 2 groups the layer has"),
        ((2, range(4), [2, 3, 0, 1], 2), "in_perm moves channels between the 2 groups the layer has"),
        ((0, [0, 1], [0, 1]), "groups must be an integer in 1..16777216, got 0"),
        ((2.0, [0, 1], [0, 1]), "groups must be an integer"),
        ((2, [0, 1], [0, 1], 0), "base must be an integer"),
    ],
)
def test_impossible_decisions(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupedConv.from_perms("a", *arguments)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.head = nn.Linear(8, 2)


GOOD = GroupedConv.from_perms("conv", 2, range(8), [0, 2, 1, 3])
EIGHT = GroupedConv.from_perms("", 2, range(8), range(8))


def renamed(structure, name):
    return GroupedConv(name, structure.groups, structure.base, structure.out_perm, structure.in_perm)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (renamed(GOOD, "gone"), "the network has no module 'gone'"),
        (renamed(GOOD, "conv.weight"), "the network has no module 'conv.weight'"),
        (renamed(EIGHT, "norm"), "'norm' is a BatchNorm2d, the plan expects a convolution"),
        (renamed(EIGHT, "up"), "'up' is a ConvTranspose2d, the plan expects a convolution"),
        (renamed(EIGHT, "head"), "'head' is a Linear, the plan expects a convolution"),
        (renamed(EIGHT, ""), "'' is a Model, the plan expects a convolution"),
        (renamed(EIGHT, "conv"), r"'conv' has \(outputs, inputs, groups\) \(8, 4, 1\), the plan expects \(8, 8, 1\)"),
        (GroupedConv.from_perms("conv", 2, range(8), range(4), 2), r"\(8, 4, 1\), the plan expects \(8, 4, 2\)"),
    ],
)
@pytest.mark.parametrize("act", ["compact", "apply_masks"])
def test_another_network_is_left_as_it_was(structure, message, act):
    model = Model()
    before = copy.deepcopy(model.state_dict())
    # Beside one that fits, where they do not contradict each other.
    beside = act == "compact" and structure.name != "conv"
    plan = Plan("", ((GOOD, structure) if beside else (structure,),))
    with pytest.raises(ValueError, match=message):
        getattr(plan, act)(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.conv.groups == 1
    assert not model.conv._forward_pre_hooks


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            ChannelSlice("conv", (0, 1), 8, (Slot("conv.weight", 0, tuple(range(8)), "out"),)),
            "'conv.weight' is changed by several structures of one stage",
        ),
        (
            ChannelSlice("x", (0, 1), 4, (Slot("conv.weight", 1, tuple(range(4)), "in"),)),
            "'conv.weight' is changed by several structures of one stage",
        ),
        (
            ChannelOrder("x", (1, 0, 2), (Slot("conv.weight", 1, (0, 1, 2), "in"),)),
            r"'conv.weight' has shape \(8, 4, 3, 3\), the plan expects 3 along axis 1",
        ),
        (ChannelOrder("x", (1, 0), (Slot("lost.weight", 0, (0, 1), "in"),)), "no tensor 'lost.weight'"),
    ],
)
def test_stages_that_contradict_themselves(other, message):
    model = Model()
    before = copy.deepcopy(model.state_dict())
    for stage in ((GOOD, other), (other, GOOD)):
        with pytest.raises(ValueError, match=message):
            Plan("", (stage,)).compact(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shapes_of_another_network():
    for found in ((8, 5, 3, 3), (9, 4, 3, 3), (8,), ()):
        with pytest.raises(ValueError, match=r"'conv.weight' has shape .*, the plan expects it to begin with \(8, 4\)"):
            Plan("", ((GOOD,),)).shapes({"conv.weight": found})
