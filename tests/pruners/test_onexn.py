"""OneByN as a whole: options, gradual schedules, and what layers become, on a small network of every kind of layer."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from onexn_nets import (
    IMAGE,
    POINTWISE,
    SMALL,
    begun,
    build,
    names,
    net,
    prepared,
    rearranged,
    started,
    tensors,
    zeros,
)
from torch import nn

from prune_mm.pruners import OneByN
from prune_mm.structures import ChannelOrder, Plan


def test_rearranging_alone_changes_nothing():
    for module, image in ((net(), SMALL), (build({"type": "MobileNetV2", "widen_factor": 0.25}), IMAGE)):
        dense, _, small, pruner = begun(module, image, n=4, rate=1e-9, rearrange=True, kernels="all")
        structures = pruner.structures()
        assert structures
        assert all(isinstance(s, ChannelOrder) for s in structures)
        assert zeros(pruner) == 0
        moved = [k for k, v in small.state_dict().items() if not torch.equal(v, dense.state_dict()[k])]
        assert any("depthwise" in k or "conv.1" in k for k in moved)
        with torch.no_grad():
            for expected, found in zip(tensors(dense(image)), tensors(small(image))):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_meets_an_add_or_a_gate_stays_in_order():
    _, _, small, pruner = begun(net(), SMALL, n=4, rearrange=True, kernels="all")
    assert names(pruner) == ["expand", "project", "wide", "squeeze", "gate", "down", "last", "fc"]
    assert rearranged(pruner) == {"expand", "squeeze", "down", "last"}
    orders = {s.name: list(s.order) for s in pruner.structures() if isinstance(s, ChannelOrder)}
    assert set(orders) == {"expand", "squeeze", "down", "last"}
    # Depthwise filters and norms go along.
    assert torch.equal(small.norm.bias, net().norm.bias[orders["expand"]])
    assert torch.equal(small.depthwise.weight, net().depthwise.weight[orders["expand"]])
    for name in ("project", "wide", "gate", "fc"):
        assert torch.equal(pruner.perms[name], torch.arange(pruner.perms[name].numel()))


# -- options ----------------------------------------------------------------------------------------------------------


def test_pointwise_and_all_kernels():
    _, _, _, pruner = begun(net(), SMALL, n=4)
    assert names(pruner) == POINTWISE
    assert pruner.left_dense["wide"] == "its kernels are larger than 1x1 (kernels='all' would prune it)"
    assert pruner.left_dense["stem"] == "reads the input of the scope"
    assert pruner.left_dense["depthwise"] == "it has 22 groups"
    _, _, _, pruner = begun(net(), SMALL, n=4, kernels="all")
    assert names(pruner) == ["expand", "project", "wide", "squeeze", "gate", "down", "last", "fc"]


def test_rates_per_layer_and_layers_left_out():
    _, _, _, pruner = begun(
        net(), SMALL, n=2, rate=0.5, rates={"expand": 0.75, "(squeeze|gate)": 0, "last$": 0.25}, ignore=["fc"]
    )
    assert names(pruner) == ["expand", "project", "last"]
    shares = {name: float(mask.float().mean()) for name, mask in pruner.masks.items()}
    assert shares == {"expand": 0.25, "project": 0.5, "last": pytest.approx(0.75, abs=0.01)}
    assert pruner.left_dense["fc"] == "ignored"
    assert pruner.left_dense["gate"] == "its rate is 0"


def test_frozen_layers():
    module = net()
    module.expand.weight.requires_grad_(False)
    pruner = prepared(module, OneByN(n=4), image=SMALL)
    assert "expand" not in names(pruner)
    assert "include_frozen=True" in pruner.left_dense["expand"]
    assert "expand" in names(begun(module, SMALL, n=4, include_frozen=True)[3])


@pytest.mark.parametrize(("tail", "rows"), [("dense", 5), ("pad", 6)])
def test_tails(tail, rows):
    """22 filters and N=4: five blocks a channel and two whole filters, or six blocks of which one is smaller."""
    _, _, small, pruner = begun(net(), SMALL, n=4, rate=0.5, tail=tail, rates={"(?!expand)": 0})
    blocks = pruner.masks["expand"].flatten(1)[::4]
    assert int((~blocks[:rows]).sum()) == rows * 16 // 2
    assert bool(blocks[5].all()) == (tail == "dense")
    assert small.expand.tail_values.shape == (int(blocks[5].sum()), 2, 1, 1)


def test_a_tail_that_is_an_error():
    message = "n=4 does not divide the 22 filters of 'expand'; use tail='dense' or 'pad', or ignore=['expand']"
    with pytest.raises(ValueError, match=re.escape(message)):
        prepared(net(), OneByN(n=4, tail="error"), image=SMALL)
    prepared(net(), OneByN(n=2, tail="error", ignore=["fc"]), image=SMALL)


@pytest.mark.parametrize("criterion", ["l1", "random", "kernel", "weight", "filter"])
def test_criteria(criterion):
    dense, masked, small, pruner = begun(net(), SMALL, n=2, criterion=criterion, kernels="all")
    for layer in pruner.layers:
        mask, weight = pruner.masks[layer.name], dense.get_submodule(layer.name).weight.detach()
        size = {"filter": math.prod(layer.shape[1:]), "weight": 1}.get(criterion, math.prod(layer.shape[2:]))
        size *= 2 if criterion in ("l1", "random") else 1
        whole = mask.numel() - layer.shape[0] % (2 if criterion in ("l1", "random") else 1) * mask[0].numel()
        assert int((~mask).sum()) == int(whole / size * 0.5) * size
        assert torch.equal(masked.get_submodule(layer.name).weight, weight * mask)
        if criterion == "weight":
            assert weight[~mask].abs().max() <= weight[mask].abs().min()
        if criterion == "filter":
            assert torch.equal(mask.flatten(1).all(1), mask.flatten(1).any(1))
    if criterion == "weight":
        # Kernels of nine weights hardly ever lose all of them.
        assert isinstance(small.wide, nn.Conv2d) or small.wide.values.shape[0] > 0.95 * 16 * 22


def test_random_blocks_differ_from_layer_to_layer_and_with_the_seed():
    def masks(seed):
        module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        return dict(begun(module, SMALL, n=2, criterion="random", seed=seed)[3].masks.items())

    first, again, other = masks(0), masks(0), masks(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["1"], first["3"])
    assert not torch.equal(first["1"], other["1"])


def test_what_it_aims_at_in_words():
    assert OneByN(n=8, rate=0.75).target == "25% of 8 x 1 blocks"
    assert OneByN(criterion="filter").target == "50% of filters"
    assert OneByN(criterion="random", n=4).n == 4
    assert OneByN(criterion="kernel", n=4).n == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0 must be"),
        ({"n": 2.0}, "n=2.0 must be"),
        ({"rate": 1.5}, "rate=1.5 must be a share in [0, 1]"),
        ({"rate": True}, "rate=True must be a share in [0, 1]"),
        ({"rates": {"last": "half"}}, "rates['last']='half' must be a share in [0, 1]"),
        ({"rates": {"(": 0.5}}, "rates"),
        ({"kernels": "3x3"}, "kernels='3x3' must be one of pointwise, all"),
        ({"criterion": "l2"}, "criterion='l2' must be one of l1, random, kernel, weight, filter"),
        ({"tail": "wrap"}, "tail='wrap' must be one of dense, pad, error"),
        ({"schedule": "linear"}, "schedule='linear' must be one of one_shot, gradual"),
        ({"rearrange": 1}, "rearrange=1 must be"),
        ({"schedule": "gradual"}, "schedule='gradual' needs an end after begin=0, got end=None"),
        ({"schedule": "gradual", "begin": 5, "end": 5}, "needs an end after begin=5, got end=5"),
        ({"end": 5}, "end=5 belongs to schedule='gradual'"),
        ({"rearrange": True, "criterion": "random"}, "rearrange=True goes with criterion='l1', not with 'random'"),
        ({"ignore": ["lost"]}, "ignore pattern 'lost' matches no layer; there are: "),
        ({"rates": {"lost": 0.5}}, "rates pattern 'lost' matches no layer; there are: "),
        ({"ignore": [""]}, "no layer can be made block-sparse: "),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepared(net(), OneByN(**options), image=SMALL)


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"end": 4}, (4, 40), "end=4 must be below the training length of 4 epochs"),
        ({"end": 40, "by_epoch": False}, (None, 40), "end=40 must be below the training length of 40 iterations"),
        ({"end": 3}, (None, 40), "the training counts iterations: set by_epoch=False"),
    ],
)
def test_schedules_that_do_not_fit(options, length, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OneByN(schedule="gradual", **options).set_schedule(*length)
    OneByN().set_schedule(*length)


# -- gradual ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["l1", "rearranged", "random", "kernel", "weight", "filter"])
def test_a_gradual_schedule_only_takes_away_and_ends_exactly(criterion):
    options = {"rearrange": True} if criterion == "rearranged" else {"criterion": criterion}
    module = net()
    one_shot = started(net(), prepared(net(), OneByN(n=2, rate=0.6, **options), image=SMALL))
    pruner = OneByN(n=2, rate=0.6, schedule="gradual", begin=2, end=11, interval=4, **options)
    started(module, prepared(module, pruner, image=SMALL))
    pruner.set_schedule(12, 120)
    assert zeros(pruner) == 0
    assert not pruner.settled()
    seen, counts, before = [], [], {name: mask.clone() for name, mask in pruner.masks.items()}
    for step in range(12):
        # Training goes on in between.
        with torch.no_grad():
            for layer in pruner.layers:
                module.get_submodule(layer.name).weight.add_(0.05 * torch.randn(layer.shape))
        pruner.after_step(module)
        if not pruner.due(step):
            continue
        pruner.commit(module, pruner.decide(module, step), step)
        pruner.last_update.fill_(step)
        seen.append(step)
        counts.append(zeros(pruner))
        for name, mask in pruner.masks.items():
            assert not bool((mask & ~before[name]).any()), (step, name)
            before[name] = mask.clone()
    assert seen == [2, 6, 10, 11]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[1] < counts[-1] == zeros(one_shot)
    assert pruner.settled()
    small = Plan("", (tuple(pruner.structures()),)).compact(copy.deepcopy(module))
    with torch.no_grad():
        torch.testing.assert_close(small(SMALL), module(SMALL), rtol=1e-4, atol=1e-5)


def test_a_schedule_that_began_late_ends_at_once():
    module = net()
    pruner = OneByN(n=2, schedule="gradual", begin=2, end=6)
    started(module, prepared(module, pruner, image=SMALL))
    assert [pruner.due(step) for step in (1, 2, 6, 9)] == [False, True, True, True]
    pruner.commit(module, pruner.decide(module, 9), 9)
    pruner.last_update.fill_(9)
    assert pruner.settled()
    assert not pruner.due(10)
    assert zeros(pruner) == zeros(started(net(), prepared(net(), OneByN(n=2), image=SMALL)))


def test_masks_hold_after_every_step():
    module = net()
    pruner = started(module, prepared(module, OneByN(n=4), image=SMALL))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        module(SMALL).square().sum().backward()
        optimizer.step()
        pruner.after_step(module, optimizer)
        for name, mask in pruner.masks.items():
            weight = module.get_submodule(name).weight.detach()
            assert not weight[~mask].any()
            assert weight[mask].any()


def test_state_travels_in_a_checkpoint():
    module = net()
    pruner = started(module, prepared(module, OneByN(n=4, rearrange=True), image=SMALL))
    other = prepared(net(), OneByN(n=4, rearrange=True), image=SMALL)
    other.load_state_dict(pruner.state_dict())
    assert other.structures() == pruner.structures()
    assert bool(other.started)
