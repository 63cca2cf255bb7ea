"""Hinge in numbers: survivors, the first pair, and schedules."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruners.float64 import close, randn
from torch.nn import functional as F

from prune_mm.pruners.hinge_math import (
    INIT_METHODS,
    annealed,
    balance_factor,
    distillation_loss,
    gradient_ratio,
    group_norms,
    init_pair,
    learning_rates,
    pair_rank,
    select_groups,
    top_groups,
)
from prune_mm.structures.pair import merged_kernel, merging_is_cheaper

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
NAMES = ("l1", "l1-2", "l1d2", "logsum", "l0")


class TestSurvivors:
    V = (0.5, 0.001, 0.2, 0.004, 0.006, 0, 0.3, 0.0005, 0.005, 0.05)
    ONE = (0, 0, 0, 0, 0, 0, 0.3, 0, 0, 0)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(
        ("norms", "threshold", "share", "expected"),
        [
            (V, 0.005, 0.2, [0, 2, 4, 6, 8, 9]),
            (V, 0, 0.2, [0, 1, 2, 3, 4, 6, 7, 8, 9]),
            (V, 0.25, 0.2, [0, 6]),
            (V, 10, 0.2, [0, 6]),
            (V, 0.0055, 0.5, [0, 2, 4, 6, 9]),
            (ONE, 0.005, 0.2, [0, 1, 6]),
            (ONE, 0.005, 0.5, [0, 1, 2, 3, 4, 6]),
            ((0,) * 10, 0.005, 0.2, [0, 1]),
            ((0,) * 10, 0.005, 0.5, [0, 1, 2, 3, 4]),
            ((0.1, 0.4, 0.3, 0.2), 10, 0.2, [1]),
            ((0, 0), 10, 0.2, [0]),
            ((0, 0), 0, 0, [0]),
            ((3.0,), 10, 1, [0]),
            ((1, 2, 2, 0), 10, 0.25, [1, 2]),
            ((), 10, 0.2, []),
            (tuple(range(1, 101)), math.inf, 0.29, list(range(71, 100))),
        ],
    )
    def test_published_rule(self, norms, threshold, share, expected, dtype):
        found = select_groups(torch.tensor(norms, dtype=dtype), threshold, share)
        assert found.dtype is torch.int64
        assert found.tolist() == expected

    @pytest.mark.parametrize(
        ("norms", "count", "expected"),
        [
            (V, 3, [0, 2, 6]),
            (V, 1, [0]),
            (ONE, 3, [0, 1, 2, 6]),
            ((0,) * 10, 4, [0, 1, 2, 3]),
            ((1, 2, 2, 0), 1, [1, 2]),
            ((1, 2, 2, 0), 4, [0, 1, 2, 3]),
        ],
    )
    def test_same_ratio(self, norms, count, expected):
        assert top_groups(torch.tensor(norms, dtype=torch.float64), count).tolist() == expected

    @SETTINGS
    @given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.floats(0, 10), st.floats(0, 10), st.floats(0, 1))
    def test_floor_and_monotone(self, norms, low, high, share):
        low, high = min(low, high), max(low, high)
        more, less = (set(select_groups(norms, t, share).tolist()) for t in (low, high))
        assert less <= more
        assert len(less) >= max(1, math.floor(len(norms) * share))
        above = {i for i, v in enumerate(norms) if v >= high and v > 0}
        assert above <= less

    @pytest.mark.parametrize(
        ("norms", "share"), [([1.0, math.nan], 0.2), ([1.0], -0.1), ([1.0], 1.5), (torch.ones(2, 2), 0.2)]
    )
    def test_refusals(self, norms, share):
        with pytest.raises(ValueError, match=r"norms|min_share"):
            select_groups(norms, 0.1, share)

    @pytest.mark.parametrize("count", [0, 3])
    def test_counts_out_of_range(self, count):
        with pytest.raises(ValueError, match="cannot keep"):
            top_groups([1.0, 2.0], count)


class TestPair:
    EXACT = ("svd2", "svd", "p-identity")

    def test_published_svd2(self):
        kernel = randn(0, 3, 2, 1, 2).float()
        weight, matrix = init_pair(kernel, "svd2")
        assert close(group_norms([matrix]), [3.468862, 2.194233, 0.295303], 1e-6)
        assert close(group_norms([matrix.T]), [3.041634, 2.316986, 1.521481], 1e-6)
        assert torch.allclose(weight.flatten(1) @ weight.flatten(1).T, torch.eye(3), atol=1e-6)
        assert weight.dtype is matrix.dtype is torch.float32

    def test_published_svd(self):
        weight, matrix = init_pair(randn(0, 3, 2, 1, 2).float(), "svd")
        assert torch.allclose(matrix @ matrix.T, torch.eye(3), atol=1e-6)
        assert close(group_norms([weight]), [3.468862, 2.194233, 0.295303], 1e-6)

    def test_more_filters_than_weights(self):
        kernel = randn(0, 6, 2, 1, 2).float()
        weight, matrix = init_pair(kernel, "svd2")
        assert (weight.shape, matrix.shape) == ((4, 2, 1, 2), (4, 6))
        assert close(group_norms([matrix]), [4.321139, 2.760188, 1.569702, 0.653634], 1e-6)
        weight, matrix = init_pair(kernel, "svd")
        assert (weight.shape, matrix.shape) == ((6, 2, 1, 2), (6, 6))
        assert torch.allclose(matrix @ matrix.T, torch.eye(6), atol=1e-6)
        assert float(weight[4:].abs().max()) == 0

    @SETTINGS
    @given(
        st.sampled_from(EXACT), st.integers(1, 9), st.integers(1, 4), st.sampled_from([(1, 1), (3, 3), (1, 3), (2,)]),
        st.integers(0, 99), st.booleans(),
    )  # fmt: skip
    def test_exact_methods_keep_the_function(self, method, outputs, inputs, kernel, seed, deficient):
        dense = randn(seed, outputs, inputs, *kernel)
        if deficient:
            dense[:: max(outputs // 2, 1)] = dense[:1]
        weight, matrix = init_pair(dense, method)
        assert weight.shape == (pair_rank(dense.shape, method), *dense.shape[1:])
        assert matrix.shape == (weight.shape[0], outputs)
        assert torch.allclose(merged_kernel(weight, matrix), dense, atol=1e-12)
        conv = F.conv2d if dense.ndim == 4 else F.conv1d
        x = randn(seed + 1, 2, inputs, *[5] * len(kernel))
        behind = matrix.T.reshape(outputs, -1, *[1] * len(kernel))
        assert torch.allclose(conv(conv(x, weight), behind), conv(x, dense), atol=1e-11)

    def test_a_large_kernel_is_split_by_the_thin_decomposition(self):
        weight, matrix = init_pair(torch.from_numpy(np.random.RandomState(0).randn(64, 512, 3, 3)).float())
        assert weight.shape == (64, 512, 3, 3)
        assert bool((group_norms([matrix]).diff() <= 0).all())

    @pytest.mark.parametrize("method", INIT_METHODS)
    def test_seeds_types_and_memory(self, method):
        dense = randn(0, 5, 3, 3, 3).float()
        before = dense.clone()
        pairs = [init_pair(dense, method, seed=seed) for seed in (1, 1, 2)]
        assert all(torch.equal(a, b) for a, b in zip(*pairs[:2]))
        assert method in ("svd", "svd2", "p-identity") or not torch.equal(pairs[0][1], pairs[2][1])
        for tensor in pairs[0]:
            tensor.zero_()
        assert torch.equal(dense, before), "what is returned is no view of the kernel"
        generator = torch.Generator().manual_seed(1)
        assert torch.equal(init_pair(dense, method, generator)[1], pairs[1][1])
        assert init_pair(dense.half(), method)[0].dtype is torch.float16

    @pytest.mark.parametrize("method", ["p-disturbance-u", "p-disturbance-n"])
    def test_disturbed_identity(self, method):
        dense = randn(0, 40, 3, 3, 3)
        for normalize, axis in (("col", 0), ("row", 1)):
            weight, matrix = init_pair(dense, method, normalize=normalize)
            assert torch.equal(weight, dense)
            assert torch.allclose(matrix.norm(dim=axis), torch.ones(40, dtype=torch.float64))
            assert bool((matrix.argmax(dim=axis) == torch.arange(40)).all())
            noise = matrix[~torch.eye(40, dtype=torch.bool)]
            assert bool((noise >= 0).all()) == (method == "p-disturbance-u")
        assert torch.equal(init_pair(dense, method, scale=0.0)[1], torch.eye(40, dtype=torch.float64))

    def test_random_pairs_have_the_published_spread(self):
        dense = randn(0, 200, 8, 3, 3)
        weight, matrix = init_pair(dense, "p-random")
        assert torch.equal(weight, dense)
        assert float(matrix.std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
        weight, matrix = init_pair(dense, "t-random")
        for found, fan_in in ((weight, 72), (matrix, 200)):
            bound = 1 / math.sqrt(fan_in)
            assert bound * 0.99 < float(found.abs().max()) <= bound
            assert float(found.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)

    def test_refusals(self):
        with pytest.raises(ValueError, match="init_method='qr'"):
            init_pair(torch.ones(2, 2, 1, 1), "qr")
        with pytest.raises(ValueError, match="normalize"):
            init_pair(torch.ones(2, 2, 1, 1), "svd", normalize="both")
        with pytest.raises(ValueError, match="NaN"):
            init_pair(torch.full((2, 2, 1, 1), math.nan))

    @SETTINGS
    @given(*[st.integers(1, 20)] * 4)
    def test_merging_where_it_is_cheaper(self, outputs, rank, inputs, taps):
        pair = rank * inputs * taps + rank * outputs
        assert merging_is_cheaper(outputs, rank, inputs, taps) == (outputs * inputs * taps <= pair)


class TestSchedules:
    @pytest.mark.parametrize(("value", "expected"), [(11, 2e-4), (10, 1e-4), (7, 1e-4), (5, 5e-5), (4, 5e-5)])
    def test_annealing(self, value, expected):
        assert annealed(2e-4, value, 2, 10, 5) == pytest.approx(expected, rel=1e-12)
        assert annealed(2e-4, value, 0, 10, 5) == 2e-4

    @pytest.mark.parametrize(
        ("method", "ratio", "expected"),
        [
            ("p1", 5 / 9, [0.002211148, 0.221114835, 0.1]),
            ("p1", 9 / 5, [0.000452254, 0.045225369, 0.1]),
            ("p1", 1.2, [0.000781817, 0.078181737, 0.1]),
            ("p2", 5 / 9, [0.001, 0.1, 0.045225369]),
            ("p2", 9 / 5, [0.001, 0.1, 0.221114835]),
            ("p2", 1.2, [0.001, 0.1, 0.127907109]),
        ],
    )
    def test_learning_rates(self, method, ratio, expected):
        assert learning_rates([0.001, 0.1, 0.1], ratio, method) == pytest.approx(expected, abs=6e-10)

    def test_ordinary_weights_may_be_left_alone(self):
        assert learning_rates([0.001, 0.1, 0.1], 1.2, rescale_first=False)[0] == 0.001
        assert learning_rates([0.1, 0.1], 1.2)[1] == 0.1
        with pytest.raises(ValueError, match="p3"):
            learning_rates([0.1], 1.0, "p3")
        with pytest.raises(ValueError, match="ratio"):
            learning_rates([0.1], 0.0)

    def test_gradient_ratio(self):
        assert gradient_ratio(3, 1, None) == 9 / 5
        assert gradient_ratio(3, 1, None, faithful=True) == 3
        assert gradient_ratio(1, 1, 1.5) == pytest.approx(0.1 * 1.5 + 0.9)
        assert gradient_ratio(1, 100, 1.5) == 5 / 9
        assert gradient_ratio(100, 1, 1.5) == 9 / 5
        for first, second in itertools.product((0, math.nan, math.inf), (0, 1, math.nan, math.inf)):
            assert gradient_ratio(first, second, None) == 1
            assert gradient_ratio(first, second, 1.2) == 1.2

    def test_balance(self):
        assert balance_factor(torch.tensor([1.0, 2.0, 6.0])) == 3
        assert balance_factor(torch.empty(0)) == 1


class TestDistillation:
    def test_published(self):
        loss = distillation_loss(randn(1, 2, 5), randn(2, 2, 5), 4)
        assert float(loss) == pytest.approx(1.3103456473, abs=1e-10)

    def test_gradients_reach_the_student_only(self):
        student, teacher = (randn(seed, 3, 5).requires_grad_() for seed in (1, 2))
        distillation_loss(student, teacher).backward()
        assert student.grad is not None
        assert teacher.grad is None
        assert float(distillation_loss(teacher.detach(), teacher)) == pytest.approx(0, abs=1e-15)

    def test_edges(self):
        assert float(distillation_loss(torch.empty(0, 5), torch.empty(0, 5))) == 0
        sure = torch.tensor([[1e4, -1e4]])
        assert bool(torch.isfinite(distillation_loss(-sure, sure)))
        with pytest.raises(ValueError, match="temperature"):
            distillation_loss(sure, sure, 0)
