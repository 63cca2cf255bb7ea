"""GConvPrune as a whole: where the numbers of groups come from, what is kept, what is refused."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import torchvision
from test_strucspars import IMAGE, Small, prepared
from torch import nn

from prune_mm.graph import count_gathers
from prune_mm.pruners import GConvPrune
from prune_mm.pruners.gconv_math import find_groups, kernel_norms_l2
from prune_mm.structures import GroupedConv, Plan
from prune_mm.structures.plan import resolve


def begun(base=1, module=None, **options):
    torch.manual_seed(0)
    module = module or Small(base)
    pruner = prepared(module, GConvPrune(**options))
    dense = copy.deepcopy(module).eval()
    pruner.commit(module, pruner.start(module), 0)
    return dense, module.eval(), pruner


def groups_of(pruner):
    return {layer.name: groups for layer, groups in zip(pruner.layers, pruner.groups.tolist())}


@pytest.mark.parametrize("base", [1, 2])
def test_one_number_for_all(base):
    dense, masked, pruner = begun(base, groups=2, ignore=["c"])
    assert groups_of(pruner) == {"a": 2, "b": 2}
    conv = pruner.convs()[0]
    assert conv.groups == 2 * base
    small = Plan("", (tuple(pruner.structures()),)).compact(copy.deepcopy(dense))
    assert small.a.groups == 2 * base
    torch.testing.assert_close(small(IMAGE), masked(IMAGE), rtol=1e-4, atol=1e-5)
    # Kernels that stay keep their values, the others are zero.
    mask = conv.mask()
    assert torch.equal(masked.a.weight[mask], dense.a.weight[mask])
    assert not masked.a.weight[~mask].any()


def test_groups_need_not_be_powers_of_two():
    _, _, pruner = begun(groups={"c": 3, "a": 8})
    assert groups_of(pruner) == {"a": 8, "b": 1, "c": 3}


def test_channels_per_group():
    _, _, pruner = begun(channels_per_group=4, ignore=["b", "c"])
    assert groups_of(pruner) == {"a": 4}


def test_a_published_file(tmp_path):
    entries = {
        "module.stem": {"G": 1, "F": 8, "C": 3, "id": 1},
        "module.a": {"G": 4, "F": 16, "C": 8, "id": 2},
        "module.b": {"G": 2, "F": 6, "C": 16, "id": 3},
    }
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(entries))
    _, _, pruner = begun(groups=str(path))
    assert groups_of(pruner) == {"a": 4, "b": 2, "c": 1}


@pytest.mark.parametrize("kind", ["macs", "params", "weights"])
def test_a_searched_budget_is_kept_and_used(kind):
    _, _, pruner = begun(target={kind: 0.6})
    share = pruner.cost.of(kind, pruner.groups.tolist()) / pruner.cost.dense(kind)
    assert 0.4 < share <= 0.6


def test_a_searched_budget_beats_one_number_at_the_same_cost():
    """The mean over layers of what each loses by default, what all lose together by option."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    _, _, uniform = begun(module=copy.deepcopy(net), groups=2)
    params = uniform.cost.of("params", uniform.groups.tolist())
    pruners = {"one number": uniform}
    for name, options in (("mean", {}), ("total", {"search_cost": "total"})):
        _, _, pruners[name] = begun(module=copy.deepcopy(net), target={"params": params}, **options)
        assert pruners[name].cost.of("params", pruners[name].groups.tolist()) <= params
    mean, total = {}, {}
    for name, pruner in pruners.items():
        scores = [kernel_norms_l2(net.get_submodule(layer.name).weight) for layer in pruner.layers]
        kept = [find_groups(rows, groups).kept for rows, groups in zip(scores, pruner.groups.tolist())]
        whole = [float(rows.sum()) for rows in scores]
        mean[name] = sum(1 - part / all_of_it for part, all_of_it in zip(kept, whole))
        total[name] = 1 - sum(kept) / sum(whole)
    assert mean["mean"] < min(mean["one number"], mean["total"])
    assert total["total"] < min(total["one number"], total["mean"])


def test_published_and_best_results():
    kept = {}
    for faithful in (True, False):
        _, _, pruner = begun(groups=2, ignore=["c"], faithful=faithful)
        kept[faithful] = float(pruner.kept)
    assert kept[True] < kept[False] < 1.0
    assert pruner.status()["kept_norm"] == kept[False]
    _, _, random = begun(groups=2, ignore=["c"], method="RANDOM", seed=3)
    assert float(random.kept) < kept[False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of groups, channels_per_group and target"),
        ({"groups": 2, "target": {"macs": 0.5}}, "give one of groups, channels_per_group and target"),
        ({"groups": 1}, "groups=1 must be a whole number of at least 2"),
        ({"groups": 2, "method": "sort"}, "method='sort' must be one of"),
        ({"groups": 2, "indivisible": "no"}, "indivisible='no' must be one of error, skip"),
        ({"target": {"channels": 0.5}}, "keys macs, params, weights"),
        ({"groups": 4}, "groups=4 does not divide the 6 outputs and 16 inputs of 'b'"),
        ({"groups": {"a": 3}}, "'a' cannot have 3 groups"),
        ({"groups": {"d": 2}}, "names 'd', which is no layer"),
        ({"groups": {"stem": 2}}, "'stem' cannot be divided into groups: 8 outputs and 3 inputs"),
        ({"groups": {"a": 1}}, "leaves every layer dense"),
        ({"groups": "no/such.json"}, "no group configuration at 'no/such.json'"),
        ({"target": {"macs": 0.5}, "min_channels": 8}, "out of reach: with min_channels=8 and max_groups=64"),
        ({"target": {"macs": 10**12}}, "is above the dense scope"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        prepared(Small(), GConvPrune(**options))


def test_indivisible_layers_can_be_skipped():
    _, _, pruner = begun(groups=4, indivisible="skip")
    assert groups_of(pruner) == {"a": 4, "b": 1, "c": 1}
    assert pruner.left_dense["b"] == "6 outputs and 16 inputs not divisible by 4"


def test_resnet50_at_two_groups_has_the_published_size():
    torch.manual_seed(0)
    net = torchvision.models.resnet50()
    _, _, pruner = begun(module=net, groups=2, method="SAME", faithful=True)
    assert len(pruner.convs()) == 52
    assert pruner.cost.of("params", pruner.groups.tolist()) == 13_834_280


def test_layers_with_a_forward_of_their_own_stay_dense():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)

    module = Small()
    module.b = Scaled(16, 6, 1)
    _, _, pruner = begun(module=module, groups=2, ignore=["c"])
    assert groups_of(pruner) == {"a": 2}
    assert pruner.left_dense["b"]


def test_shared_orders_leave_gathers_at_residual_adds_only():
    torch.manual_seed(0)
    net = torchvision.models.resnet50()
    gathers, kept = {}, {}
    for share in (False, True):
        dense, masked, pruner = begun(module=copy.deepcopy(net), groups=2, share_orders=share)
        stage = pruner.structures()
        gathers[share], kept[share] = count_gathers(stage), float(pruner.kept)
        small = Plan("", (tuple(stage),)).compact(dense)
        torch.testing.assert_close(small(IMAGE), masked(IMAGE), rtol=1e-3, atol=1e-4)
        inner = [s for s in resolve(stage) if isinstance(s, GroupedConv) and s.name.endswith("conv2") and s.gathers()]
        # Without sharing, the second layer of a block shuffles what it reads.
        assert bool(inner) is not share
    assert gathers[True] < 40 < gathers[False]
    assert kept[True] < kept[False]
