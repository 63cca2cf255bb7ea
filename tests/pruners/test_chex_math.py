"""CHEX in numbers: the schedule, the residuals, the draw, and two updates of a whole ResNet-50."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hash_weights import chex_layers, hash_conv_weight, hash_gamma, hash_resnet50, hash_values, masked_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune_mm.allocation import global_gamma_keep, uniform_keep
from prune_mm.criteria import css_scores, l1_scores
from prune_mm.pruners.chex_math import (
    rank_channels,
    regrow_residuals,
    regrow_share,
    sample_regrow,
    uniform_regrow,
    uniform_regrow_count,
)

E = torch.tensor(
    [
        [1.0, 2, 0, 1, -1, 3],
        [2, 4, 0, 2, -2, 6.5],
        [0, 1, 1, 0, 2, 0],
        [3, 0, -1, 1, 0, 1],
        [1, 1, 1, 1, 1, 1],
    ]
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


class TestSchedule:
    @pytest.mark.parametrize(
        ("step", "last_step", "initial", "expected", "digits"),
        [
            (2, 180, 0.3, 0.299909, 6),
            (30, 180, 0.3, 0.279904, 6),
            (60, 180, 0.3, 0.225, 9),
            (90, 180, 0.3, 0.15, 9),
            (120, 180, 0.3, 0.075, 9),
            (150, 180, 0.3, 0.020096, 6),
            (178, 180, 0.3, 9.1e-5, 6),
            (118, 470, 0.2, 0.170474, 6),
            (236, 470, 0.2, 0.099332, 6),
            (352, 470, 0.2, 0.029526, 6),
            (1000, 202500, 0.5, 0.49996991, 8),
            (50000, 202500, 0.5, 0.42848243, 8),
            (101000, 202500, 0.5, 0.25096962, 8),
            (202000, 202500, 0.5, 7.52e-6, 8),
        ],
    )
    def test_golden(self, step: int, last_step: int, initial: float, expected: float, digits: int):
        assert regrow_share(step, last_step, initial) == pytest.approx(expected, abs=0.6 * 10**-digits)

    @pytest.mark.parametrize(("step", "last_step"), [(180, 180), (181, 180), (0, 0), (5, 0)])
    def test_nothing_regrows_from_the_last_step_on(self, step: int, last_step: int):
        assert regrow_share(step, last_step, 0.3) == 0.0

    @pytest.mark.parametrize("arguments", [(-1, 10, 0.3), (1, -10, 0.3), (1, 10, -0.1), (1, 10, 1.1)])
    def test_errors(self, arguments: tuple[int, int, float]):
        with pytest.raises(ValueError, match=r"steps|initial"):
            regrow_share(*arguments)

    @pytest.mark.parametrize(
        ("share", "expected"),
        [
            (0.5, [32, 64, 128, 256, 512, 1024]),
            (0.3, [19, 38, 76, 153, 307, 614]),
            (0.1, [6, 12, 25, 51, 102, 204]),
            (0.01, [0, 1, 2, 5, 10, 20]),
        ],
    )
    def test_golden_uniform_counts(self, share: float, expected: list[int]):
        channels = [64, 128, 256, 512, 1024, 2048]
        assert [uniform_regrow_count(c, c // 2, share) for c in channels] == expected

    def test_uniform_count_is_exact_and_bounded(self):
        assert uniform_regrow_count(30, 0, 0.1) == 3
        assert uniform_regrow_count(10, 8, 0.5) == 2
        with pytest.raises(ValueError, match="11"):
            uniform_regrow_count(10, 11, 0.5)


class TestRank:
    def test_descending_with_ties_by_index(self):
        assert rank_channels(torch.tensor([1.0, 3, 1, 3, 2, 1])).tolist() == [1, 3, 4, 0, 2, 5]

    def test_long_ties_are_stable(self):
        assert rank_channels(torch.zeros(2048)).tolist() == list(range(2048))

    def test_nan_raises(self):
        with pytest.raises(ValueError, match="1 of 2"):
            rank_channels(torch.tensor([1.0, math.nan]))


class TestResiduals:
    def test_golden(self):
        residuals = regrow_residuals(E, index(1, 3), index(0, 2, 4))
        assert residuals.tolist() == pytest.approx([0.155246, 2.426721, 1.884663], abs=2e-6)
        assert residuals.softmax(0).tolist() == pytest.approx([0.061233, 0.593574, 0.345193], abs=1e-6)

    def test_conv_weight_and_pool_order(self):
        residuals = regrow_residuals(E.view(5, 6, 1, 1), index(3, 1), index(0, 4, 2))
        assert residuals.tolist() == pytest.approx([0.155245, 1.884663, 2.426721], abs=2e-6)

    def test_nothing_kept_gives_plain_norms(self):
        assert torch.allclose(regrow_residuals(E, index(), index(0, 4)), E[[0, 4]].double().norm(dim=1))
        weight = E.clone()
        weight[2] = 0
        assert torch.allclose(regrow_residuals(weight, index(2), index(0, 4)), E[[0, 4]].double().norm(dim=1))

    def test_empty_pool(self):
        assert regrow_residuals(E, index(0, 1), index()).shape == (0,)

    def test_tiny_residual_keeps_its_digits(self):
        weight = torch.zeros(3, 8, dtype=torch.float64)
        weight[0, :4] = 1.0
        weight[1] = 7 * weight[0]
        weight[1, 5] = 1e-11
        weight[2, 6] = 1e-20
        residuals = regrow_residuals(weight, index(0), index(1, 2))
        assert residuals.tolist() == pytest.approx([1e-11, 1e-20], rel=1e-3)

    def test_short_kept_channel_spans_its_direction(self):
        weight = torch.tensor([[1.0, 0, 0], [0, 1e-12, 0], [0, 5.0, 2.0]])
        assert regrow_residuals(weight, index(0, 1), index(2)).item() == pytest.approx(2.0)

    def test_full_span_leaves_nothing(self):
        weight = torch.randn(12, 5, generator=seeded(0))
        assert regrow_residuals(weight, torch.arange(8), index(8, 9, 10, 11)).max().item() < 1e-12

    @given(
        rank=st.integers(1, 6),
        copies=st.integers(0, 6),
        width=st.integers(6, 12),
        seed=st.integers(0, 2**16),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    @settings(max_examples=80, deadline=None)
    def test_equals_the_pseudo_inverse(self, rank: int, copies: int, width: int, seed: int, dtype: torch.dtype):
        # Small integers make the copies exact combinations in float32 as well.
        base = torch.randint(-9, 10, (rank, width), generator=seeded(seed)).to(dtype)
        mix = torch.randint(-9, 10, (copies, rank), generator=seeded(seed + 1)).to(dtype)
        candidates = torch.randn(3, width, generator=seeded(seed + 2), dtype=dtype)
        weight = torch.cat((base, mix @ base, candidates))
        kept, pool = torch.arange(rank + copies), torch.arange(rank + copies, rank + copies + 3)
        columns, targets = base.double().T, weight[pool].double()
        expected = (targets.T - columns @ torch.linalg.pinv(columns) @ targets.T).norm(dim=0)
        assert torch.allclose(regrow_residuals(weight, kept, pool), expected, atol=1e-6, rtol=1e-6)

    @given(channels=st.integers(2, 12), width=st.integers(1, 16), seed=st.integers(0, 2**16), data=st.data())
    @settings(max_examples=80, deadline=None)
    def test_kept_are_zero_and_pythagoras(self, channels: int, width: int, seed: int, data: st.DataObject):
        weight = torch.randn(channels, width, generator=seeded(seed))
        order = torch.randperm(channels, generator=seeded(seed))
        kept = order[: data.draw(st.integers(0, channels))]
        residuals = regrow_residuals(weight, kept, torch.arange(channels))
        assert residuals[kept].sum().item() < 1e-10
        rows = weight.double()
        projected = rows @ torch.linalg.pinv(rows[kept]) @ rows[kept] if len(kept) else torch.zeros_like(rows)
        both = residuals.square() + projected.square().sum(1)
        assert torch.allclose(both, rows.square().sum(1), rtol=1e-6, atol=1e-9)


class TestSampling:
    # The draws of torch.multinomial are those of the PyTorch that made the golden numbers.
    @pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < "2.13", reason="draws differ before 2.13")
    @pytest.mark.parametrize(("seed", "grown"), [(0, {2, 4}), (1, {2, 4}), (2, {2, 4}), (3, {0, 4})])
    def test_golden_layer_step(self, seed: int, grown: set[int]):
        weight = E.clone()
        weight[2] = 0
        channels = len(weight)
        keep = uniform_keep([channels], 0.6)[0]
        free = uniform_keep([channels], 0.2)[0] - keep
        order = rank_channels(css_scores(weight, keep))
        kept, pool = order[:keep], order[keep:]
        assert (kept.tolist(), pool.tolist(), free) == ([3, 1], [0, 4, 2], 2)
        residuals = regrow_residuals(E, kept, pool)
        assert set(pool[sample_regrow(residuals, free, seeded(seed))].tolist()) == grown

    @given(
        size=st.integers(0, 40),
        data=st.data(),
        seed=st.integers(0, 2**16),
        scale=st.sampled_from([0.0, 1.0, 1e6]),
    )
    @settings(max_examples=80, deadline=None)
    def test_distinct_and_in_the_pool(self, size: int, data: st.DataObject, seed: int, scale: float):
        count = data.draw(st.integers(0, size))
        residuals = torch.rand(size, generator=seeded(seed)) * scale
        for drawn in (
            sample_regrow(residuals, count, seeded(seed)),
            uniform_regrow(size, count, seeded(seed)),
        ):
            assert drawn.dtype == torch.int64
            assert len(set(drawn.tolist())) == len(drawn) == count
            assert all(0 <= i < size for i in drawn.tolist())

    def test_equal_seeds_equal_draws(self):
        residuals = torch.rand(50, generator=seeded(0))
        assert torch.equal(sample_regrow(residuals, 9, seeded(5)), sample_regrow(residuals, 9, seeded(5)))
        assert torch.equal(uniform_regrow(50, 9, seeded(5)), uniform_regrow(50, 9, seeded(5)))

    def test_underflow_still_prefers_the_largest(self):
        residuals = torch.tensor([0.0, 5000.0, 1000.0, 3000.0, 0.0, 0.0])
        assert sample_regrow(residuals, 3, seeded(0)).sort().values.tolist() == [1, 2, 3]
        assert sample_regrow(residuals, 6, seeded(0)).sort().values.tolist() == list(range(6))

    def test_underflow_draws_equals_equally(self):
        residuals = torch.tensor([5000.0, 0.0, 0.0])
        second = [sample_regrow(residuals, 2, seeded(s)).tolist()[1] for s in range(400)]
        assert 150 < second.count(1) < 250

    def test_follows_the_softmax(self):
        residuals = torch.tensor([0.0, math.log(2.0), math.log(5.0)])
        first = [int(sample_regrow(residuals, 1, seeded(s))) for s in range(2000)]
        shares = [first.count(i) / 2000 for i in range(3)]
        assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.04)

    def test_temperature(self):
        residuals = torch.tensor([0.0, 1.0])
        cold = [int(sample_regrow(residuals, 1, seeded(s), temperature=1e-3)) for s in range(50)]
        hot = [int(sample_regrow(residuals, 1, seeded(s), temperature=1e6)) for s in range(400)]
        assert cold == [1] * 50
        assert 150 < sum(hot) < 250

    def test_drawing_nothing_leaves_the_generator_alone(self):
        generator = seeded(0)
        before = generator.get_state()
        assert sample_regrow(torch.rand(3), 0, generator).shape == (0,)
        assert uniform_regrow(3, 0, generator).shape == (0,)
        assert torch.equal(generator.get_state(), before)

    def test_errors(self):
        for count in (-1, 3):
            with pytest.raises(ValueError, match=str(count)):
                sample_regrow(torch.rand(2), count, seeded(0))
            with pytest.raises(ValueError, match=str(count)):
                uniform_regrow(2, count, seeded(0))
        for temperature in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="temperature"):
                sample_regrow(torch.rand(2), 1, seeded(0), temperature)
        with pytest.raises(ValueError, match="NaN"):
            sample_regrow(torch.tensor([math.nan, 1.0]), 1, seeded(0))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {layer["name"]: hash_conv_weight(tuple(layer["shape"]), layer["number"]) for layer in chex_layers()}


@pytest.fixture(scope="module")
def masks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Initial mask: L1, uniform, sparsity .7 - .3."""
    masks = {}
    for name, weight in weights.items():
        keep = uniform_keep([len(weight)], 0.7 - 0.3)[0]
        masks[name] = torch.zeros(len(weight), dtype=torch.bool)
        masks[name][rank_channels(l1_scores(weight))[:keep]] = True
    return masks


@pytest.fixture(scope="module")
def gammas(masks: dict[str, Tensor]) -> list[Tensor]:
    """Norm scales at the second update: masked, then moved."""
    scales = []
    for layer in chex_layers():
        channels, number = layer["shape"][0], layer["number"]
        gamma = hash_gamma(channels, number) * masks[layer["name"]]
        scales.append(gamma * (1.0 + 0.6 * hash_values(channels, 6000 + number)).float())
    return scales


class TestResNet50:
    """Two updates of a whole ResNet-50 with hash weights, against the published code."""

    def test_module_order(self, weights: dict[str, Tensor]):
        modules = dict(hash_resnet50().named_modules())
        convs = [name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d)]
        assert len(convs) == 53
        for layer in chex_layers():
            assert convs[layer["number"] - 1] == layer["name"]
            assert torch.equal(modules[layer["name"]].weight, weights[layer["name"]])
        assert torch.equal(modules["layer1.0.bn2"].weight, hash_gamma(64, 3))
        assert torch.equal(modules["layer4.0.downsample.1"].weight, hash_gamma(2048, 47))

    def test_initial_mask(self, masks: dict[str, Tensor]):
        for layer in chex_layers():
            kept = masks[layer["name"]].nonzero()
            assert (len(kept), int(kept.sum())) == (layer["init_keep"], layer["init_mask_sum_idx"]), layer["name"]

    def test_second_update(self, weights: dict[str, Tensor], masks: dict[str, Tensor], gammas: list[Tensor]):
        keep = global_gamma_keep(gammas, 0.7)
        assert keep == [layer["step2_keep"] for layer in chex_layers()]
        assert 1 - sum(keep) / 11392 == pytest.approx(0.7000526685)
        for layer, count in zip(chex_layers(), keep):
            scores = css_scores(masked_weight(weights, masks, layer), count)
            kept = rank_channels(scores)[:count]
            assert int(kept.sum()) == layer["step2_sum_idx"], layer["name"]

    def test_regrowing_refills_exactly_the_alive_channels(self, gammas: list[Tensor]):
        keep = global_gamma_keep(gammas, 0.7)
        both = global_gamma_keep(gammas, 0.7 - regrow_share(2, 180, 0.3))
        assert both == [layer["init_keep"] for layer in chex_layers()]
        free = [b - k for b, k in zip(both, keep)]
        assert (min(free), max(free)) == (10, 571)

    def test_a_whole_update_is_fast(self, weights: dict[str, Tensor]):
        start = time.perf_counter()
        for layer in chex_layers():
            weight = weights[layer["name"]]
            order = rank_channels(css_scores(weight, len(weight) // 2))
            regrow_residuals(weight, order[: len(weight) // 2], order[len(weight) // 2 :])
        # About 2 s on one core; the margin is for a busy machine.
        assert time.perf_counter() - start < 30
