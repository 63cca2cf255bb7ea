"""CHEX as a whole: the golden ResNet-50 with deterministic weights, schedules, budgets, restored values."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torchvision
from hash_weights import chex_layers, hash_gamma, hash_resnet50, hash_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_mm.graph import trace
from prune_mm.pruners import CHEX, UniformL1
from prune_mm.structures import Plan
from prune_mm.structures.slots import get_tensor

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def prepared(module: nn.Module, pruner: nn.Module, positions: dict | None = None) -> nn.Module:
    graph = trace(module, IMAGE, verify=False)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    pruner.prepare(module, graph, shapes, positions or dict.fromkeys(graph.weights, 1))
    return pruner


def published(**options: object) -> CHEX:
    """S = 0.7, delta_0 = 0.3, delta_T = 2, T_max = 180 with the published counts."""
    return CHEX(target={"channels": 0.3}, initial_regrow=0.3, interval=2, end=180, round_to=1, **options)


def begin(module: nn.Module, pruner: nn.Module) -> None:
    pruner.commit(module, pruner.start(module), 0)


@pytest.fixture(scope="module")
def explored() -> tuple[nn.Module, nn.Module, CHEX]:
    """The untouched ResNet-50, the same after the initial masks and a move of all norm scales, and its pruner."""
    original = hash_resnet50()
    module = copy.deepcopy(original)
    pruner = prepared(module, published())
    begin(module, pruner)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for number, norm in enumerate(norms, start=1):
            norm.weight.mul_((1.0 + 0.6 * hash_values(norm.num_features, 6000 + number)).float())
    return original, module, pruner


def kept(decision: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (int(mask.sum()), int(torch.nonzero(mask).sum())) for name, mask in decision.items()}


def test_it_decides_about_the_published_layers(explored):
    _, _, pruner = explored
    assert [unit.name for unit in pruner.units] == [layer["name"] for layer in chex_layers()]
    assert pruner.cost.dense_channels == 11392


def test_initial_masks_are_the_golden_ones(explored):
    _, _, pruner = explored
    found = kept(dict(pruner.masks.items()))
    assert found == {x["name"]: (x["init_keep"], x["init_mask_sum_idx"]) for x in chex_layers()}


def test_a_pure_prune_keeps_the_golden_channels(explored):
    _, module, pruner = explored
    found = kept(pruner.decide(module, step=180))
    assert found == {x["name"]: (x["step2_keep"], x["step2_sum_idx"]) for x in chex_layers()}


def test_an_early_update_swaps_channels_within_the_width_of_each_layer(explored):
    _, module, pruner = explored
    decision = pruner.decide(module, step=2)
    before = dict(pruner.masks.items())
    assert [int(m.sum()) for m in decision.values()] == [x["init_keep"] for x in chex_layers()]
    assert sum(int((decision[name] & ~before[name]).sum()) for name in decision) > 100


def test_the_last_used_scale_lets_a_layer_grow(explored):
    _, module, pruner = explored
    growing = copy.deepcopy(pruner)
    growing.dead_gamma = "last"
    counts = [int(m.sum()) for m in growing.decide(module, step=2).values()]
    assert any(count > x["init_keep"] for count, x in zip(counts, chex_layers()))


def test_dead_channels_get_back_what_they_had_when_last_alive(explored):
    original, module, pruner = explored
    restored = pruner._restored(module)
    convs = [name for name in restored if "conv" in name or name.endswith("downsample.0.weight")]
    assert len(convs) == 52
    for name in convs:
        assert torch.equal(restored[name], get_tensor(original, name)), name


def test_commit_remembers_and_masks(explored):
    _, module, pruner = explored
    module, pruner = copy.deepcopy(module), copy.deepcopy(pruner)
    restored = pruner._restored(module)
    decision = pruner.decide(module, step=180)
    pruner.commit(module, decision, 180)
    for name, tensor in restored.items():
        assert torch.equal(pruner.recent[name], tensor)
    weight = module.layer1[0].conv2.weight
    rows, columns = decision["layer1.0.conv2"], decision["layer1.0.conv1"]
    assert (weight[~rows] == 0).all()
    assert (weight[:, ~columns] == 0).all()
    assert torch.equal(weight[rows][:, columns], restored["layer1.0.conv2.weight"][rows][:, columns])
    shortcut = module.layer1[0].downsample
    dead = ~decision["layer1.0.downsample.0"]
    assert (shortcut[0].weight[dead] == 0).all()
    assert (shortcut[1].bias[dead] == 0).all()
    assert (module.layer1[0].conv3.weight.flatten(1).abs().sum(1) > 0).all()


def test_masked_resnet50_equals_its_compact_form(explored):
    _, module, pruner = explored
    module, pruner = copy.deepcopy(module), copy.deepcopy(pruner)
    pruner.commit(module, pruner.decide(module, step=2), 2)
    plan = Plan.from_json(Plan("", (tuple(pruner.structures()),)).to_json())
    small = plan.compact(copy.deepcopy(module))
    features = nn.Sequential(*list(module.children())[:-2])
    compact = nn.Sequential(*list(small.children())[:-2])
    with torch.no_grad():
        expected, found = features(IMAGE), compact(IMAGE)
    assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert sum(p.numel() for p in small.parameters()) == pruner.cost.params(pruner.counts())


def tiny() -> nn.Module:
    return torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4, width_per_group=64
    )


def spread_gammas(module: nn.Module) -> None:
    """Norm scales without ties, as after some training."""
    with torch.no_grad():
        for number, norm in enumerate(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.copy_(hash_gamma(norm.num_features, number))


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("allocation", ["gamma", "uniform"])
@given(share=st.floats(0.3, 0.95), round_to=st.sampled_from([1, 8]))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_the_target_is_met_exactly_when_exploration_ends(kind, allocation, share, round_to):
    module = tiny()
    spread_gammas(module)
    pruner = prepared(module, CHEX({kind: share}, interval=1, end=3, allocation=allocation, round_to=round_to))
    begin(module, pruner)
    for step in (1, 2, 3):
        pruner.commit(module, pruner.decide(module, step), step)
    reached = pruner.cost.of(kind, pruner.counts()) / pruner.cost.dense(kind)
    assert share - 0.08 < reached <= share
    assert all(count % round_to == 0 for count in pruner.counts())


def test_no_layer_dies_however_the_scales_are():
    module = tiny()
    spread_gammas(module)
    with torch.no_grad():
        module.layer1[0].bn1.weight.mul_(1e-6)
    pruner = prepared(module, CHEX({"macs": 0.6}, interval=1, end=2))
    begin(module, pruner)
    pruner.commit(module, pruner.decide(module, 2), 2)
    assert pruner.counts()[[u.name for u in pruner.units].index("layer1.0.conv1")] == 8


def test_decisions_depend_on_seed_and_update_only():
    module = tiny()
    spread_gammas(module)
    pruner = prepared(module, CHEX({"macs": 0.5}, interval=1, end=9))
    begin(module, pruner)
    torch.manual_seed(1)
    first = pruner.decide(module, 1)
    torch.manual_seed(2)
    again = pruner.decide(module, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    pruner.updates += 1
    other = pruner.decide(module, 1)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("options", [{"criterion": "l1"}, {"criterion": "laplacian"}, {"regrow": "uniform"}])
def test_other_criteria_and_regrow_rules_decide(options):
    module = tiny()
    spread_gammas(module)
    pruner = prepared(module, CHEX({"macs": 0.5}, interval=1, end=4, regrow_allocation="uniform", **options))
    begin(module, pruner)
    counts = [int(mask.sum()) for mask in pruner.decide(module, 1).values()]
    final = [int(mask.sum()) for mask in pruner.decide(module, 4).values()]
    assert sum(counts) > sum(final)


def test_spatial_information_ranks_channels():
    module = tiny()
    spread_gammas(module)
    pruner = prepared(module, CHEX({"channels": 0.5}, interval=1, end=1, criterion="si", round_to=1))
    begin(module, pruner)
    features = {unit.name: torch.arange(unit.channels).float() for unit in pruner.units}
    for unit, mask in zip(pruner.units, pruner.decide(module, 1, features).values()):
        assert mask[-int(mask.sum()) :].all(), unit.name


def test_updates_are_due_every_interval_and_exactly_at_the_end():
    pruner = CHEX({"macs": 0.5}, interval=3, end=10)
    assert [step for step in range(20) if pruner.due(step)] == [3, 6, 9, 10]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": {"macs": 1.3}}, "share in (0, 1]"),
        ({"target": {"macs": 0.0}}, "share in (0, 1]"),
        ({"target": {"macs": -4}}, "positive"),
        ({"target": {"macs": True}}, "number"),
        ({"target": {"flops": 0.5}}, "macs, params, channels"),
        ({"target": 0.5}, "dict"),
        ({"target": {"macs": "2 GB"}}, "'2.05G'"),
        ({"criterion": "l2"}, "css, l1, laplacian, si"),
        ({"interval": 0}, "interval=0"),
        ({"initial_regrow": 1.0}, "[0, 1)"),
        ({"temperature": 0}, "positive"),
        ({"round_to": 0}, "round_to=0"),
        ({"min_channels": 0}, "min_channels=0"),
        ({"min_channels": 1.5}, "whole number"),
        ({"end": 2.5}, "end=2.5"),
        ({"seed": "x"}, "seed='x'"),
        ({"by_epoch": "no"}, "True or False"),
        ({"prune_stem": 1}, "prune_stem=1"),
        ({"temperature": "a"}, "temperature='a'"),
        ({"initial_regrow": "x"}, "initial_regrow='x'"),
        ({"ignore": "layer4"}, "list of regular expressions"),
        ({"ignore": ["("]}, "not a regular expression"),
        ({"ignore": [3]}, "list of regular expressions"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        CHEX(**{"target": {"macs": 0.5}, **options})


@pytest.mark.parametrize(
    ("options", "epochs", "words"),
    [
        ({"end": 10}, 10, "training length of 10 epochs"),
        ({"end": 4, "interval": 5}, 10, "interval=5"),
        ({"end": 4}, None, "by_epoch=False"),
    ],
)
def test_a_schedule_that_does_not_fit_is_named(options, epochs, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        CHEX({"macs": 0.5}, **options).set_schedule(epochs, 100)


def test_the_schedule_ends_at_three_quarters_by_default():
    pruner = CHEX({"macs": 0.5}, interval=1)
    pruner.set_schedule(12, 900)
    assert pruner.end == 9


def test_a_target_out_of_reach_says_what_can_be_reached():
    with pytest.raises(ValueError, match=r"out of reach.*cannot be smaller than \d+\.\d%"):
        prepared(tiny(), CHEX({"params": 0.01}))


def test_layers_without_a_norm_keep_the_uniform_share():
    bare = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3))
    pruner = prepared(bare, CHEX({"channels": 0.5}, interval=1, end=2))
    begin(bare, pruner)
    assert [int(mask.sum()) for mask in pruner.decide(bare, 2).values()] == [32]


def test_widths_of_grouped_convolutions_are_rounded_not_their_groups():
    module = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, groups=8), nn.Conv2d(32, 4, 1))
    pruner = prepared(module, UniformL1({"macs": 0.8}, round_to=16, prune_stem=True))
    begin(module, pruner)
    assert [(unit.channels, unit.copies) for unit in pruner.units] == [(4, 8), (4, 8)]
    assert pruner.counts() == [2, 2]


def test_nothing_prunable_gives_the_reasons():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1))
    with pytest.raises(ValueError, match="nothing is prunable: 0"):
        prepared(module, UniformL1({"macs": 0.5}))
    with pytest.raises(ValueError, match="matches no prunable layer"):
        prepared(tiny(), UniformL1({"macs": 0.5}, ignore=["backbone"]))


def test_a_budget_above_the_dense_network_is_refused():
    with pytest.raises(ValueError, match="above the dense scope"):
        prepared(tiny(), UniformL1({"macs": 10**12}))


def test_what_the_options_leave_out_is_named():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(ValueError, match=r"0: reads the input of the scope \(prune_stem=True would prune it\)"):
        prepared(module, UniformL1({"macs": 0.5}))


def test_absolute_and_relative_budgets_agree():
    module = tiny()
    share = prepared(module, UniformL1({"macs": 0.6}))
    dense = share.cost.dense_macs
    absolute = prepared(module, UniformL1({"macs": round(dense * 0.6)}))
    assert share.start(module).keys() == absolute.start(module).keys()
    assert [int(m.sum()) for m in share.start(module).values()] == [
        int(m.sum()) for m in absolute.start(module).values()
    ]


def test_uniform_l1_keeps_the_largest_rows():
    original = tiny()
    module = copy.deepcopy(original)
    pruner = prepared(module, UniformL1({"macs": 0.5}))
    begin(module, pruner)
    unit = pruner.units[0]
    before = get_tensor(original, f"{unit.name}.weight").flatten(1).abs().sum(1)
    mask = pruner.masks[unit.name]
    assert before[mask].min() > before[~mask].max()
    assert pruner.status()["macs"] <= 0.5
    assert pruner.due(1) is False
