"""GConv Prune in numbers: the published solver to the digit, and that ours is never worse."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import RandomState

from prune_mm.pruners.gconv_math import (
    find_groups,
    group_sort,
    kernel_norms_l2,
    match_groups,
    taylor_scores,
)
from prune_mm.pruners.group_masks import allocate_groups, mask_of, orders_of_mask

I8, J8 = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
MATRICES = {
    "G1": RandomState(0).rand(6, 6),
    "G3": RandomState(1).rand(4, 8),
    "G4": (3 * I8**2 + 5 * J8**2 + 7 * I8 * J8 + 2 * I8 + J8) % 17 + 0.01 * I8 + 0.001 * J8,
}


def blocks(order, groups: int) -> list[list[int]]:
    return order.reshape(groups, -1).tolist()


def conv(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(RandomState(seed).randn(*shape).astype(np.float32))


# -- the published solver ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "groups", "iters", "columns", "rows", "kept"),
    [
        ("G1", 3, 0, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], None),
        ("G1", 3, 1, [4, 0, 5, 2, 1, 3], [5, 2, 0, 1, 4, 3], 6.866584191),
        ("G1", 3, 2, [0, 5, 4, 2, 1, 3], [5, 2, 0, 1, 4, 3], 8.318422141),
        ("G1", 3, 10, [0, 5, 4, 2, 1, 3], [5, 2, 0, 1, 4, 3], 8.318422141),
        ("G3", 2, 10, [6, 4, 2, 3, 7, 0, 1, 5], [0, 1, 2, 3], None),
        ("G3", 4, 1, [6, 0, 2, 3, 7, 4, 5, 1], None, None),
        ("G3", 4, 10, [6, 0, 2, 3, 7, 4, 5, 1], None, None),
        ("G4", 2, 1, [3, 7, 0, 5, 6, 2, 1, 4], [1, 4, 5, 2, 3, 0, 6, 7], 274.232),
    ],
)
def test_group_sort(matrix, groups, iters, columns, rows, kept):
    scores = MATRICES[matrix]
    found = group_sort(torch.from_numpy(scores), groups, iters)
    assert found.in_perm.tolist() == columns
    assert rows is None or found.out_perm.tolist() == rows
    assert kept is None or found.kept == pytest.approx(kept, abs=1e-8)
    by_hand = scores[np.ix_(found.out_perm, found.in_perm)] * np.kron(
        np.eye(groups), np.ones([n // groups for n in scores.shape])
    )
    assert found.kept == pytest.approx(by_hand.sum())
    assert found.out_perm.dtype == found.in_perm.dtype == torch.int64


PUBLISHED = [
    ("G1", 3, "SAME", 0, [[0, 1], [2, 3], [4, 5]], [[2, 3], [4, 5], [0, 1]], 7.644585454, 3.329655214),
    ("G1", 3, "SORT", 0, [[4, 0], [5, 1], [2, 3]], [[4, 0], [2, 5], [1, 3]], 7.887557907, 3.264876134),
    ("G1", 3, "GRPS", 1, [[4, 0], [1, 3], [5, 2]], [[0, 1], [4, 3], [5, 2]], 7.432982936, 3.386070732),
    ("G1", 3, "GRPS", 2, [[0, 5], [1, 3], [4, 2]], [[5, 2], [4, 3], [0, 1]], 8.318422141, 3.150003074),
    ("G1", 3, "GRPS", 10, [[0, 5], [1, 3], [4, 2]], [[5, 2], [4, 3], [0, 1]], 8.318422141, 3.150003074),
    ("G1", 2, "SAME", 0, [[0, 1, 2], [3, 4, 5]], None, 10.851672004, 2.474611291),
    ("G1", 2, "SORT", 0, [[4, 0, 2], [3, 5, 1]], [[0, 1, 3], [2, 5, 4]], 11.791361942, 2.224079801),
    *[
        ("G1", 2, "GRPS", n, [[4, 0, 2], [5, 1, 3]], [[2, 0, 1], [5, 4, 3]], 10.836760608, 2.478586830)
        for n in (1, 2, 10)
    ],
    ("G3", 2, "SAME", 0, [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3]], 7.821971989, 1.965585114),
    ("G3", 2, "SORT", 0, [[0, 7, 1, 5], [6, 2, 3, 4]], [[0, 3], [1, 2]], 7.434402796, None),
    *[
        ("G3", 2, "GRPS", n, [[7, 0, 1, 5], [6, 4, 2, 3]], [[2, 3], [0, 1]], 7.678541674, 2.014522538)
        for n in (1, 2, 10)
    ],
    ("G3", 4, "SAME", 0, [[0, 1], [2, 3], [4, 5], [6, 7]], [[3], [1], [2], [0]], 5.176236913, 2.868291489),
    ("G3", 4, "SORT", 0, None, None, 4.025204795, None),
    *[
        ("G3", 4, "GRPS", n, [[6, 0], [5, 1], [2, 3], [7, 4]], [[0], [3], [1], [2]], 4.973512582, 2.937459618)
        for n in (1, 2, 10)
    ],
    ("G4", 2, "SAME", 0, [[0, 1, 2, 3], [4, 5, 6, 7]], [[4, 5, 6, 7], [0, 1, 2, 3]], 273.232, 3.308713540),
    ("G4", 2, "SORT", 0, [[0, 3, 7, 1], [5, 2, 6, 4]], [[2, 0, 3, 7], [5, 1, 4, 6]], 284.232, None),
    ("G4", 2, "GRPS", 1, None, None, 274.232, None),
    *[
        ("G4", 2, "GRPS", n, [[7, 0, 5, 2], [1, 3, 6, 4]], [[1, 5, 4, 2], [3, 6, 0, 7]], 319.232, 2.730513235)
        for n in (2, 10)
    ],
    ("G4", 4, "SAME", 0, None, None, 156.616, None),
    ("G4", 4, "SORT", 0, None, None, 161.616, None),
    ("G4", 4, "GRPS", 1, [[0, 7], [1, 4], [6, 2], [3, 5]], [[5, 4], [7, 6], [1, 2], [3, 0]], 172.616, 4.573413583),
    ("G4", 4, "GRPS", 10, [[0, 7], [1, 4], [2, 6], [3, 5]], [[5, 4], [7, 6], [1, 2], [3, 0]], 172.616, 4.573413583),
]


@pytest.mark.parametrize(("matrix", "groups", "method", "iters", "inputs", "outputs", "kept", "cost"), PUBLISHED)
def test_the_published_solver(matrix, groups, method, iters, inputs, outputs, kept, cost):
    scores = MATRICES[matrix]
    found = find_groups(scores, groups, method, iters, best=False)
    assert found.kept == pytest.approx(kept, abs=1e-8)
    assert found.kept_ratio == pytest.approx(kept / scores.sum())
    assert cost is None or found.cost == pytest.approx(cost, abs=1e-8)
    assert inputs is None or blocks(found.in_perm, groups) == inputs
    assert outputs is None or blocks(found.out_perm, groups) == outputs


def test_mean_kept_ratios_of_random_matrices():
    draw = RandomState(0)
    matrices = [np.abs(draw.randn(64, 64)) for _ in range(10)]
    expected = {
        2: (0.503883, 0.507282, 0.533863, 0.541314, 0.544487),
        4: (0.259192, 0.259789, 0.296685, 0.307573, 0.313456),
        8: (0.139692, 0.139253, 0.176231, 0.184684, 0.188377),
        16: (0.082111, 0.081668, 0.110656, 0.116079, 0.119015),
    }
    for groups, means in expected.items():
        for (method, iters), mean in zip((("SAME", 0), ("SORT", 0), ("GRPS", 1), ("GRPS", 2), ("GRPS", 10)), means):
            ratios = [find_groups(m, groups, method, iters, best=False).kept_ratio for m in matrices]
            assert np.mean(ratios) == pytest.approx(mean, abs=1e-6)
        assert np.mean([find_groups(m, groups).kept_ratio for m in matrices]) > means[-1] + 0.005


def planted(draw: RandomState, size: int, groups: int) -> np.ndarray:
    """Heavy diagonal blocks among zeros, rows and columns shuffled."""
    side, matrix = size // groups, np.zeros((size, size))
    for g in range(groups):
        cut = slice(g * side, (g + 1) * side)
        matrix[cut, cut] = draw.rand(side, side) + 10 * draw.rand(side, side)
    return matrix[draw.permutation(size)][:, draw.permutation(size)]


@pytest.mark.parametrize(("groups", "expected"), [(16, 0.9838), (8, 0.9994)])
def test_planted_blocks_are_recovered(groups, expected):
    draw = RandomState(0)
    matrices = [planted(draw, 128, groups) for _ in range(40)]
    sorts = [find_groups(matrix, groups, best=False).kept_ratio for matrix in matrices]
    assert np.mean(sorts) == pytest.approx(expected, abs=0.02)
    assert min(find_groups(matrix, groups).kept_ratio for matrix in matrices[:10]) == pytest.approx(1.0)


# -- conv layers ------------------------------------------------------------------------------------------------------


def test_a_conv_layer():
    weight = conv(6, 8, 3, 3)
    scores = kernel_norms_l2(weight)
    assert scores.dtype == torch.float64
    assert scores[1, 2] == pytest.approx(float(weight[1, 2].double().square().sum().sqrt()), rel=1e-12)
    found = find_groups(scores, 2, best=False)
    assert blocks(found.in_perm, 2) == [[3, 5, 1, 0], [6, 7, 4, 2]]
    assert blocks(found.out_perm, 2) == [[4, 2, 1], [0, 3, 5]]
    assert found.cost == pytest.approx(3.13114047, abs=1e-6)
    assert found.kept_ratio == pytest.approx(0.53371978, abs=1e-6)
    for method, iters, cost in (("SAME", 0, 3.10715580), ("SORT", 0, 3.33995295), ("GRPS", 1, 3.13114047)):
        assert find_groups(scores, 2, method, iters, best=False).cost == pytest.approx(cost, abs=1e-6)
    assert find_groups(scores, 1, best=False).cost == 0.0
    mask = mask_of(found.out_perm, found.in_perm, 2)
    rows = ["".join("01"[int(x)] for x in row) for row in mask]
    assert rows == ["00101011", "11010100", "11010100", "00101011", "11010100", "00101011"]
    ids = allocate_groups(mask)
    assert (ids[0].tolist(), ids[1].tolist()) == ([2, 1, 1, 2, 1, 2], [1, 1, 2, 1, 2, 1, 2, 2])
    outputs, inputs, groups = orders_of_mask(mask)
    assert (inputs.tolist(), groups) == ([0, 1, 3, 5, 2, 4, 6, 7], 2)
    assert torch.argsort(outputs).tolist() == [3, 0, 1, 4, 2, 5]


def test_the_grouped_layer_computes_what_the_masked_one_does():
    weight, x = conv(6, 8, 3, 3), conv(2, 8, 7, 7, seed=5)
    found = find_groups(kernel_norms_l2(weight), 2, best=False)
    mask = mask_of(found.out_perm, found.in_perm, 2)
    masked = torch.nn.functional.conv2d(x, weight * mask[:, :, None, None], stride=2, padding=1)
    assert float(masked.sum()) == pytest.approx(149.704837, rel=1e-5)
    assert float(masked.abs().sum()) == pytest.approx(829.302584, rel=1e-5)
    outputs, inputs, _ = orders_of_mask(mask)
    small = torch.cat([weight[o][:, i] for o, i in zip(outputs.chunk(2), inputs.chunk(2))])
    assert small.shape == (6, 4, 3, 3)
    grouped = torch.nn.functional.conv2d(x[:, inputs], small, stride=2, padding=1, groups=2)
    assert torch.allclose(grouped[:, torch.argsort(outputs)], masked, atol=2e-6)


def test_taylor_scores():
    weight, grad = conv(6, 8, 3, 3), conv(6, 8, 3, 3, seed=1)
    scores = taylor_scores(weight, grad)
    assert float(scores.sum()) == pytest.approx(273.06668, rel=1e-6)
    assert find_groups(scores, 2, best=False).cost == pytest.approx(2.77305365, rel=1e-6)


def test_planted_kernels_are_kept():
    weight = conv(32, 32, 3, 3)
    mask = torch.block_diag(*[torch.ones(8, 8)] * 4) > 0
    weight[mask] += 100
    for best in (False, True):
        found = find_groups(kernel_norms_l2(weight), 4, best=best)
        assert torch.equal(mask_of(found.out_perm, found.in_perm, 4), mask)
    assert float(kernel_norms_l2(weight)[mask].mean()) == pytest.approx(300, abs=5)


def test_sorting_gathers_every_other_channel():
    weight = conv(16, 32, 3, 3)
    weight[::2, ::2] += 100
    scores = kernel_norms_l2(weight)
    same, sort = (find_groups(scores, 4, method, best=False).cost for method in ("SAME", "SORT"))
    assert same > sort


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 3, 5), (4, 6, 2, 3, 3)])
def test_kernels_of_any_dimension(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    by_hand = weight.detach().double().flatten(2).norm(dim=2) if len(shape) > 2 else weight.detach().double().abs()
    assert torch.allclose(kernel_norms_l2(weight), by_hand)
    assert torch.allclose(taylor_scores(weight, weight), by_hand**2)


# -- ours is never worse ----------------------------------------------------------------------------------------------

#: Best of all partitions, from the specification.
OPTIMA = [
    ("G1", 3, 8.743165956),
    ("G1", 2, 11.880538939),
    ("G3", 2, 8.375794891),
    ("G3", 4, 5.258597560),
    ("G4", 2, 353.232),
]


@pytest.mark.parametrize(("matrix", "groups", "optimum"), OPTIMA)
def test_small_problems_are_solved_to_the_optimum(matrix, groups, optimum):
    assert find_groups(MATRICES[matrix], groups).kept == pytest.approx(optimum, abs=1e-8)


@st.composite
def problems(draw):
    groups = draw(st.integers(1, 6))
    shape = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    scores = np.abs(RandomState(draw(st.integers(0, 10**6))).randn(*shape))
    if draw(st.booleans()):  # ties and zeros
        scores = np.floor(scores * 2)
    return scores, groups


@settings(max_examples=80, deadline=None)
@given(problems())
def test_the_best_groups_are_never_worse(problem):
    scores, groups = problem
    before = scores.copy()
    best = find_groups(scores, groups)
    assert np.array_equal(scores, before)
    side = [n // groups for n in scores.shape]
    identity = (scores * np.kron(np.eye(groups), np.ones(side))).sum()
    others = [find_groups(scores, groups, m, best=False).kept for m in ("SAME", "SORT", "GRPS", "RANDOM")]
    assert best.kept >= max(identity, *others) - 1e-9
    for found in (best, group_sort(scores, groups), find_groups(scores, groups, "RANDOM", seed=3)):
        assert sorted(found.out_perm.tolist()) == list(range(scores.shape[0]))
        assert sorted(found.in_perm.tolist()) == list(range(scores.shape[1]))
        mask = mask_of(found.out_perm, found.in_perm, groups)
        assert found.kept == pytest.approx(float((mask.numpy() * scores).sum()))
        assert (mask.sum(1) == side[1]).all()
        assert (mask.sum(0) == side[0]).all()
        ids = allocate_groups(mask, groups)
        assert ids is not None
        assert torch.equal(ids[0][:, None] == ids[1], mask)
        again = orders_of_mask(mask)
        assert torch.equal(mask_of(*again), mask)
    firsts = [min(block) for block in blocks(best.in_perm, groups)]
    assert firsts == sorted(firsts)
    assert 0.0 <= best.kept_ratio <= 1.0 + 1e-12


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, 1000))
def test_matching_is_the_best_pairing_of_blocks(problem, seed):
    scores, groups = problem
    rows, columns = (RandomState(seed).permutation(n) for n in scores.shape)
    found = match_groups(scores, rows, columns, groups)
    assert {frozenset(b) for b in blocks(found.out_perm, groups)} == {frozenset(b) for b in blocks(rows, groups)}
    assert {frozenset(b) for b in blocks(found.in_perm, groups)} == {frozenset(b) for b in blocks(columns, groups)}
    for _ in range(5):
        shuffled = rows.reshape(groups, -1)[RandomState(seed).permutation(groups)].ravel()
        mask = mask_of(torch.from_numpy(shuffled), torch.from_numpy(columns), groups).numpy()
        assert found.kept >= (mask * scores).sum() - 1e-9


def test_a_layer_above_the_limit_of_exact_assignment():
    scores = np.abs(RandomState(0).randn(384, 192))
    for groups in (2, 3, 8, 64):
        published, found = find_groups(scores, groups, best=False), find_groups(scores, groups)
        assert found.kept > published.kept
        again = find_groups(torch.from_numpy(scores), groups)
        assert torch.equal(found.out_perm, again.out_perm)
        assert torch.equal(found.in_perm, again.in_perm)


def test_zeros_lose_nothing():
    for best in (False, True):
        found = find_groups(np.zeros((4, 8)), 2, best=best)
        assert (found.kept, found.kept_ratio, found.cost) == (0.0, 1.0, 0.0)
        assert found.in_perm.tolist() == list(range(8))


def test_random_groups_depend_on_the_seed_only():
    scores = np.abs(RandomState(0).randn(32, 32))
    first, second, third = (find_groups(scores, 4, "RANDOM", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.out_perm, second.out_perm)
    assert not torch.equal(first.out_perm, third.out_perm)


def test_the_largest_layer_of_a_resnet50_is_quick():
    scores = np.abs(RandomState(0).randn(2048, 1024))
    start = time.perf_counter()
    assert find_groups(scores, 2).kept_ratio > 0.513
    assert time.perf_counter() - start < 3.0  # 0.2 s on an idle core


# -- masks and orders -------------------------------------------------------------------------------------------------


def test_groups_of_small_masks():
    ones = torch.ones(2, 2)
    assert [ids.tolist() for ids in allocate_groups(ones)] == [[1, 1], [1, 1]]
    assert allocate_groups(ones, 1) is not None
    assert allocate_groups(ones, 2) is None
    diagonal = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    assert [ids.tolist() for ids in allocate_groups(diagonal, 2)] == [[1, 1, 2, 2], [1, 1, 2, 2]]
    assert [ids.tolist() for ids in allocate_groups(diagonal.flip(0))] == [[2, 2, 1, 1], [1, 1, 2, 2]]
    woven = np.array([[0, 1, 0, 1], [1, 0, 1, 0]] * 2)
    assert [ids.tolist() for ids in allocate_groups(woven)] == [[2, 1, 2, 1], [1, 2, 1, 2]]


def test_orders_of_small_masks():
    parity = torch.tensor([[r % 2 == c % 2 for c in range(4)] for r in range(8)])
    outputs, inputs, groups = orders_of_mask(parity)
    assert (inputs.tolist(), groups) == ([0, 2, 1, 3], 2)
    assert torch.argsort(outputs).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert outputs.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    mask = torch.ones(32, 16)
    mask[:16, :8] = mask[16:, 8:] = 0
    outputs, inputs, _ = orders_of_mask(mask)
    assert inputs.tolist() == list(range(16))
    assert torch.argsort(outputs).tolist() == [*range(16, 32), *range(16)]


def test_what_is_no_group_sparsity_pattern():
    mask = torch.block_diag(torch.ones(16, 16), torch.ones(16, 16)).flip(0)
    assert allocate_groups(mask, 2) is not None
    mask[15, 15], mask[15, 16], mask[16, 15], mask[16, 16] = 1, 0, 1, 0
    assert allocate_groups(mask, 2) is None
    with pytest.raises(ValueError, match="the 32x32 mask is no group sparsity pattern"):
        orders_of_mask(mask)
    for rows in (["110", "110", "001"], ["11", "00"], ["10", "10"], ["1100", "0010", "0001"]):
        assert allocate_groups(torch.tensor([[int(x) for x in row] for row in rows])) is None


def test_more_groups_than_fit_a_byte():
    mask = torch.eye(512)[torch.randperm(512, generator=torch.Generator().manual_seed(0))]
    outputs, inputs, groups = orders_of_mask(mask)
    assert groups == 512
    assert torch.equal(mask_of(outputs, inputs, 512), mask > 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"groups": 4}, "groups=4 does not divide 6 channels; it must be a divisor of 2"),
        ({"groups": 0}, "groups=0 must be a whole number of at least 1"),
        ({"groups": 2.0}, "groups=2.0 must be a whole number"),
        ({"method": "grps"}, "method='grps' must be one of GRPS, SORT, SAME, RANDOM"),
        ({"sort_iters": -1}, "sort_iters=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"scores": np.zeros((4, 4, 3))}, r"scores have shape (4, 4, 3)"),
        ({"scores": np.zeros((0, 4))}, r"scores have shape (0, 4)"),
        ({"scores": np.array([[1.0, np.nan], [np.inf, 1.0]])}, "2 of 4 scores are not finite"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=r".") as caught:
        find_groups(**{"scores": np.ones((8, 6)), "groups": 2, **arguments})
    assert words in str(caught.value)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors_of_the_helpers():
    with pytest.raises(ValueError, match="out_perm of shape"):
        match_groups(np.ones((4, 4)), [0, 1, 1, 2], [0, 1, 2, 3], 2)
    with pytest.raises(ValueError, match="in_perm of shape"):
        mask_of(torch.arange(4), torch.tensor([0, 1, 2, 4]), 2)
    with pytest.raises(ValueError, match="grad has shape"):
        taylor_scores(torch.ones(2, 2), torch.ones(2, 3))
    with pytest.raises(ValueError, match="needs an output and an input axis"):
        kernel_norms_l2(torch.ones(4))
    with pytest.raises(ValueError, match="mask has shape"):
        allocate_groups(torch.ones(4))
