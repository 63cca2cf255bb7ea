"""OneByN as a whole: which layers of which networks, how many zeros, in which order, and what they become."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope
from torch import nn

from prune_mm.analysis.complexity import layer_positions
from prune_mm.engine.compact import without_pretrained
from prune_mm.graph import trace
from prune_mm.pruners import OneByN
from prune_mm.pruners.onexn_math import block_share
from prune_mm.registry import PRUNERS
from prune_mm.structures import BlockSparse, ChannelOrder, Plan
from prune_mm.structures.block_layer import BlockSparseLayer
from prune_mm.structures.plan import count_macs

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# -- how a pruner lives, without a runner -----------------------------------------------------------------------------


def randomise(module):
    """Norms that do something, and weights without ties."""
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            for tensor, low, high in (
                (child.weight, 0.5, 1.5), (child.bias, -0.3, 0.5), (child.running_mean, -0.3, 0.3),
                (child.running_var, 0.5, 1.5),
            ):  # fmt: skip
                nn.init.uniform_(tensor, low, high)
    module.train(False)
    return module


def build(config):
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return randomise(MODELS.build(config))


def shapes_of(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def prepared(module, pruner, graph=None, image=IMAGE):
    graph = graph or trace(module, image[:1], grouping=pruner.regroups)
    pruner.prepare(module, graph, shapes_of(module), layer_positions(module, image[:1]))
    return pruner


def started(module, pruner):
    pruner.commit(module, pruner.start(module), 0)
    pruner.started.fill_(True)
    return pruner


def tensors(output):
    return output if isinstance(output, (tuple, list)) else (output,)


def begun(module, image=IMAGE, **options):
    """Dense, masked and compact network, and the pruner; the law is checked on the way."""
    dense = copy.deepcopy(module)
    pruner = started(module, prepared(module, OneByN(**options), image=image))
    plan = Plan("", (tuple(pruner.structures()),))
    assert Plan.from_json(plan.to_json()) == plan
    small = plan.compact(copy.deepcopy(module))
    # The dense network and the plan give the same, and take the small weights as they are.
    again = plan.compact(copy.deepcopy(dense))
    if pruner.criterion != "weight":
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, small.state_dict()[name]), name
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        outputs = [tensors(network(image)) for network in (module, small, again)]
        for expected, found, rebuilt in zip(*outputs, strict=True):
            assert torch.equal(found, rebuilt)
            assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
    # What is said about the compact form is true of it.
    numbers = plan.shapes(shapes_of(dense))
    assert sum(map(math.prod, numbers.values())) == sum(p.numel() for p in small.parameters())
    positions = layer_positions(dense, image[:1])
    status, macs = pruner.status(), [count_macs(s, positions) for s in (numbers, shapes_of(dense))]
    assert status["macs"] == pytest.approx(macs[0] / macs[1])
    assert status["params"] == pytest.approx(
        sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters())
    )
    return dense, module, small, pruner


def zeros(pruner):
    return sum(int((~mask).sum()) for _, mask in pruner.masks.items())


# -- the published networks -------------------------------------------------------------------------------------------

NETWORKS = {
    "v1": {"type": "prune_mm.MobileNetV1"},
    "v2": {"type": "MobileNetV2"},
    "v3_small": {"type": "MobileNetV3", "arch": "small"},
    "v3_large": {"type": "MobileNetV3", "arch": "large"},
    "r50": {"type": "ResNet", "depth": 50},
}

#: Zeros at a rate of 0.5 as published, for every N.
PUBLISHED = {"v1": 1_569_792, "v2": 1_062_336, "v3_small": 426_496, "v3_large": 1_425_216, "r50": 11_722_752}

#: Layers whose filters N does not divide, and ours with tail='dense' then. The published code lets blocks run into the
#: next input channel there (one more layer each: the classifier), which reaches the count but is no 1xN pattern.
TAILS = {
    ("v2", 16): (2, 1_061_376),
    ("v2", 32): (5, 1_058_816),
    ("v3_small", 16): (13, 420_928),
    ("v3_small", 32): (25, 404_224),
    ("v3_large", 16): (19, 1_414_016),
    ("v3_large", 32): (29, 1_374_592),
}


@pytest.fixture(scope="module")
def published():
    """``published('v2')``: a network and a pruner with N=4 and rearranged filters, prepared once."""
    made = {}

    def make(name):
        if name not in made:
            module = build(NETWORKS[name])
            kernels = "all" if name == "r50" else "pointwise"
            made[name] = module, prepared(module, OneByN(n=4, kernels=kernels, rearrange=True))
        return made[name]

    return make


def masked_at(published, name, n, tail="dense", rearrange=False):
    """Masked network and pruner for another N: which layers are pruned does not depend on it."""
    module, pruner = published(name)
    pruner = copy.deepcopy(pruner)
    pruner.n, pruner.tail = n, tail
    if not rearrange:
        pruner._orders = {}
    module = copy.deepcopy(module)
    return module, started(module, pruner)


@pytest.mark.parametrize("name", NETWORKS)
def test_published_numbers_of_zeros(name, published):
    _, pruner = published(name)
    layers = {"v1": 13, "v2": 34, "v3_small": 40, "v3_large": 46, "r50": 52}
    assert len(pruner.layers) == layers[name]
    assert sum(math.prod(layer.shape) for layer in pruner.layers) == 2 * PUBLISHED[name]
    for n in (4, 32) if name == "r50" else (1, 2, 4, 8, 16, 32):
        uneven, expected = TAILS.get((name, n), (0, PUBLISHED[name]))
        assert sum(layer.shape[0] % n > 0 for layer in pruner.layers) == uneven
        assert zeros(masked_at(published, name, n)[1]) == expected, n
        if uneven:
            # Smaller blocks at the end count like others: the rate is reached in blocks, not in weights.
            masks = masked_at(published, name, n, tail="pad")[1].masks
            for layer in pruner.layers:
                blocks = masks[layer.name].flatten(1)[::n]
                assert int((~blocks).sum()) == int(blocks.numel() * 0.5), layer.name


def test_layers_that_stay_dense(published):
    for name in NETWORKS:
        module, pruner = published(name)
        taken = {layer.name for layer in pruner.layers}
        for layer, child in module.named_modules():
            if isinstance(child, nn.Conv2d):
                assert (layer in taken) != (layer in pruner.left_dense), layer
                assert layer in taken or child.groups > 1 or child.in_channels == 3
        reasons = set(pruner.left_dense.values())
        assert "reads the input of the scope" in reasons


# -- filter rearrangement ---------------------------------------------------------------------------------------------


def rearranged(pruner):
    return {layer.name for layer in pruner.layers} & set(pruner._orders)


def test_layers_that_are_rearranged(published):
    """The published rule, as far as it can be physical, and what else is exact.

    Published: V1 all; V2 and V3 expansions and the last convolution; ResNet all but the last of each block. Not ours:
    the last convolution of the scope, whose outputs are seen; expansions in front of a gate; the projections of
    ResNet's shortcuts. Ours besides: projections that meet no add, and the squeezing halves of gates.
    """
    found = {name: rearranged(published(name)[1]) for name in NETWORKS}
    every = {name: {layer.name for layer in published(name)[1].layers} for name in NETWORKS}
    assert every["v1"] - found["v1"] == {"layer5.1.conv2"}
    # Blocks 2 to 17 of V2 have an expansion.
    expansions = {name for name in every["v2"] if name.endswith("conv.0.conv")}
    assert len(expansions) == 16
    assert found["v2"] == expansions | {"layer1.0.conv.1.conv", "layer7.0.conv.2.conv"}
    for name in ("v3_small", "v3_large"):
        module = published(name)[0]
        gated = {block for block, child in module.named_children() if getattr(child, "with_se", False)}
        blocks = {layer.split(".")[0] for layer in every[name] if "expand_conv" in layer}
        squeezes = {f"{block}.se.conv1.conv" for block in gated}
        assert found[name] - {"layer1.linear_conv.conv"} == squeezes | {
            f"{block}.expand_conv.conv" for block in blocks - gated
        }
    assert len(found["r50"]) == 32
    assert every["r50"] - found["r50"] == {
        name for name in every["r50"] if name.endswith(("conv3", "downsample.0"))
    }  # fmt: skip


@pytest.mark.parametrize(("name", "n"), [("v1", 16), ("v2", 4), ("v3_small", 8), ("r50", 4)])
def test_the_pattern_is_1xn_in_memory(name, n, published):
    """The share of blocks that are not empty in the compact weight is 1 - rate, though it is not in the masked one."""
    masked, pruner = masked_at(published, name, n, rearrange=True)
    small = Plan("", (tuple(pruner.structures()),)).compact(copy.deepcopy(masked))
    image = IMAGE[:1]
    with torch.no_grad():
        for expected, found in zip(masked(image), small(image), strict=True):
            assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
    scattered = []
    for layer in pruner.layers:
        compact = small.get_submodule(layer.name)
        assert isinstance(compact, BlockSparseLayer)
        assert compact.rows is None, layer.name
        assert block_share(compact.dense_weight(), n) == pytest.approx(0.5, abs=n / layer.shape[0]), layer.name
        if layer.shape[0] % n == 0:
            assert block_share(compact.dense_weight(), n) == 0.5
        if layer.name in pruner._orders and layer.shape[0] >= 8 * n:
            scattered.append(block_share(pruner.masks[layer.name], n))
        if layer.name not in pruner._orders:
            assert pruner.perms[layer.name].tolist() == list(range(layer.shape[0]))
    assert min(scattered) > 0.75
    status = pruner.status()
    assert status["blocks"] == pytest.approx(0.5, abs=0.03 if name.startswith("v3") else 1e-9)


class Net(nn.Module):
    """Residual adds, a depthwise convolution, a gate, k x k kernels, and a classifier."""

    def __init__(self, width=16, hidden=22, classes=7):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.expand = nn.Conv2d(width, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden, width, 1)
        self.wide = nn.Conv2d(width, hidden, 3, padding=1)
        self.squeeze, self.gate = nn.Conv2d(hidden, 6, 1), nn.Conv2d(6, hidden, 1)
        self.down = nn.Conv2d(hidden, width, (1, 3), stride=2, padding=(0, 1))
        self.last = nn.Conv2d(width, 18, 1)
        self.fc = nn.Linear(18, classes)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.depthwise(self.norm(self.expand(x)).relu()).relu()
        x = x + self.project(y)
        y = self.wide(x).relu()
        y = y * self.gate(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.fc(self.last(self.down(y).relu()).relu().mean((2, 3)))


SMALL = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
POINTWISE = ["expand", "project", "squeeze", "gate", "last", "fc"]


def net(**options):
    torch.manual_seed(0)
    return randomise(Net(**options))


def names(pruner):
    return [layer.name for layer in pruner.layers]


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


# -- the law ----------------------------------------------------------------------------------------------------------


def torchvision_net(name):
    return randomise(getattr(torchvision.models, name)())


CASES = {
    "resnet18": (lambda: torchvision_net("resnet18"), {"n": 16, "kernels": "all", "rearrange": True}),
    "mobilenet_v3": (lambda: torchvision_net("mobilenet_v3_small"), {"n": 4, "tail": "pad", "rearrange": True}),
    "efficientnet": (lambda: torchvision_net("efficientnet_b0"), {"n": 8, "rate": 0.7, "rearrange": True}),
    "regnet": (lambda: torchvision_net("regnet_y_400mf"), {"n": 3, "kernels": "all", "tail": "pad"}),
    "densenet": (
        lambda: randomise(torchvision.models.DenseNet(12, (3, 4, 3), 20)),
        {"n": 5, "kernels": "all", "rearrange": True},
    ),
    "ssd_vgg": (
        lambda: build(
            {"type": "mmdet.SSDVGG", "depth": 16, "with_last_pool": False, "ceil_mode": True,
             "out_indices": (3, 4), "out_feature_indices": (22, 34)}
        ),
        {"n": 16, "kernels": "all", "rearrange": True},
    ),
    "mmdet_resnet": (
        lambda: build({"type": "mmdet.ResNet", "depth": 18, "frozen_stages": 1, "norm_eval": True}),
        {"n": 32, "kernels": "all", "rearrange": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_masked_equals_compact(name):
    make, options = CASES[name]
    pruner = begun(make(), **options)[3]
    assert len(pruner.layers) >= 14
    assert any(isinstance(s, BlockSparse) for s in pruner.structures())
    if options.get("rearrange"):
        assert len(rearranged(pruner)) >= 5
    if name == "mmdet_resnet":
        assert not any(name.startswith("layer1") for name in names(pruner))


def test_a_classifier_with_its_head():
    """The whole classifier as scope: the fully connected layer is pruned, and the last convolution rearranged."""
    config = {
        "type": "ImageClassifier",
        "backbone": {"type": "MobileNetV2", "widen_factor": 0.25},
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": 10, "in_channels": 1280},
    }
    _, _, small, pruner = begun(build(config), n=4, rearrange=True)
    assert names(pruner)[-1] == "head.fc"
    assert type(small.head.fc).__name__ == "BlockSparseLinear"
    assert "backbone.conv2.conv" in rearranged(pruner)
    assert "head.fc" not in rearranged(pruner)


# -- any network ------------------------------------------------------------------------------------------------------


@st.composite
def networks(draw):
    """A few convolutions in a row, some with a norm, a residual add, a depthwise or a grouped one between."""
    width, layers = draw(st.integers(1, 9)), []
    layers += [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["plain", "residual", "depthwise", "grouped"]))
        kernel = draw(st.sampled_from([1, 3]))
        if kind == "residual":
            layers += [Residual(width, draw(st.integers(1, 9)), kernel), nn.ReLU()]
            continue
        if kind == "depthwise":
            layers += [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=draw(st.booleans()))]
        if kind == "grouped" and width % 2 == 0:
            layers += [nn.Conv2d(width, width, 3, padding=1, groups=2)]
        wider = draw(st.integers(1, 9))
        layers += [nn.Conv2d(width, wider, kernel, stride=draw(st.sampled_from([1, 2])), bias=draw(st.booleans()))]
        layers += [nn.BatchNorm2d(wider)] * draw(st.booleans()) + [nn.Hardswish()]
        width = wider
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, draw(st.integers(1, 9)))]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self, width, hidden, kernel):
        super().__init__()
        self.first = nn.Conv2d(width, hidden, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(hidden)
        self.second = nn.Conv2d(hidden, width, 1)

    def forward(self, x):
        return x + self.second(self.norm(self.first(x)).relu())


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    networks(),
    st.integers(1, 5),
    st.sampled_from([0.1, 0.5, 0.8, 1.0]),
    st.sampled_from(["dense", "pad"]),
    st.sampled_from(["l1", "rearranged", "random", "kernel", "weight", "filter"]),
    st.sampled_from(["pointwise", "all"]),
)
def test_any_network(module, n, rate, tail, criterion, kernels):
    options = {"rearrange": True} if criterion == "rearranged" else {"criterion": criterion}
    image = torch.randn(2, 3, 19, 23, generator=torch.Generator().manual_seed(1))
    _, _, _, pruner = begun(randomise(module), image, n=n, rate=rate, tail=tail, kernels=kernels, **options)
    for layer in pruner.layers:
        if criterion not in ("l1", "rearranged", "random"):
            continue
        rows = -(-layer.shape[0] // n) if tail == "pad" else layer.shape[0] // n
        mask = pruner.masks[layer.name][pruner.perms[layer.name]].reshape(*layer.shape[:2], -1)
        blocks = mask.all(2)[::n][:rows]
        assert int((~blocks).sum()) == int(rows * layer.shape[1] * rate)


# -- configs ----------------------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("onexn_*.py")), ids=lambda path: path.stem)
def test_configs_build(path):
    config = Config.fromfile(path)
    pruner = PRUNERS.build({**config.model.pruner, "type": "OneByN"})
    assert pruner.rearrange
    assert pruner.rate == 0.5
    assert any(hook.type == "prune_mm.PruningHook" for hook in config.custom_hooks)
    pruner.set_schedule(config.train_cfg.get("max_epochs"), config.train_cfg.get("max_iters") or 10**6)
    name = path.stem.removeprefix("onexn_").replace("mobilenet_", "").replace("resnet50", "r50")
    if name in NETWORKS:
        backbone = config.model.model.backbone
        assert {key: backbone.get(key) for key in NETWORKS[name]} == NETWORKS[name]
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(without_pretrained(config.model)) if name in ("ssd300", "maskrcnn") else None
    if model is not None:
        layers = {layer.name for layer in model.pruner.layers}
        assert len(layers) == 14 if name == "ssd300" else len(layers) > 15


def test_published_learning_rates():
    """Spec 3: SGD at 0.01, 180 epochs of 5005 iterations."""
    config = Config.fromfile(CONFIGS / "onexn_mobilenet_v2.py")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr)
    published = {(0, 0): 3.98796e-7, (2, 0): 0.0039975, (4, 5004): 0.009999194, (5, 0): 0.01, (90, 0): 0.005224324,
                 (179, 0): 8.0566e-7}  # fmt: skip
    schedulers = [
        PARAM_SCHEDULERS.build(dict(each), default_args={"optimizer": optimizer, "epoch_length": 5005})
        for each in config.param_scheduler
    ]
    found = {}
    for epoch in range(180):
        for step in range(5005 if epoch < 5 else 1):
            found[epoch, step] = optimizer.param_groups[0]["lr"]
            if not schedulers[0].by_epoch:
                optimizer.step()
                schedulers[0].step()
        schedulers[1].step()
    for moment, rate in published.items():
        assert found[moment] == pytest.approx(rate, rel=3e-3 if moment[0] < 5 else 1e-4), moment
