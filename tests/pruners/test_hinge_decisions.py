"""Hinge: what goes in the end, and that the compact network is what was masked."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torchvision
from graph.channel_law import randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from pruners.hinge_networks import (
    IMAGE,
    Basic,
    begun,
    close,
    planted,
)
from torch import nn

from prune_mm.analysis.complexity import layer_positions
from prune_mm.graph import trace
from prune_mm.pruners import Hinge
from prune_mm.pruners.hinge_math import group_norms
from prune_mm.structures import Plan
from prune_mm.structures.pair import pair_matrix
from prune_mm.structures.plan import count_macs


class TestDecisions:
    def test_the_search_ends_near_the_target_and_meets_it(self):
        torch.manual_seed(0)
        module = randomised(Basic(width=16), 0)
        pruner = begun(module, target={"macs": 0.6}, stop_limit=0.05, threshold=0.01, carry_constants=False)
        assert not pruner.due(0)
        assert [step for step in range(1, 21) if pruner.due(step)] == [5, 10, 15, 20]
        far = pruner.decide(module, 5)
        assert set(far) == {"watched"}
        pruner.commit(module, far, 5)
        assert not pruner.wants_stop()
        assert pruner.structures() == []
        assert pruner.status() == {"macs": 1.0, "params": 1.0}
        for unit in pruner.units:
            for part in unit.parts(module):
                part[5:] *= 1e-4
        near = pruner.decide(module, 10)
        pruner.commit(module, near, 10)
        assert float(near["watched"]) <= 0.65
        assert pruner.wants_stop()
        assert pruner.settled()
        assert 0.5 < pruner.status()["macs"] <= 0.6
        assert not any(pruner.due(step) for step in range(21))
        assert set(pruner.figures()) == {"watched_cost", "gradient_ratio", "threshold"}

    def test_the_end_of_the_training_ends_the_search(self):
        module = randomised(Basic(width=16), 0)
        pruner = begun(module, target={"params": 0.7}, stop_limit=0.0)
        pruner.commit(module, pruner.decide(module, 20), 20)
        assert pruner.status()["params"] <= 0.7
        other = begun(Basic(), epochs=None, iterations=11, epoch_iters=4, target={"macs": 0.9})
        assert [step for step in range(1, 12) if other.due(step)] == [4, 8, 11]

    def test_an_unfinished_search_can_be_concluded(self):
        module = randomised(Basic(width=16), 0)
        pruner = begun(module, target={"macs": 0.6})
        assert pruner.conclude(module)
        assert pruner.status()["macs"] <= 0.6
        assert not pruner.conclude(module)

    @pytest.mark.parametrize("published_search", [False, True])
    def test_small_norms_go(self, published_search):
        module = randomised(Basic(width=16, blocks=3), 0)
        pruner = begun(module, target={"macs": 0.5}, published_search=published_search, carry_constants=False)
        planted(module, pruner)
        norms = [group_norms(unit.parts(module)) for unit in pruner.units]
        assert pruner.conclude(module)
        threshold = float(pruner.found_threshold)
        for unit, v in zip(pruner.units, norms):
            kept = pruner.masks[unit.name]
            assert torch.equal(kept, v >= min(threshold, float(v.sort().values[-max(int(16 * 0.1), 1)])))
        assert pruner.status()["macs"] <= 0.5 + 0.01 * published_search

    def test_some_of_every_matrix_stay(self):
        module = randomised(Basic(width=16), 0)
        pruner = begun(module, target={"macs": 0.55}, min_share=0.4)
        planted(module, pruner)
        for part in pruner.units[0].parts(module):
            part *= 1e-6
        pruner.conclude(module)
        assert min(pruner.counts()) >= 6
        assert float(group_norms(pruner.units[0].parts(module)).max()) > 0

    def test_the_second_matrix_follows_the_first(self):
        module = randomised(Basic(width=16, blocks=3), 0)
        pruner = begun(module, target={"macs": 0.5}, same_ratio=True, carry_constants=False)
        planted(module, pruner)
        pruner.conclude(module)
        counts = pruner.counts()
        assert counts[0::2] == counts[1::2]
        assert len(set(counts)) > 1

    @torch.no_grad()
    @pytest.mark.parametrize("relative", [False, True])
    def test_a_relative_threshold_does_not_see_the_scale_of_a_layer(self, relative):
        options = {"target": {"macs": 0.6}, "carry_constants": False, "relative_threshold": relative}
        counts, watched = [], []
        for scale in (1.0, 2.0**-10):
            torch.manual_seed(0)
            module = randomised(Basic(width=16, blocks=3), 0)
            module.blocks[1]["conv1"].weight.mul_(scale)
            pruner = begun(module, threshold=0.4, **options)
            watched.append(float(pruner.decide(module, 5)["watched"]))
            pruner.conclude(module)
            counts.append(pruner.counts())
        assert (watched[0] == watched[1]) == relative
        assert (counts[0] == counts[1]) == relative
        # Published: the small layer alone has nothing left but what min_share keeps.
        assert relative or counts[1][2] == 1

    @torch.no_grad()
    def test_a_relative_threshold_leaves_the_strength_alone(self):
        results = []
        for options in ({}, {"relative_threshold": True}, {"layer_balancing": True}):
            torch.manual_seed(0)
            module = randomised(Basic(width=16), 0)
            pruner = begun(module, strength=0.5, **options)
            pruner._proximal_step(module, 0.1)
            results.append(module.state_dict())
        plain, relative, balanced = results
        assert all(torch.equal(plain[name], relative[name]) for name in plain)
        assert not all(torch.equal(plain[name], balanced[name]) for name in plain)

    @torch.no_grad()
    def test_a_relative_threshold_with_a_layer_of_zeros(self):
        module = randomised(Basic(width=16, blocks=3), 0)
        module.blocks[1]["conv1"].weight.zero_()
        pruner = begun(module, target={"macs": 0.6}, relative_threshold=True, carry_constants=False)
        pruner.conclude(module)
        assert pruner.status()["macs"] <= 0.6
        assert bool(module(IMAGE).isfinite().all())

    def test_state_travels_in_the_state_dict(self):
        module = randomised(Basic(width=16), 0)
        pruner = begun(module, target={"macs": 0.6}, layer_balancing=True, relative_threshold=True)
        other = copy.deepcopy(pruner)
        pruner.steps += 3
        pruner.ratio.fill_(1.3)
        pruner.conclude(module)
        other.load_state_dict(pruner.state_dict())
        for name, value in pruner.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
        assert other.wants_stop()
        assert [s.to_dict() for s in other.structures()] == [s.to_dict() for s in pruner.structures()]
        copied = copy.deepcopy(module)
        pruner.mask(module)
        other.mask(copied)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), copied.parameters()))

    @torch.no_grad()
    def test_an_averaged_copy_keeps_its_function_too(self):
        module = randomised(Basic(width=16), 0)
        pruner = begun(module, target={"macs": 0.6})
        planted(module, pruner)
        average = copy.deepcopy(module)
        for tensor in (*average.parameters(), *(b for name, b in average.named_buffers() if "running" in name)):
            tensor.mul_(1.0 + 0.1 * torch.rand_like(tensor))
        decision = pruner._final(module)
        zeroed = copy.deepcopy(average)
        for unit in pruner.units:
            for part in unit.parts(zeroed):
                part[~decision[f"V:{unit.name}"]] = 0.0
        pruner.commit(module, decision, 20)
        pruner.settle(average, decision)
        pruner.mask(average)
        close(average(IMAGE), zeroed(IMAGE), 1e-5)

    @pytest.mark.parametrize("method", ["svd2", "svd", "p-identity"])
    def test_the_first_split_keeps_the_function(self, method):
        dense = randomised(Basic(width=8), 0)
        module = copy.deepcopy(dense)
        begun(module, target={"macs": 0.9}, init_method=method)
        close(module(IMAGE), dense(IMAGE), 1e-5)

    def test_random_splits_are_those_of_the_seed(self):
        def first(seed):
            module = randomised(Basic(), 0)
            begun(module, target={"macs": 0.9}, init_method="p-disturbance-n", seed=seed)
            return [pair_matrix(block[name].pair.weight.data) for block in module.blocks for name in ("conv1", "conv2")]

        one, again, other = first(3), first(3), first(4)
        assert all(torch.equal(a, b) for a, b in zip(one, again))
        assert not torch.equal(one[0], other[0])
        assert not torch.equal(one[0], one[2]), "every matrix has noise of its own"
        # Columns of first matrices have unit length, rows of second ones.
        for index, matrix in enumerate(one):
            torch.testing.assert_close(matrix.norm(dim=index % 2), torch.ones(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"channels": 0.5}}, "keys macs, params, got {'channels': 0.5}"),
        ({"target": {"macs": 1.5}}, "must be a share"),
        ({"placement": "columns"}, "placement='columns' must be one of auto, rows, both"),
        ({"regularizer": "l2"}, "regularizer='l2' must be one of l1, l1-2, l1d2, logsum, l0"),
        ({"init_method": "qr"}, "init_method='qr' must be one of svd2"),
        ({"lr_adjust": "p3"}, "lr_adjust='p3' must be one of p1, p2"),
        ({"strength": 0}, "strength=0 must be a positive number"),
        ({"threshold": -1}, "threshold=-1 must be a positive number"),
        ({"q": "1"}, "q='1' must be a positive number"),
        ({"min_share": 1.0}, "min_share=1.0 must be a share in [0, 1)"),
        ({"stop_limit": 2}, "stop_limit=2 must be a share in [0, 1)"),
        ({"prox_interval": 0}, "prox_interval=0 must be a whole number of at least 1"),
        ({"epoch_iters": 0.5}, "epoch_iters=0.5 must be a whole number"),
        ({"same_ratio": 1}, "same_ratio=1 must be True or False"),
        ({"carry_constants": None}, "carry_constants=None must be True or False"),
        ({"annealing": {"factor": 2}}, "must be a dict(factor=, high=, low=)"),
        ({"annealing": {"factor": -2, "high": 2, "low": 1}}, "annealing factor=-2"),
        ({"annealing": {"factor": 2, "high": 1, "low": 2}}, "low=2 must be below high=1"),
        ({"ignore": "a"}, "ignore='a' must be a list"),
        ({"ignore": ["("]}, "is not a regular expression"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Hinge(**{"target": {"macs": 0.5}, **options})


@pytest.mark.parametrize(
    ("options", "schedule", "message"),
    [
        ({"target": {"macs": 0.1}, "min_share": 0.9}, (4, 20), "out of reach: with min_share=0.9 the scope still has"),
        ({"target": {"macs": 10**12}}, (4, 20), "above the dense scope"),
        ({"ignore": ["nothing"]}, (4, 20), "ignore pattern 'nothing' matches no"),
        ({"ignore": ["."]}, (4, 20), "no convolution to put a matrix behind: stem: reads the input of the scope"),
        ({"epoch_iters": 5}, (4, 20), "epoch_iters=5 is for a training that counts iterations"),
        ({}, (None, 20), "needs epoch_iters"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options, schedule, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        begun(Basic(), epochs=schedule[0], iterations=schedule[1], **{"target": {"macs": 0.9}, **options})


# -- the law ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_the_end_is_true(module, image, target=0.6, tolerance=2e-5, **options):
    """What holds of the final decision about any network; returns the pruner.

    The split keeps the function; the final decision computes what zeroing the groups of the matrices does, constants
    and all; masked and compact agree; the plan rebuilds the compact network from the dense one, by way of JSON; costs
    are those that were computed; the target is met.
    """
    dense = randomised(module, 0)
    module = copy.deepcopy(dense)
    pruner = begun(module, image, target={"macs": target}, **options)
    expected = dense(image)
    assert_same(module(image), expected, tolerance)
    decision = pruner._final(module)
    zeroed = copy.deepcopy(module)
    for unit in pruner.units:
        for part in unit.parts(zeroed):
            part[~decision[f"V:{unit.name}"]] = 0.0
    pruner.commit(module, decision, 20)
    masked = module(image)
    assert_same(masked, zeroed(image), tolerance)
    small = Plan("", (tuple(pruner.structures()),)).compact(copy.deepcopy(module))
    assert_same(small(image), masked, tolerance)
    again = Hinge(**{"target": {"macs": target}, "min_share": 0.1, **options})
    stages = [tuple(again.attach(dense, trace(dense, image[:1]))), tuple(pruner.structures())]
    plan = Plan("", tuple(stage for stage in stages if stage))
    rebuilt = Plan.from_json(plan.to_json()).compact(copy.deepcopy(dense))
    rebuilt.load_state_dict(small.state_dict())
    for a, b in zip(outputs(rebuilt(image)), outputs(small(image)), strict=True):
        assert torch.equal(a, b)
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    macs = count_macs(shapes, layer_positions(small, image[:1]))
    before = count_macs({n: tuple(p.shape) for n, p in dense.named_parameters()}, layer_positions(dense, image[:1]))
    assert macs / before == pytest.approx(pruner.status()["macs"])
    assert macs <= target * before
    sizes = [sum(p.numel() for p in net.parameters()) for net in (small, dense)]
    assert sizes[0] / sizes[1] == pytest.approx(pruner.status()["params"])
    return pruner


def outputs(found):
    return [found] if isinstance(found, torch.Tensor) else list(found)


def assert_same(first, second, tolerance):
    for a, b in zip(outputs(first), outputs(second), strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet18", {"placement": "rows", "ignore": ["layer4"], "target": 0.8}),
        ("resnet50", {}),
        ("resnext50_32x4d", {}),
        ("mobilenet_v2", {}),
    ],
)
def test_torchvision(name, options):
    pruner = assert_the_end_is_true(torchvision.models.get_model(name, weights=None), IMAGE, **options)
    carriers = sum(int(pruner.masks[unit.name].sum()) for unit in pruner.units)
    assert carriers < sum(pruner.widths)


class Flat(nn.Module):
    """Channels that a concatenation hands on to two layers, behind norms of their own, and that a linear layer reads
    flattened, several places a channel.
    """

    def __init__(self, padding):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.a, self.norm_a = nn.Conv2d(6, 9, 3, 1, 1, bias=False), nn.BatchNorm2d(9)
        self.b, self.norms = (
            nn.Conv2d(15, 8, 3, 1, padding, bias=False),
            nn.ModuleList([nn.BatchNorm2d(15), nn.BatchNorm2d(15), nn.BatchNorm2d(8)]),
        )
        self.c = nn.Conv2d(15, 8, 3, 1, padding, bias=False)
        self.fc = nn.Linear(8 * 9, 5, bias=padding == 0)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.norm_a(self.a(x))], 1)
        b = self.norms[2](self.b(self.norms[0](x).relu())).relu()
        c = self.c(self.norms[1](x).sigmoid())
        return self.fc(nn.functional.adaptive_avg_pool2d(b, 3).flatten(1)), c


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("placement", ["auto", "both"])
def test_concatenated_and_flattened_channels(padding, placement):
    pruner = assert_the_end_is_true(Flat(padding), IMAGE, placement=placement, target=0.6, min_share=0.2)
    columns = {unit.name: unit for unit in pruner.units if not unit.is_rows}
    assert {"a.pair", "b.pair"} <= set(columns)
    gone = {unit.name for unit in pruner.units if not bool(pruner.masks[unit.name].all())}
    assert gone & (set(columns) if placement == "auto" else {unit.name for unit in pruner.units})


def test_vgg_of_ssd():
    """No norms, two outputs, dilated convolutions, pooling that rounds up."""
    from mmdet.models.backbones import SSDVGG

    module = SSDVGG(16, with_last_pool=False, ceil_mode=True, out_indices=(3, 4), out_feature_indices=(22, 34))
    pruner = assert_the_end_is_true(module, IMAGE, placement="both", ignore=["features.(2[1-9]|3)"], target=0.85)
    assert {unit.is_rows for unit in pruner.units} == {True, False}


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_of_mask_rcnn(depth):
    """Four outputs, the first stage frozen and norms in eval mode, as in its configs."""
    from mmdet.models.backbones import ResNet

    module = ResNet(depth, base_channels=8, stem_channels=8, frozen_stages=1, norm_eval=True)
    module.train()
    pruner = assert_the_end_is_true(module, IMAGE, target=0.7)
    assert {unit.name.split(".")[0] for unit in pruner.units} == {"layer2", "layer3", "layer4"}


@st.composite
def networks(draw):
    """Chains and residual blocks of small convolutions, with and without norms, grouped middles and odd activations."""
    width, kinds = (
        draw(st.integers(3, 9)),
        draw(st.lists(st.sampled_from(["chain", "basic", "neck", "next"]), min_size=1, max_size=3)),
    )
    acts = draw(st.lists(st.sampled_from([nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Identity]), min_size=3, max_size=3))
    return Drawn(width, kinds, acts, draw(st.booleans()), draw(st.integers(1, 2)))


class Drawn(nn.Module):
    def __init__(self, width, kinds, acts, norms, stride):
        super().__init__()
        self.kinds = kinds

        def layer(inputs, outputs, kernel, act, groups=1, stride=1):
            conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=not norms)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs) if norms else nn.Identity(), act())

        self.stem = layer(3, width, 3, acts[0])
        self.parts = nn.ModuleList()
        for kind in kinds:
            if kind == "chain":
                part = [layer(width, width + 2, 3, acts[1], stride=stride), layer(width + 2, width, 3, acts[2])]
            elif kind == "basic":
                part = [layer(width, width + 1, 3, acts[1]), layer(width + 1, width, 3, nn.Identity)]
            else:
                groups = 3 if kind == "next" else 1
                middle = layer(6, 6, 3, acts[2], groups)
                part = [layer(width, 6, 1, acts[1]), middle, layer(6, width, 1, nn.Identity)]
            self.parts.append(nn.Sequential(*part))

    def forward(self, x):
        x = self.stem(x)
        for kind, part in zip(self.kinds, self.parts):
            x = part(x) if kind == "chain" else (x + part(x)).relu()
        return x


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    networks(), st.sampled_from(["auto", "rows", "both"]), st.booleans(), st.sampled_from([0.5, 0.7, 0.9]),
    st.sampled_from(["svd2", "svd", "p-disturbance-u"]), st.booleans(),
)  # fmt: skip
def test_any_network(module, placement, pointwise, share, method, same):
    torch.manual_seed(0)
    options = {"placement": placement, "pair_pointwise": pointwise, "min_share": 0.2, "same_ratio": same}
    module = randomised(module, 1)
    dense, image = copy.deepcopy(module), torch.randn(2, 3, 12, 12)
    try:
        pruner = begun(module, image, init_method=method, target={"macs": share}, **options)
    except ValueError as error:
        if not re.search("out of reach|there is no convolution", str(error)):
            raise
        return
    if method != "p-disturbance-u":
        close(module(image), dense(image), 1e-4)
    with torch.no_grad():
        planted(module, pruner)
        decision = pruner._final(module)
        zeroed = copy.deepcopy(module)
        for unit in pruner.units:
            for part in unit.parts(zeroed):
                part[~decision[f"V:{unit.name}"]] = 0.0
        pruner.commit(module, decision, 20)
        masked = module(image)
        close(masked, zeroed(image), 1e-4)
        small = Plan.from_json(Plan("", (tuple(pruner.structures()),)).to_json()).compact(copy.deepcopy(module))
        close(small(image), masked, 1e-4)
    assert pruner.status()["macs"] <= share
    macs = count_macs({n: tuple(p.shape) for n, p in small.named_parameters()}, layer_positions(small, image))
    assert macs == pruner.cost.macs(pruner.counts())
