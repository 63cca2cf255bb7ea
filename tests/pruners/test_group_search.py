"""The search of group counts: the published trace to the digit, and ours against exhaustive search."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import RandomState

from prune_mm.pruners.gconv_math import find_groups, kernel_norms_l2
from prune_mm.pruners.group_search import (
    candidate_groups,
    parse_budget,
    run_group_search,
    search_groups,
)
from prune_mm.pruners.knapsack import solve_knapsack

#: Parameters and operations of the toy network outside its searched layers: stem, norm, classifier.
TOY_PARAMS = 216 + 64 + 330
TOY_OPS = 442368 + 65536 + 630


@pytest.fixture(scope="module")
def toy() -> dict[str, np.ndarray]:
    """Three convolutions of the specification's toy network; the stem is drawn but not searched."""
    draw = RandomState(7)
    shapes = {"stem": (8, 3, 3, 3), "a": (16, 8, 3, 3), "b": (16, 16, 3, 3), "c": (32, 16, 1, 1)}
    weights = {name: draw.randn(*shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: weights[name] for name in "abc"}


def preresnet164() -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Weights and output positions of all convolutions but the stem, in the order of ``named_modules``."""
    shapes, positions, inputs = {}, {}, 16
    for stage, width in enumerate((16, 32, 64), 1):
        side = 2 ** (6 - stage)
        for block in range(18):
            name, first = f"layer{stage}.{block}", block == 0
            before = 2 * side if first and stage > 1 else side
            shapes[f"{name}.conv1"], positions[f"{name}.conv1"] = (width, inputs, 1, 1), before**2
            shapes[f"{name}.conv2"] = (width, width, 3, 3)
            shapes[f"{name}.conv3"] = (4 * width, width, 1, 1)
            if first:
                shapes[f"{name}.downsample.0"] = (4 * width, inputs, 1, 1)
            positions |= {layer: side**2 for layer in shapes if layer not in positions}
            inputs = 4 * width
    draw = RandomState(0)
    weights = {
        name: (draw.randn(*shape) * np.sqrt(2 / (shape[0] * shape[2] * shape[3]))).astype(np.float32)
        for name, shape in shapes.items()
    }
    return weights, positions


# -- the published search ---------------------------------------------------------------------------------------------


def states(result) -> list[tuple[tuple[int, ...], int, float]]:
    """Counts, parameters and cost after every step."""
    counts, found = {layer.name: layer.counts[-1] for layer in result.layers}, []
    for step in result.trace:
        if step.layer is not None:
            assert counts[step.layer] == step.before
            counts[step.layer] = step.after
        found.append((tuple(counts.values()), step.params, step.cost))
    return found


def same_states(result, expected) -> None:
    found = states(result)
    assert [state[:2] for state in found] == [state[:2] for state in expected]
    assert [state[2] for state in found] == pytest.approx([state[2] for state in expected], rel=1e-6)
    assert tuple(result.groups.values()) == expected[-1][0]


def test_the_published_costs(toy):
    relative = run_group_search(toy, 3000, 2, TOY_PARAMS, published=True)
    absolute = run_group_search(toy, 3000, 2, TOY_PARAMS, published=True, relative=False)
    expected = {
        "a": ([1, 2, 4], [0, 0.01483380, 0.02156083], 362.530640, [0, 5.37770653, 7.81646013]),
        "b": (
            [1, 2, 4, 8],
            [0, 0.00991234, 0.01483771, 0.01758256],
            750.733765,
            [0, 7.44152832, 11.13916779, 13.19982052],
        ),
        "c": (
            [1, 2, 4, 8],
            [0, 0.02023663, 0.02864408, 0.03513806],
            399.460876,
            [0, 8.08374212, 11.44219112, 14.03627872],
        ),
    }
    for one, other in zip(relative.layers, absolute.layers):
        counts, costs, norm, absolute_costs = expected[one.name]
        assert list(one.counts) == list(other.counts) == counts
        assert one.costs == pytest.approx(costs, rel=1e-6, abs=1e-8)
        assert one.norm == pytest.approx(norm, rel=1e-6)
        assert other.costs == pytest.approx(absolute_costs, rel=1e-6)
    assert relative.dense_params == 4578


TRACE = [
    ((4, 8, 8), 1250, 0.024760479),
    ((4, 4, 8), 1538, 0.023845529),
    ((4, 2, 8), 2114, 0.022203742),
    ((4, 2, 4), 2178, 0.020039083),
    ((2, 2, 4), 2466, 0.017796742),
    ((2, 2, 2), 2594, 0.014994256),
    ((2, 1, 2), 3746, 0.011690143),
]


def test_the_published_trace(toy):
    result = run_group_search(toy, 3000, 2, TOY_PARAMS, published=True)
    same_states(result, TRACE)
    assert result.params == 3746 > 3000
    assert not result.proven
    assert search_groups(toy, 0.0030e6, 2, TOY_PARAMS, published=True) == {"a": 2, "b": 1, "c": 2}


def test_the_published_trace_by_absolute_costs(toy):
    result = run_group_search(toy, 3000, 2, TOY_PARAMS, published=True, relative=False)
    counts = [(4, 8, 8), (4, 4, 8), (2, 4, 8), (2, 4, 4), (2, 4, 2), (2, 2, 2), (1, 2, 2)]
    params = [1250, 1538, 1826, 1890, 2018, 2594, 3170]
    costs = [0.023171794, 0.021809580, 0.020197423, 0.018482577, 0.016262447, 0.013818091, 0.010263112]
    same_states(result, list(zip(counts, params, costs)))


def test_published_searches_with_other_limits(toy):
    result = run_group_search(toy, 2500, 4, TOY_PARAMS, published=True)
    assert [s[:2] for s in states(result)] == [((2, 4, 4), 1890), ((2, 2, 4), 2466), ((2, 2, 2), 2594)]
    with pytest.raises(ValueError, match=r"max_params=1,200 is too restrictive.* still has 1,890 parameters"):
        run_group_search(toy, 1200, 4, TOY_PARAMS, published=True)
    whole = run_group_search(toy, "100M", 2, TOY_PARAMS, published=True)
    assert set(whole.groups.values()) == {1}
    assert len(whole.trace) == 9
    assert whole.params == 4578


def test_a_published_search_by_operations(toy):
    twice = dict.fromkeys(toy, 2 * 1024)  # the published counter has two operations a multiply-add
    options = {"max_macs": 4_000_000, "fixed_macs": TOY_OPS, "positions": twice, "published": True}
    result = run_group_search(toy, None, 2, TOY_PARAMS, **options)
    assert result.dense_macs == 8634998
    assert tuple(result.groups.values()) == (2, 2, 4)
    assert result.macs > 4_000_000 >= result.trace[-2].macs


def test_the_published_search_of_preresnet164():
    weights, positions = preresnet164()
    assert len(weights) == 165
    assert sum(weight.size for weight in weights.values()) == 1_676_464 - 432
    result = run_group_search(
        weights,
        "1.44M",
        8,
        1_726_388 - (1_676_464 - 432),
        published=True,
        positions={name: 2 * count for name, count in positions.items()},
        fixed_macs=504_790_944 - 2 * sum(weights[name].size * positions[name] for name in weights),
    )
    assert result.dense_macs == 504_790_944
    assert (result.trace[0].params, result.trace[0].cost) == (326_196, pytest.approx(0.067596875, rel=1e-6))
    assert len(result.trace) - 1 == 251
    assert [(s.layer, s.before, s.after) for s in result.trace[1:6]] == [
        ("layer3.0.downsample.0", 16, 8),
        ("layer3.1.conv1", 8, 4),
        ("layer3.2.conv1", 8, 4),
        ("layer3.12.conv1", 8, 4),
        ("layer3.8.conv1", 8, 4),
    ]
    assert (result.params, result.cost) == (1_446_964, pytest.approx(0.033019561, rel=1e-6))
    assert result.macs == 364_281_760
    assert Counter(result.groups.values()) == {1: 84, 2: 81}
    assert (result.trace[-1].layer, result.trace[-2].params) == ("layer3.15.conv2", 1_428_532)


# -- ours -------------------------------------------------------------------------------------------------------------


def best_of_all(result, max_params: float, max_macs: float = math.inf, fixed: tuple[int, int] = (0, 0)) -> float:
    """The cheapest sum of costs within the budgets, by trying every state."""
    best = math.inf
    for state in itertools.product(*[range(len(layer.counts)) for layer in result.layers]):
        taken = [(layer, index) for layer, index in zip(result.layers, state)]
        params = fixed[0] + sum(layer.params[index] for layer, index in taken)
        macs = fixed[1] + sum(layer.macs[index] for layer, index in taken)
        if params <= max_params and macs <= max_macs:
            best = min(best, sum(layer.costs[index] for layer, index in taken))
    return best


@st.composite
def networks(draw):
    count, seed = draw(st.integers(1, 4)), draw(st.integers(0, 10**6))
    generator = RandomState(seed)
    sides = [2, 4, 6, 8, 12, 16]
    weights = {
        f"layer{n}": generator.randn(generator.choice(sides), generator.choice(sides), *[generator.choice([1, 3])] * 2)
        for n in range(count)
    }
    positions = {name: int(generator.choice([16, 64, 256])) for name in weights}
    return weights, positions, int(generator.randint(0, 300)), generator


@settings(max_examples=40, deadline=None)
@given(networks(), st.booleans(), st.sampled_from(["params", "macs", "both"]), st.booleans())
def test_the_search_finds_the_optimum_within_the_budget(network, relative, kind, depthwise):
    weights, positions, fixed, draw = network
    options = {"positions": positions, "relative": relative, "allow_depthwise": depthwise, "fixed_macs": 100}
    whole = run_group_search(weights, 1.0, 1, fixed, **options)
    assert set(whole.groups.values()) == {1}
    assert whole.proven
    least = whole.trace[0]
    limits = [
        small + (large - small) * draw.rand()
        for small, large in ((least.params, whole.dense_params), (least.macs, whole.dense_macs))
    ]
    max_params, max_macs = limits[0] if kind != "macs" else None, limits[1] if kind != "params" else None
    result = run_group_search(weights, max_params, 1, fixed, max_macs=max_macs, **options)
    assert result.proven
    assert max_params is None or result.params <= max_params
    assert max_macs is None or result.macs <= max_macs
    optimum = best_of_all(result, max_params or math.inf, max_macs or math.inf, (fixed, 100))
    scale = 1 / len(weights) if relative else 1 / sum(layer.norm for layer in result.layers)
    assert result.cost == pytest.approx(scale * optimum, abs=1e-12)
    first = run_group_search(weights, max_params, 1, fixed, max_macs=max_macs, strategy="MAX_COST", **options)
    assert result.cost <= first.cost + 1e-12
    assert first.params <= (max_params or math.inf)


def test_costs_are_lost_shares_of_the_norm(toy):
    result = run_group_search(toy, 3000, 2, TOY_PARAMS)
    lost = 0.0
    for layer in result.layers:
        for index, count in enumerate(layer.counts):
            found = find_groups(kernel_norms_l2(torch.from_numpy(toy[layer.name])), count)
            assert layer.costs[index] == pytest.approx(1 - found.kept_ratio, abs=1e-12)
            assert layer.kept[index] == pytest.approx(found.kept)
        lost += layer.costs[layer.counts.index(result.groups[layer.name])]
    assert result.cost == pytest.approx(lost / 3)
    assert result.params <= 3000
    assert result.params == TOY_PARAMS + sum(toy[n].size // g for n, g in result.groups.items())
    assert 0 < result.kept_ratio < 1


def test_shares_are_of_the_dense_network(toy):
    half = run_group_search(toy, 0.5, 2, TOY_PARAMS)
    assert half.params <= 4578 / 2
    assert half.groups == run_group_search(toy, 2289, 2, TOY_PARAMS).groups
    pairs = [(name, torch.from_numpy(weight)) for name, weight in toy.items()]
    assert search_groups(pairs, 0.5, 2, TOY_PARAMS) == half.groups


def test_groups_are_no_smaller_than_asked(toy):
    for least in (1, 2, 4, 8):
        result = run_group_search(toy, None, least, max_macs=0.7, positions=dict.fromkeys(toy, 10))
        for name, count in result.groups.items():
            assert min(toy[name].shape[:2]) // count >= least or count == 1


def test_a_large_search_is_proven_and_quick():
    weights, positions = preresnet164()
    start, calls = time.perf_counter(), []
    result = run_group_search(
        weights, 0.5, 8, max_macs=0.6, positions=positions, progress=lambda done, total: calls.append((done, total))
    )
    assert time.perf_counter() - start < 20  # 1.5 s on an idle core
    assert result.proven
    assert result.params <= 0.5 * result.dense_params
    assert result.macs <= 0.6 * result.dense_macs
    assert calls == [(n + 1, 165) for n in range(165)]
    assert all(step.params < after.params for step, after in zip(result.trace, result.trace[1:]))


def test_capped_states_still_fit(monkeypatch):
    monkeypatch.setattr("prune_mm.pruners.knapsack._MOST_STATES", 3)
    draw = RandomState(0)
    costs = [np.sort(draw.rand(5)) for _ in range(30)]
    sizes = [np.sort(draw.randint(1, 10**6, size=(5, 2)), axis=0)[::-1] for _ in range(30)]
    capacity = sum(size.mean(axis=0) for size in sizes).astype(np.int64)
    state, proven = solve_knapsack(costs, sizes, capacity, [4] * 30)
    assert not proven
    assert (sum(size[index] for size, index in zip(sizes, state)) <= capacity).all()
    monkeypatch.undo()
    best, proven = solve_knapsack(costs, sizes, capacity, [4] * 30)
    cost, least = (sum(c[i] for c, i in zip(costs, s)) for s in (state, best))
    assert proven
    assert least <= cost <= 1.05 * least


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 2), st.booleans(), st.integers(0, 10**6))
def test_knapsacks_against_exhaustive_search(items, budgets, ties, seed):
    draw = RandomState(seed)
    costs, sizes = [], []
    for _ in range(items):
        count = draw.randint(1, 6)
        costs.append(np.sort(np.round(draw.rand(count), 1) if ties else draw.rand(count)))
        sizes.append(np.stack([draw.randint(1, 40, size=budgets) * 64 // 2**k for k in range(count)]))
        sizes[-1] = np.sort(sizes[-1], axis=0)[::-1]
    least, most = sum(s[-1] for s in sizes), sum(s[0] for s in sizes)
    capacity = (least + (most - least) * draw.rand(budgets)).astype(np.int64)
    state, proven = solve_knapsack(costs, sizes, capacity, [len(c) - 1 for c in costs])
    fitting = [
        sum(c[i] for c, i in zip(costs, s))
        for s in itertools.product(*[range(len(c)) for c in costs])
        if (sum(size[i] for size, i in zip(sizes, s)) <= capacity).all()
    ]
    assert proven
    assert (sum(size[i] for size, i in zip(sizes, state)) <= capacity).all()
    assert sum(c[i] for c, i in zip(costs, state)) == pytest.approx(min(fitting), abs=1e-12)


def test_grouped_layers_are_divided_inside_their_groups():
    weight = np.zeros((16, 4))
    weight[:8] = np.kron(np.eye(2), np.ones((4, 2)))
    weight[8:] = np.kron(np.eye(2), np.ones((4, 2)))[::-1]
    result = run_group_search({"a": weight, "b": np.ones((8, 8))}, 0.7, 2, bases={"a": 2})
    assert result.layers[0].counts == (1, 2)
    assert result.layers[0].costs == (0.0, 0.0)
    assert result.groups == {"a": 2, "b": 2}
    assert result.dense_params == 128
    assert result.params == 64


def test_zero_layers_become_as_small_as_need_be():
    result = run_group_search({"a": np.zeros((8, 8)), "b": np.ones((8, 8))}, 0.7, 2)
    assert result.groups["b"] == 1
    assert result.cost == 0.0


# -- candidates and budgets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((16, 8), [1, 2, 4, 8]),
        ((16, 8, 2), [1, 2, 4]),
        ((16, 16), [1, 2, 4, 8]),
        ((16, 16, 1, 64, True), [1, 2, 4, 8, 16]),
        ((24, 36), [1, 2, 3, 4, 6, 12]),
        ((24, 36, 4), [1, 2, 3, 4, 6]),
        ((24, 36, 5), [1, 2, 3, 4]),
        ((512, 512), [1, 2, 4, 8, 16, 32, 64]),
        ((512, 512, 1, 8), [1, 2, 4, 8]),
        ((64, 3), [1]),
        ((4, 4, 100), [1]),
        ((1, 1), [1]),
        ((16, 8, 0), [1, 2, 4, 8]),
    ],
)
def test_candidate_groups(arguments, expected):
    assert candidate_groups(*arguments) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [(12, 12), (1.44e6, 1_440_000), ("1.44M", 1_440_000), (0.5, 500), (1.0, 1000), (0.1, 100), (2500.7, 2500)],
)
def test_budgets(given, expected):
    assert parse_budget("max_params", given, 1000) == expected


def test_large_budgets_are_exact():
    assert parse_budget("max_macs", 10**15 + 1, 10) == 10**15 + 1
    for dense in range(1, 300):
        assert parse_budget("max_params", 0.29, dense) <= 0.29 * dense < parse_budget("max_params", 0.29, dense) + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_params": None}, "a budget is needed: max_params, max_macs or both"),
        ({"max_params": 0.0}, "max_params=0.0 must be a share in (0, 1]"),
        ({"max_params": -5}, "max_params=-5 must be positive"),
        ({"max_params": "5X"}, "max_params='5X' is not a number such as"),
        ({"max_params": math.nan}, "max_params=nan must be a share"),
        ({"max_params": True}, "max_params=True must be a number"),
        ({"max_params": 10}, "max_params=10 is too restrictive"),
        ({"max_macs": 0.5}, "max_macs=0.5 needs positions"),
        ({"max_macs": 0.01, "positions": {"a": 4, "b": 4}}, "the network still has"),
        ({"positions": {"a": 4}}, "positions lack the layer 'b'"),
        ({"positions": {"a": 4, "b": -1}}, "positions['b']=-1"),
        ({"min_channels": -1}, "min_channels=-1"),
        ({"max_groups": 0}, "max_groups=0"),
        ({"bases": {"a": 3}}, "bases['a']=3 does not divide its 8 outputs"),
        ({"bases": {"a": 0}}, "bases['a']=0"),
        ({"fixed_params": 0.5}, "fixed_params=0.5"),
        ({"fixed_macs": -1}, "fixed_macs=-1"),
        ({"strategy": "ILP"}, "strategy='ILP' must be one of OPTIMAL, MAX_COST"),
        ({"strategy": "OPTIMAL", "published": True}, "published=True repeats the published search"),
        ({"relative": 1}, "relative=1 must be True or False"),
        ({"allow_depthwise": None}, "allow_depthwise=None must be True or False"),
        ({"layers": {}}, "there are no layers"),
        ({"layers": [("a", np.ones((2, 2)))] * 2}, "layer 'a' is given twice"),
        ({"layers": {"a": np.ones(4)}}, "the weight of 'a' has shape (4,)"),
        ({"layers": {"a": np.full((2, 2), np.nan)}}, "the weight of 'a' holds NaN or infinite values"),
    ],
)
def test_errors(arguments, words):
    layers = {"a": np.ones((8, 8)), "b": np.ones((8, 4))}
    with pytest.raises(ValueError, match=r".") as caught:
        run_group_search(**{"layers": layers, "max_params": 0.8, "min_channels": 2, **arguments})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
