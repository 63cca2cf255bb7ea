"""Hinge in numbers: proximal operators, survivors, the first pair, and schedules."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruners.float64 import close, randn
from torch import nn
from torch.nn import functional as F

from prune_mm.pruners.hinge_math import (
    INIT_METHODS,
    REGULARIZERS,
    annealed,
    balance_factor,
    distillation_loss,
    gradient_ratio,
    group_norms,
    init_pair,
    learning_rates,
    pair_rank,
    penalty,
    prox_,
    prox_groups_,
    prox_scale,
    regularizer,
    select_groups,
    top_groups,
)
from prune_mm.structures.pair import merged_kernel, merging_is_cheaper

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
NAMES = ("l1", "l1-2", "l1d2", "logsum", "l0")


class TestProximalOperators:
    NORMS = torch.tensor([0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 2], dtype=torch.float64)

    @pytest.mark.parametrize(
        ("tau", "name", "expected"),
        [
            (0.05, "l1", [0, 0, 0, 0, 2.0e-7, 0.50000005, 0.900000002, 0.9500000005, 0.9750000001]),
            (0.05, "l1-2", [0, 0, 0, 0, 2.045e-7, 0.5112823932, 0.9203082178, 0.9714364504, 0.9970005671]),
            (0.05, "l1d2", [0] * 6 + [0.96399037, 0.9874206293, 0.9955707627]),
            (0.05, "logsum", [0] * 6 + [0.7236068101, 0.9472135961, 0.9873397173]),
            (2e-5, "l1", [0, 0.9800002, 0.998000002, 0.9990000005, 0.9996000001, 0.9998, 0.99996, 0.99998, 0.99999]),
            (2e-5, "l1-2", [0, 0.9800087437, 0.9980087026, 0.9990087098, 0.9996087146, 0.9998087163, 0.9999687177,
                            0.9999887179, 0.999998718]),
            (2e-5, "l1d2", [0, 0.8260310161, 0.9949874212, 0.9982306671, 0.9995526863, 0.9998418736, 0.9999858578,
                            0.999995, 0.9999982322]),
            (2e-5, "logsum", [0, 0, 0.7236074158, 0.947213625, 0.9919349567, 0.9979959841, 0.9999199936, 0.9999799996,
                              0.999995]),
            (1, "l1", [0] * 7 + [1e-8, 0.5000000025]),
            (1, "l1-2", [0] * 7 + [2e-8, 1.000000005]),
            (1, "l1d2", [0] * 7 + [0.7015158584, 0.9072010093]),
            (1, "logsum", [0] * 8 + [0.5000499975]),
            (0.02, "l0", [0, 0, 0, 0, 0, 0, 1, 1, 1]),
        ],
    )  # fmt: skip
    def test_published_scales(self, tau, name, expected):
        assert close(prox_scale(self.NORMS, tau, name), expected, 2e-10)

    @pytest.mark.parametrize(
        ("name", "v", "tau", "x"),
        [
            ("l1d2", 1, 0.5, 0.8656496057),
            ("l1d2", 0.5, 0.3, 0.3780148941),
            ("l1d2", 0.2, 0.3, 0),
            ("logsum", 1, 0.1, 0.8872983361),
            ("logsum", 0.7, 0.1, 0.5000000067),
            ("logsum", 0.6, 0.1, 0),
            ("logsum", 2, 0.5, 1.7071067833),
        ],
    )
    def test_published_values(self, name, v, tau, x):
        assert v * float(prox_scale([v], tau, name)) == pytest.approx(x, abs=2e-10)

    @pytest.mark.parametrize(
        ("name", "rows", "columns"),
        [
            ("l1", [0.8356146686, 0.7842023641, 0.6713728866], [0.8055270661, 0.5587109212, 0.635467859, 0.8131336949]),
            ("l1-2", [0.9627213649, 0.9034886518, 0.7734965003],
             [0.9317397347, 0.6462516126, 0.7350350835, 0.9405381954]),
            ("l1d2", [0.9761498366, 0.963899844, 0.9309692766],
             [0.9692009845, 0.8901478105, 0.9188210787, 0.9710173555]),
            ("logsum", [0.942667963, 0.8960590365, 0.6844137738], [0.9175650317, 0, 0, 0.9244549066]),
        ],
    )  # fmt: skip
    def test_published_matrix(self, name, rows, columns):
        matrix = randn(0, 3, 4)
        assert close(group_norms([matrix]), [3.0416339100, 2.3169855215, 1.5214812666], 1e-9)
        assert close(group_norms([matrix.T]), [2.5710518581, 1.1330441190, 1.3716211551, 2.6757097690], 1e-9)
        assert close(prox_scale(group_norms([matrix]), 0.5, name), rows, 2e-10)
        assert close(prox_scale(group_norms([matrix.T]), 0.5, name), columns, 2e-10)
        by_row, by_column = matrix.clone(), matrix.clone()
        prox_(by_row, "row", 0.5, name)
        prox_(by_column, "col", 0.5, name)
        assert torch.allclose(by_row, matrix * torch.tensor(rows, dtype=torch.float64)[:, None], atol=1e-9)
        assert torch.allclose(by_column, matrix * torch.tensor(columns, dtype=torch.float64), atol=1e-9)

    @pytest.mark.parametrize(
        ("axis", "name", "steps", "expected"),
        [
            ("row", "l1", 1, [[1.46883926, 0.29597452, 1.02067159], [2.09311996, 1.68573639, -0.84525542],
                              [0.7277357, -0.12782118, -0.08167334]]),
            ("row", "l1", 3, [[0.6228092, 0.22860781, 1.0422393], [2.43517384, 1.30242028, -0.42682471],
                              [0.39789587, -0.10182722, -0.03373762]]),
            ("row", "l1d2", 3, [[0.94750774, 0.31035936, 1.38845846], [2.8495202, 1.57919149, -0.54740585],
                                [0.82365805, -0.19596075, -0.08445451]]),
            ("col", "l1", 3, [[0.76651985, 0.21978521, 0.94661303], [2.41367209, 1.03983583, -0.2850304],
                              [0.79295698, -0.15817856, -0.05822947]]),
            ("both", "l1", 3, [[0.3897334, 0.12948802, 0.53017929], [1.89436526, 0.72883408, -0.15425173],
                               [0.26987035, -0.05741238, -0.01053338]]),
        ],
    )  # fmt: skip
    def test_published_iterations(self, axis, name, steps, expected):
        """Momentum SGD on A with a proximal step behind each real step."""
        matrix = nn.Parameter(randn(0, 3, 3))
        optimizer = torch.optim.SGD([matrix], lr=0.1, momentum=0.9, weight_decay=1e-4)
        for step in range(steps):
            matrix.grad = randn(10 + step, 3, 3)
            optimizer.step()
            prox_(matrix, axis, 2 * 0.1, name)
        assert close(matrix.detach(), expected, 6e-9)

    @SETTINGS
    @given(st.sampled_from(NAMES), st.lists(st.floats(0, 1e3), max_size=8), st.floats(0, 100))
    def test_scales_shrink_and_are_numbers(self, name, norms, tau):
        v = torch.tensor(norms, dtype=torch.float64)
        scale = prox_scale(v, tau, name)
        assert scale.shape == v.shape
        assert bool(torch.isfinite(scale).all())
        assert bool((scale >= 0).all())
        if name != "l1-2":
            assert bool((scale <= 1).all())
        by_size = v.argsort()
        assert bool((scale[by_size].diff() >= -1e-12).all()), "a longer group never shrinks by more"

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("v", [0.0, 1e-300, 1e-30, 1e-9, 1.0, 1e30, 1e300, math.inf])
    @pytest.mark.parametrize("tau", [0.0, 1e-300, 1e-12, 1.0, 1e300])
    def test_no_extreme_gives_nan(self, name, v, tau):
        scale = prox_scale(torch.tensor([v, 0.0], dtype=torch.float64), tau, name)
        assert bool(torch.isfinite(scale).all())
        assert float(scale[0]) <= 1 or name == "l1-2"

    @pytest.mark.parametrize("name", NAMES)
    def test_everything_below_tau_is_zero_and_nothing_is_empty(self, name):
        assert prox_scale(torch.tensor([0.1, 0.2, 0.0]), 5.0, name).tolist() == [0, 0, 0]
        assert prox_scale(torch.empty(0), 1.0, name).shape == (0,)
        empty = torch.empty(0, 4)
        prox_(empty, "both", 0.1, name)

    @pytest.mark.parametrize("name", NAMES)
    def test_nan_is_not_hidden(self, name):
        scale = prox_scale(torch.tensor([math.nan, 1.0]), 0.1, name)
        assert bool(scale[0].isnan())

    @SETTINGS
    @given(st.floats(0.01, 5), st.floats(0.01, 2))
    def test_minimisers_by_brute_force(self, v, tau):
        """What l1, l1d2 and l0 minimise; logsum only where its larger stationary point is."""
        x = torch.linspace(0, v, 20001, dtype=torch.float64)
        objectives = {
            "l1": 0.5 * (x - v) ** 2 + tau * x,
            "l1d2": (x - v) ** 2 + tau * x.sqrt(),
            "l0": 0.5 * (x - v) ** 2 + tau * (x > 0),
        }
        for name, values in objectives.items():
            found = v * float(prox_scale([v], tau, name))
            at = {"l1": lambda y: tau * y, "l1d2": lambda y: tau * y**0.5, "l0": lambda y: tau * (y > 0)}[name](found)
            objective = (1.0 if name == "l1d2" else 0.5) * (found - v) ** 2 + at
            assert objective <= float(values.min()) + 1e-7

    def test_logsum_is_a_stationary_point(self):
        v, tau = torch.linspace(0.7, 5, 50, dtype=torch.float64), 0.1
        x = v * prox_scale(v, tau, "logsum")
        assert torch.allclose(x - v + tau / x, torch.zeros_like(x), atol=1e-6)

    def test_types_and_lists(self):
        assert prox_scale(torch.ones(2), 0.1, "l1").dtype is torch.float32
        assert prox_scale(torch.ones(2, dtype=torch.int64), 0.1, "l1").dtype is torch.float64
        assert prox_scale([1, 2], 0.1, "l1").dtype is torch.float64
        assert prox_scale(torch.ones(2, dtype=torch.float16), 0.1, "l1").dtype is torch.float16

    @pytest.mark.parametrize(
        ("tau", "name", "word"),
        [(0.1, "l3", "'l3'"), (-1, "l1", "tau"), (math.nan, "l1", "tau"), (math.inf, "l1", "tau")],
    )
    def test_refusals(self, tau, name, word):
        with pytest.raises(ValueError, match=word):
            prox_scale([1.0], tau, name)

    def test_another_axis_is_refused(self):
        with pytest.raises(ValueError, match="axis"):
            prox_(torch.eye(2), "rows", 0.1, "l1")

    def test_a_new_operator_is_one_function(self):
        @regularizer("half")
        def half(v, tau):
            return torch.full_like(v, 0.5)

        try:
            matrix = torch.eye(2)
            prox_(matrix, "both", 0.1, "half")
            assert torch.equal(matrix, torch.eye(2) / 4)
        finally:
            del REGULARIZERS["half"]

    def test_groups_that_lie_in_two_tensors(self):
        """Cardinality groups: rows of one convolution and columns of another shrink as one vector."""
        first, second = randn(0, 6, 5), randn(1, 7, 6)
        joint = torch.cat([first.view(3, -1), second.view(7, 3, 2).movedim(1, 0).reshape(3, -1)], 1)
        scale = prox_scale(joint.norm(dim=1), 0.5, "l1")
        prox_groups_([first.view(3, 2, 5), second.view(7, 3, 2).movedim(1, 0)], 0.5, "l1")
        assert torch.allclose(first, randn(0, 6, 5) * scale.repeat_interleave(2)[:, None])
        assert torch.allclose(second, randn(1, 7, 6) * scale.repeat_interleave(2))

    def test_a_parameter_that_trains_is_written_through_a_view(self):
        weight = nn.Parameter(torch.ones(2, 3, 1, 1))
        prox_(weight[:, :, 0, 0].T, "row", 100.0, "l1")
        assert float(weight.detach().abs().max()) == 0


class TestPenalty:
    @pytest.mark.parametrize(
        ("q", "rows", "columns"),
        [
            (1, 6.8801006981, 7.7514269012),
            (0.5, 20.2470859590, 29.9736259075),
            (2, 4.1151991439, 4.1151991439),
        ],
    )
    def test_published(self, q, rows, columns):
        matrix = randn(0, 3, 4)
        assert penalty(group_norms([matrix]), q) == pytest.approx(rows, rel=5e-9)
        assert penalty(group_norms([matrix.T]), q) == pytest.approx(columns, rel=5e-9)

    def test_edges(self):
        assert penalty(torch.empty(0)) == 0
        assert penalty(torch.zeros(3), 0.5) == 0
        with pytest.raises(ValueError, match="q must"):
            penalty(torch.ones(2), 0)


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
