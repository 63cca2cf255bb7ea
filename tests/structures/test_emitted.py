"""What removed channels still emit: folded into what reads them, or carried by one channel, exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from graph.channel_law import randomised
from structures.pair_nets import same
from torch import nn

from prune_mm.pruners.hinge_math import init_pair
from prune_mm.structures import ChannelSlice, Slot
from prune_mm.structures.emitted import carry_constant, fold_constant
from prune_mm.structures.pair import attach_pair, set_pair
from prune_mm.structures.plan import compact_stage


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Emitting(nn.Module):
    """A convolution, its norm and activation, and the layer that reads them."""

    def __init__(self, act, consumer, norm=True, follower=True, bias=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=bias)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.act, self.read = act, consumer
        self.follow = nn.BatchNorm2d(4) if follower else nn.Identity()

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = self.read(x if isinstance(self.read, nn.Conv2d) else x.mean((2, 3)))
        return self.follow(x) if x.ndim == 4 else x


REMOVED = torch.tensor([True, False, True, True, False, False])
SLOTS = [Slot("conv.weight", 0, tuple(range(6)), "out"), Slot("read.weight", 1, tuple(range(6)), "in")]
NORM = [Slot(f"norm.{n}", 0, tuple(range(6)), r) for n, r in
        (("weight", "scale"), ("bias", "shift"), ("running_mean", "mean"), ("running_var", "var"))]  # fmt: skip


def emitted(norm, act, bias):
    """What each channel emits in eval mode when its convolution gives zero: act(beta - gamma * mean / sigma)."""
    value = torch.zeros(6).double() if bias is None else bias.double()
    if norm is not None:
        value = nn.functional.batch_norm(
            value.view(1, -1), norm.running_mean.double(), norm.running_var.double(), norm.weight.double(),
            norm.bias.double(), eps=norm.eps,
        ).flatten()  # fmt: skip
    return act.double()(value.view(1, -1, 1, 1)).flatten().detach() if act is not None else value


def silenced(net):
    """Removed filters are zero; the norm is as it was. With what each of them still emits."""
    net = randomised(net, 0)
    net.conv.weight.data[REMOVED] = 0
    norm = net.norm if isinstance(net.norm, nn.BatchNorm2d) else None
    return net, emitted(norm, copy.deepcopy(net.act), net.conv.bias)


def without(net, keep, bias=False):
    """The network without the channels that do not stay."""
    net = copy.deepcopy(net)
    slots = SLOTS + (NORM if isinstance(net.norm, nn.BatchNorm2d) else [])
    slots += [Slot("conv.bias", 0, tuple(range(6)), "bias")] if bias else []
    compact_stage(net, [ChannelSlice.from_mask("conv", keep, slots)])
    return net


class TestConstants:
    ACTS = (nn.ReLU, nn.Identity, nn.Sigmoid, nn.Hardswish, lambda: nn.PReLU(6))

    @pytest.mark.parametrize("act", ACTS)
    def test_what_a_silent_filter_emits(self, act):
        net, constant = silenced(Emitting(act(), nn.Conv2d(6, 4, 1)))
        with torch.no_grad():
            maps = net.act(net.norm(net.conv(torch.randn(2, 3, 7, 7))))
        for channel in REMOVED.nonzero().flatten().tolist():
            assert torch.allclose(maps[:, channel], constant[channel].float(), atol=1e-6)

    @pytest.mark.parametrize(
        "consumer",
        [
            lambda: nn.Conv2d(6, 4, 1),
            lambda: nn.Conv2d(6, 4, 3, bias=False),
            lambda: nn.Conv2d(6, 4, 3, padding="valid"),
            lambda: nn.Conv2d(6, 4, 1, padding="same"),
            lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", bias=False),
            lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate"),
            lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", stride=2),
            lambda: nn.Linear(6, 4),
        ],
    )
    @pytest.mark.parametrize("act", ACTS[:3])
    def test_folded_exactly(self, consumer, act):
        net, constant = silenced(Emitting(act(), consumer()))
        folded = copy.deepcopy(net)
        fold_constant(folded.read, constant, REMOVED, folded.follow)
        x = torch.randn(2, 3, 7, 7)
        assert same(net, without(folded, ~REMOVED), x)
        assert not same(net, without(net, ~REMOVED), x, tolerance=1e-3), "or there is nothing to fold here"
        assert {n: p.shape for n, p in folded.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}

    @pytest.mark.parametrize("bias", [True, False])
    def test_into_a_pair(self, bias):
        net, constant = silenced(Emitting(nn.ReLU(), nn.Conv2d(6, 4, 3, bias=bias)))
        dense = net.read.weight.detach().clone()
        attach_pair(net.read)
        set_pair(net.read, *init_pair(dense))
        folded = copy.deepcopy(net)
        fold_constant(folded.read, constant, REMOVED, folded.follow)
        assert same(net, without(folded, ~REMOVED), torch.randn(2, 3, 7, 7))

    def test_a_bias_without_a_norm(self):
        net, constant = silenced(Emitting(nn.Sigmoid(), nn.Conv2d(6, 4, 1), norm=False, bias=True))
        folded = copy.deepcopy(net)
        fold_constant(folded.read, constant, REMOVED)
        assert same(net, without(folded, ~REMOVED, bias=True), torch.randn(2, 3, 7, 7))

    def test_a_bias_in_front_of_the_norm(self):
        net, constant = silenced(Emitting(nn.ReLU(), nn.Conv2d(6, 4, 1), bias=True))
        folded = copy.deepcopy(net)
        fold_constant(folded.read, constant, REMOVED)
        assert same(net, without(folded, ~REMOVED, bias=True), torch.randn(2, 3, 7, 7))

    @pytest.mark.parametrize("padding", [0, 1, 2, "same"])
    @pytest.mark.parametrize("act", ACTS[:3])
    def test_carried_exactly_whatever_the_padding(self, padding, act):
        net, constant = silenced(Emitting(act(), nn.Conv2d(6, 4, 3, padding=padding, bias=False)))
        carried = copy.deepcopy(net)
        carrier = carry_constant(carried.read, constant, REMOVED)
        assert bool(REMOVED[carrier])
        keep = ~REMOVED
        keep[carrier] = True
        assert same(net, without(carried, keep), torch.randn(2, 3, 7, 7))

    def test_zero_padding_is_refused(self):
        net, constant = silenced(Emitting(nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)))
        before = net.read.bias.detach().clone()
        for padding in ((1, 1), "same"):
            net.read.padding = padding
            with pytest.raises(ValueError, match="pads with zeros"):
                fold_constant(net.read, constant, REMOVED)
        assert torch.equal(net.read.bias, before)

    def test_nothing_to_fold(self):
        """Where removed channels emit zero any layer will do."""
        net, constant = silenced(Emitting(nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1, bias=False)))
        zero = torch.where(REMOVED, 0.0, constant)
        before = copy.deepcopy(net.state_dict())
        fold_constant(net.read, zero, REMOVED)
        assert carry_constant(net.read, zero, REMOVED) is None
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))

    def test_refusals(self):
        norm, constant = nn.BatchNorm2d(6), torch.ones(6)
        with pytest.raises(ValueError, match="no bias"):
            fold_constant(nn.Conv2d(6, 4, 1, bias=False), constant, REMOVED)
        for consumer in (nn.Conv2d(6, 6, 3, groups=6), norm):
            with pytest.raises(ValueError, match="takes no constant"):
                fold_constant(consumer, constant, REMOVED)
        with pytest.raises(ValueError, match="reads 5 channels"):
            carry_constant(nn.Conv2d(5, 4, 1), constant, REMOVED)
