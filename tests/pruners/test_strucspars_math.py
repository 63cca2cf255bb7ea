"""StrucSpars in numbers: tiers, levels, the regulariser, the threshold, the coefficient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune_mm.pruners.strucspars_math import (
    active_coefficient,
    bisect_threshold,
    cost_matrix,
    depth,
    find_threshold,
    group_level,
    kernel_norms,
    level_fractions,
    level_mask,
    model_sparsity,
    next_coefficient,
    regularizer,
    tier_masses,
)


def block_diagonal(blocks: int, size: int) -> Tensor:
    return torch.block_diag(*[torch.ones(size, size) for _ in range(blocks)])


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


sides = st.integers(1, 24)
halvable = st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3)).map(
    lambda t: (2 ** t[0] * t[1], 2 ** t[0] * t[2])
)


class TestTiers:
    @pytest.mark.parametrize(
        ("out", "into", "expected"),
        [
            (64, 64, 6), (64, 256, 6), (128, 256, 7), (512, 512, 9), (2048, 1024, 10), (16, 16, 4), (128, 160, 5),
            (32, 128, 5), (128, 896, 7), (3, 8, 0), (6, 6, 1), (1, 1, 0),
        ],
    )  # fmt: skip
    def test_depth(self, out, into, expected):
        assert depth(out, into) == expected

    def test_square(self):
        cost = cost_matrix(8, 8)
        assert cost.dtype == torch.float64
        assert cost[0].tolist() == [0, 0.25, 0.5, 0.5, 1, 1, 1, 1]
        assert cost[1].tolist() == [0.25, 0, 0.5, 0.5, 1, 1, 1, 1]
        assert torch.equal(cost, cost.T)

    def test_wide(self):
        cost = cost_matrix(4, 8)
        assert cost[0].tolist() == [0, 0, 0.5, 0.5, 1, 1, 1, 1]
        assert cost[1].tolist() == [0.5, 0.5, 0, 0, 1, 1, 1, 1]

    def test_odd_halves_stop_the_splits(self):
        expected = torch.ones(6, 4, dtype=torch.float64)
        expected[:3, :2] = expected[3:, 2:] = 0
        assert torch.equal(cost_matrix(6, 4), expected)
        assert not cost_matrix(3, 3).any()

    def test_power_and_levels(self):
        assert cost_matrix(4, 4, power=0.25)[0].tolist() == [0, 0.25, 1, 1]
        assert cost_matrix(8, 8, levels=1).unique().tolist() == [0, 1]
        assert not cost_matrix(8, 8, levels=0).any()
        assert torch.equal(cost_matrix(8, 8, levels=100), cost_matrix(8, 8))

    @given(halvable)
    def test_every_tier_has_its_value(self, shape):
        tiers = depth(*shape)
        values = cost_matrix(*shape).unique().tolist()
        assert values == sorted({0.0} | {0.5**t for t in range(tiers)})

    @given(halvable, st.integers(0, 2**32 - 1))
    @settings(deadline=None)
    def test_masses_are_those_of_the_cost_matrix(self, shape, seed):
        norms = np.random.default_rng(seed).random(shape)
        masses, cost = tier_masses(norms), cost_matrix(*shape).numpy()
        expected = [norms[cost == 0.5**t].sum() for t in range(depth(*shape))] + [norms[cost == 0].sum()]
        np.testing.assert_allclose(masses, expected, rtol=1e-12)

    def test_masses_of_many_tiers(self):
        norms = torch.rand(128, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        cost = cost_matrix(128, 256)
        expected = [norms[cost == 0.5**t].sum().item() for t in range(7)] + [norms[cost == 0].sum().item()]
        np.testing.assert_allclose(tier_masses(norms), expected, rtol=1e-12)

    @pytest.mark.parametrize("bad", [{"power": 0.0}, {"power": 1.5}, {"power": math.nan}, {"levels": -1}])
    def test_bad_arguments_are_named(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            cost_matrix(8, 8, **bad)

    def test_no_channels(self):
        with pytest.raises(ValueError, match="0 x 8"):
            cost_matrix(0, 8)


class TestMask:
    def test_two_groups(self):
        mask = level_mask(4, 8, 2)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, torch.block_diag(torch.ones(2, 4), torch.ones(2, 4)).bool())

    def test_deepest(self):
        mask = level_mask(4, 8, 3)
        assert [row.nonzero().flatten().tolist() for row in mask] == [[2 * r, 2 * r + 1] for r in range(4)]

    @pytest.mark.parametrize("level", [0, 4, -1])
    def test_a_level_the_layer_lacks(self, level):
        with pytest.raises(ValueError, match=f"levels 1 to 3 .*got level {level}"):
            level_mask(4, 8, level)

    @given(halvable, st.data())
    def test_agrees_with_the_cost(self, shape, data):
        level = data.draw(st.integers(1, depth(*shape) + 1))
        mask = level_mask(*shape, level)
        assert torch.equal(mask, cost_matrix(*shape, levels=level - 1) == 0)
        assert mask.sum().item() * 2 ** (level - 1) == mask.numel()


class TestLevel:
    def test_fractions(self):
        np.testing.assert_allclose(level_fractions(torch.ones(8, 8)), [1, 0.5, 0.25, 0.125], rtol=1e-12)
        assert level_fractions(torch.zeros(4, 4)).tolist() == [0, 0, 0]

    @pytest.mark.parametrize(
        ("norms", "threshold", "published", "fixed"),
        [
            (torch.ones(8, 8), 0.1, 1, 1),
            (torch.ones(8, 8), 0.5, 1, 1),
            (torch.ones(8, 8), 0.6, 2, 2),
            (torch.ones(8, 8), 0.8, 3, 3),
            (torch.ones(8, 8), 0.9, 3, 4),
            (torch.ones(8, 8), 1.0, 3, 4),
            (block_diagonal(2, 4), 0.1, 2, 2),
            (block_diagonal(4, 2), 0.1, 3, 3),
            (torch.eye(8), 0.1, 3, 4),
            (torch.eye(6), 0.1, 1, 2),
            (torch.ones(3, 3), 0.1, 0, 1),
            (torch.ones(3, 8), 1.0, 0, 1),
            (torch.zeros(8, 8), 0.1, 0, 4),
            (torch.zeros(3, 3), 0.0, 0, 1),
            (torch.ones(8, 8), 0.0, 0, 1),
            (block_diagonal(4, 2), 0.0, 0, 3),
            (torch.eye(8), 0.0, 0, 4),
        ],
    )
    def test_golden(self, norms, threshold, published, fixed):
        assert group_level(norms, threshold, faithful=True) == published
        assert group_level(norms, threshold) == fixed
        assert group_level(norms.numpy(), threshold) == fixed

    @given(halvable, st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
    @settings(deadline=None)
    def test_more_threshold_never_means_fewer_groups(self, shape, seed, a, b):
        norms = np.random.default_rng(seed).random(shape) ** 4
        low, high = group_level(norms, min(a, b)), group_level(norms, max(a, b))
        assert 1 <= low <= high <= depth(*shape) + 1

    @given(halvable, st.integers(0, 2**32 - 1), st.floats(0, 0.999))
    @settings(deadline=None)
    def test_no_more_mass_is_lost_than_allowed(self, shape, seed, threshold):
        norms = torch.from_numpy(np.random.default_rng(seed).random(shape) ** 8)
        mask = level_mask(*shape, group_level(norms, threshold))
        assert norms[~mask].sum().item() <= threshold * norms.sum().item() + 1e-9

    @pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
    def test_bad_threshold(self, threshold):
        with pytest.raises(ValueError, match=r"threshold.*\[0, 1\]"):
            group_level(torch.ones(4, 4), threshold)

    @pytest.mark.parametrize(
        ("norms", "message"),
        [
            (torch.tensor([[1.0, math.nan], [0, 1]]), r"NaN or infinite values \(1 of 4\)"),
            (torch.tensor([[1.0, math.inf], [0, 1]]), r"NaN or infinite values \(1 of 4\)"),
            (torch.tensor([[1.0, -2.0], [0, 1]]), "negative values .lowest -2.0"),
            (torch.ones(2, 2, 2), r"shape \(2, 2, 2\)"),
            (torch.ones(0, 2), r"shape \(0, 2\)"),
        ],
    )
    def test_bad_norms(self, norms, message):
        with pytest.raises(ValueError, match=f"ordered_norms.*{message}"):
            group_level(norms, 0.1)


class TestRegularizer:
    WEIGHT = torch.tensor([[1.0, -2, 3, -4], [0, 5, -6, 7], [-8, 9, 1, -1], [2, -2, 0, 3]], dtype=torch.float64)

    def test_level_one_in_place(self):
        term = 0.1 * self.WEIGHT.sign() * regularizer(torch.arange(4), torch.arange(4), 1)
        expected = [[0, 0, 0.1, -0.1], [0, 0, -0.1, 0.1], [-0.1, 0.1, 0, 0], [0.1, -0.1, 0, 0]]
        torch.testing.assert_close(term, torch.tensor(expected, dtype=torch.float64))

    def test_permuted(self):
        matrix = regularizer(index(2, 0, 3, 1), index(1, 3, 0, 2), 2)
        assert matrix.tolist() == [[1, 0.5, 1, 0], [0.5, 1, 0, 1], [1, 0, 1, 0.5], [0, 1, 0.5, 1]]
        expected = [[0.1, -0.05, 0.1, 0], [0, 0.1, 0, 0.1], [-0.1, 0, 0.1, -0.05], [0, -0.1, 0, 0.1]]
        term = 0.1 * self.WEIGHT.sign() * matrix
        torch.testing.assert_close(term, torch.tensor(expected, dtype=torch.float64))

    @given(st.permutations(range(8)), st.permutations(range(4)), st.integers(1, 3))
    def test_ordering_it_gives_the_cost_back(self, rows, columns, level):
        matrix = regularizer(index(*rows), index(*columns), level, power=0.25)
        assert torch.equal(matrix[rows][:, columns], cost_matrix(8, 4, level, 0.25))

    def test_the_last_level_has_no_next_tier(self):
        place = torch.arange(8)
        assert torch.equal(regularizer(place, place, 4), cost_matrix(8, 8))
        assert torch.equal(regularizer(place, place, 3), cost_matrix(8, 8))
        with pytest.raises(ValueError, match="levels 1 to 4"):
            regularizer(place, place, 5)


class TestKernelNorms:
    def test_sums_over_every_kernel(self):
        weight = torch.randn(4, 3, 3, 5, requires_grad=True)
        norms = kernel_norms(weight)
        assert norms.shape == (4, 3)
        assert norms.dtype == torch.float64
        assert not norms.requires_grad
        torch.testing.assert_close(norms, weight.detach().double().abs().sum(dim=(2, 3)))

    @pytest.mark.parametrize("kernel", [(), (3,), (1, 1), (1, 2, 2)])
    def test_any_number_of_kernel_axes(self, kernel):
        assert kernel_norms(-torch.ones(4, 2, *kernel)).unique().tolist() == [math.prod(kernel)]

    def test_a_vector_has_no_kernels(self):
        with pytest.raises(ValueError, match=r"shape \(4,\)"):
            kernel_norms(torch.ones(4))


class TestThreshold:
    @pytest.mark.parametrize(("target", "expected"), [(0.35, 0.359375), (0.5, 0.5), (0.65, 0.65625), (0.9, 0.90625)])
    def test_straight_line(self, target, expected):
        assert bisect_threshold(lambda threshold: threshold, target) == expected

    def test_path(self):
        path = []
        bisect_threshold(lambda threshold: path.append(threshold) or threshold, 0.35)
        assert path == [0.5, 0.25, 0.375, 0.3125, 0.34375, 0.359375]

    @pytest.mark.parametrize(("target", "expected"), [(0.35, 0.5), (0.6, 0.75), (0.8, 1.0)])
    def test_steps(self, target, expected):
        assert bisect_threshold(lambda t: 0.0 if t < 0.5 else 0.5 if t < 0.75 else 0.75, target) == expected

    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=6), st.floats(0, 1))
    def test_reaches_the_target_or_gives_up_at_one(self, steps, target):
        def sparsity_at(threshold: float) -> float:
            return max((height for place, height in steps if place <= threshold), default=0.0)

        threshold = bisect_threshold(sparsity_at, target)
        assert sparsity_at(threshold) >= target or threshold == 1.0

    @given(st.integers(0, 2**32 - 1), st.floats(0, 0.99))
    @settings(deadline=None, max_examples=50)
    def test_of_a_model(self, seed, target):
        generator = np.random.default_rng(seed)
        layers = [generator.random(shape) ** 6 for shape in ((8, 8), (16, 8), (3, 8), (4, 12))]
        areas = [9, 1, 1, 25]
        threshold, sparsity = find_threshold(layers, areas, target)
        assert sparsity >= target or threshold == 1.0
        assert sparsity == model_sparsity(layers, areas, threshold)

    def test_counts_weights_exactly(self):
        layers = [torch.eye(8), torch.ones(4, 4)]
        # 8 groups of 8 x 8 x 9 weights remain 72 of 576; 16 of 16 remain in the other layer.
        assert model_sparsity(layers, [9, 1], 0.1) == 1 - (72 + 16) / (576 + 16)
        assert model_sparsity(layers, [9, 1], 0.1, faithful=True) == 1 - (144 + 16) / (576 + 16)

    def test_level_zero_as_published_adds_weights(self):
        assert model_sparsity([torch.ones(3, 3)], [1], 0.1, faithful=True) == -1.0

    def test_out_of_reach(self):
        assert find_threshold([torch.eye(4), torch.ones(3, 3)], [1, 1], 0.9) == (1.0, 1 - (4 + 9) / (16 + 9))

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match=r"target.*\[0, 1\), got 1.0"):
            find_threshold([torch.eye(4)], [1], 1.0)
        with pytest.raises(ValueError, match="1 layers, 2 areas"):
            find_threshold([torch.eye(4)], [1, 1], 0.5)
        with pytest.raises(ValueError, match="0 layers"):
            find_threshold([], [], 0.5)
        with pytest.raises(ValueError, match="at least 1, got 0"):
            find_threshold([torch.eye(4)], [0], 0.5)
        with pytest.raises(ValueError, match="rounds=-1"):
            bisect_threshold(lambda t: t, 0.5, rounds=-1)
        with pytest.raises(ValueError, match="target"):
            bisect_threshold(lambda t: t, math.nan)


class TestCoefficient:
    def test_golden_run(self):
        coefficient, last, used = 2e-6, 0.0, []
        for epoch, sparsity in enumerate([0, 0, 0, 0.02, 0.10, 0.20, 0.30, 0.36, 0.40, 0.34]):
            used.append(active_coefficient(coefficient, epoch, 2))
            coefficient = next_coefficient(coefficient, sparsity, last, 0.35, epoch, 10, 2, 2e-6)
            last = sparsity
        assert [value * 1e6 for value in used] == pytest.approx([0, 0, 2, 4, 6, 6, 6, 6, 4, 2])
        assert coefficient == pytest.approx(4e-6)

    def test_never_below_zero(self):
        assert next_coefficient(1e-6, 0.5, 0.5, 0.35, 5, 10, 2, 2e-6) == 0.0

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="epoch=10"):
            next_coefficient(1e-6, 0.5, 0.5, 0.35, 10, 10, 2, 2e-6)
        with pytest.raises(ValueError, match="at least 0"):
            next_coefficient(1e-6, 0.5, 0.5, 0.35, 5, 10, 2, -2e-6)
