"""Proximal operators of Hinge, and its penalty."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruners.float64 import close, randn
from torch import nn

from prune_mm.pruners.hinge_math import (
    REGULARIZERS,
    group_norms,
    penalty,
    prox_,
    prox_groups_,
    prox_scale,
    regularizer,
)

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
