"""Scores of channels: golden numbers of CHEX, dead channels, and what leverage means."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune_mm.criteria import (
    WEIGHT_CRITERIA,
    css_scores,
    l1_scores,
    laplacian_scores,
    spatial_information,
)

D = torch.tensor([[2.0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 3, 0, 0, 0], [0, 0, 0, 0.5, 0, 0]])
E = torch.tensor(
    [
        [1.0, 2, 0, 1, -1, 3],
        [2, 4, 0, 2, -2, 6.5],
        [0, 1, 1, 0, 2, 0],
        [3, 0, -1, 1, 0, 1],
        [1, 1, 1, 1, 1, 1],
    ]
)


def dead(weight: Tensor, *channels: int) -> Tensor:
    weight = weight.clone()
    weight[list(channels)] = 0
    return weight


def svd_leverage(weight: Tensor, keep: int) -> Tensor:
    _, _, vh = torch.linalg.svd(weight.double().flatten(1).T, full_matrices=False)
    return vh[:keep].norm(dim=0)


def planted(channels: int, width: int, rank: int, seed: int) -> Tensor:
    """float64 (channels, width) of a given rank, with well separated singular values 1, 2, ..."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(channels, rank, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(torch.arange(1.0, rank + 1, dtype=torch.float64)) @ right.T


class TestL1:
    def test_golden(self):
        assert l1_scores(E).tolist() == [8, 16.5, 4, 6, 6]

    @pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 5), (4, 3, 5, 5), (4, 3, 2, 2, 2)])
    def test_any_trailing_axes(self, shape: tuple[int, ...]):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(l1_scores(weight), weight.double().abs().reshape(4, -1).sum(1))

    def test_zero_means_dead_and_only_dead(self):
        weight = torch.zeros(2, 3)
        weight[1, 0] = torch.finfo(torch.float32).smallest_normal
        assert l1_scores(weight)[0] == 0
        assert l1_scores(weight)[1] > 0

    def test_half_does_not_overflow(self):
        assert l1_scores(torch.full((1, 100), 6e4, dtype=torch.float16)).item() > 5e6

    @pytest.mark.parametrize("weight", [torch.zeros(()), torch.zeros(0, 3)])
    def test_no_channel(self, weight: Tensor):
        with pytest.raises(ValueError, match="output channel"):
            l1_scores(weight)


class TestCss:
    @pytest.mark.parametrize(
        ("keep", "expected"),
        [(3, [1, 1, 1, 0]), (2, [1, 0, 1, 0]), (1, [0, 0, 1, 0]), (0, [0, 0, 0, 0])],
    )
    def test_golden_orthogonal_filters(self, keep: int, expected: list[float]):
        assert css_scores(D, keep).tolist() == pytest.approx(expected, abs=1e-12)
        assert css_scores(D.view(4, 6, 1, 1), keep).tolist() == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize(
        ("keep", "expected", "order"),
        [
            (4, [0.427234, 0.904735, 0.999839, 0.999998, 0.999626], [3, 2, 4, 1, 0]),
            (3, [0.427128, 0.899828, 0.807873, 0.980701, 0.627247], [3, 1, 2, 4, 0]),
            (2, [0.416645, 0.873600, 0.671217, 0.678422, 0.390436], [1, 3, 2, 0, 4]),
        ],
    )
    def test_golden_dense(self, keep: int, expected: list[float], order: list[int]):
        scores = css_scores(E, keep)
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
        assert scores.argsort(descending=True).tolist() == order

    @pytest.mark.parametrize(
        ("keep", "expected"),
        [
            (4, [1, 1, 0, 1, 1]),
            (3, [0.428469, 0.903608, 0, 0.999973, 0.999981]),
            (2, [0.425963, 0.897169, 0, 0.973304, 0.257530]),
        ],
    )
    def test_golden_dead_channel(self, keep: int, expected: list[float]):
        assert css_scores(dead(E, 2), keep).tolist() == pytest.approx(expected, abs=1e-5)

    def test_golden_nothing_to_choose(self):
        assert css_scores(dead(E, 2), 5).tolist() == [1, 1, 1, 1, 1]

    def test_dead_channel_scores_zero_beyond_the_rank(self):
        weight = torch.cat((dead(E, 2), torch.zeros(1, 6)))
        assert css_scores(weight, 5).tolist() == [1, 1, 0, 1, 1, 0]
        assert css_scores(torch.zeros(3, 4), 2).tolist() == [0, 0, 0]

    def test_golden_wide_layer_falls_back_to_l1(self):
        wide = torch.tensor([[1.0, -1], [0.5, 0], [2, 2], [0, -3]])
        assert css_scores(wide, 2).tolist() == [2, 0.5, 4, 3]

    def test_duplicate_filters_share_their_leverage(self):
        weight = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]])
        assert css_scores(weight, 2).tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 1.0])

    def test_duplicates_up_to_float32_rounding(self):
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(8, 64, generator=generator)
        weight = torch.cat((base, base * 0.3))
        assert css_scores(weight, 15).square().sum().item() == pytest.approx(8, abs=1e-6)

    def test_ill_conditioned_layer_agrees_with_svd(self):
        generator = torch.Generator().manual_seed(0)
        q = torch.linalg.qr(torch.randn(40, 20, generator=generator, dtype=torch.float64))[0]
        mix = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))[0]
        weight = mix @ torch.diag(torch.logspace(0, -9, 20, dtype=torch.float64)) @ q.T
        for keep in (3, 10, 16, 19):
            assert torch.allclose(css_scores(weight, keep), svd_leverage(weight, keep), atol=1e-6)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_scale_does_not_matter(self, scale: float):
        assert torch.allclose(css_scores(E * scale, 3), css_scores(E, 3), atol=1e-6)

    @pytest.mark.parametrize("shape", [(64, 64, 3, 3), (128, 256, 1, 1), (96, 96, 1, 1)])
    def test_agrees_with_svd(self, shape: tuple[int, ...]):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for keep in (1, shape[0] // 3, shape[0] - 1, shape[0]):
            assert torch.allclose(css_scores(weight, keep), svd_leverage(weight, keep), atol=1e-6)

    def test_errors(self):
        with pytest.raises(ValueError, match="-1"):
            css_scores(E, -1)
        with pytest.raises(ValueError, match="NaN"):
            css_scores(E * math.nan, 2)

    @given(
        rank=st.integers(1, 8),
        extra=st.integers(0, 4),
        keep=st.integers(0, 12),
        seed=st.integers(0, 2**16),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    @settings(max_examples=80, deadline=None)
    def test_squares_sum_to_the_rank_kept(self, rank: int, extra: int, keep: int, seed: int, dtype: torch.dtype):
        weight = planted(rank + extra, 14, rank, seed).to(dtype)
        scores = css_scores(weight, keep)
        assert bool(((scores >= 0) & (scores <= 1)).all())
        kept = keep if keep >= rank + extra else min(keep, rank)
        assert scores.square().sum().item() == pytest.approx(min(kept, rank + extra), abs=1e-4)

    @given(
        mask=st.lists(st.booleans(), min_size=6, max_size=6),
        keep=st.integers(0, 5),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=60, deadline=None)
    def test_dead_channels_score_zero_and_change_nothing(self, mask: list[bool], keep: int, seed: int):
        alive = torch.tensor(mask)
        weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)) * alive[:, None]
        scores = css_scores(weight, keep)
        assert scores[~alive].tolist() == [0.0] * int((~alive).sum())
        if alive.any():
            assert torch.allclose(scores[alive], css_scores(weight[alive], keep))


class TestLaplacian:
    def test_golden(self):
        assert laplacian_scores(torch.tensor([[1.0], [2.0], [4.0]])).tolist() == pytest.approx([4, 3, 5])

    def test_equals_the_direct_sum(self):
        weight = torch.randn(30, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        direct = [sum((a.double() - b.double()).norm().item() for b in weight) for a in weight]
        assert laplacian_scores(weight).tolist() == pytest.approx(direct)

    def test_shift_does_not_matter(self):
        weight = torch.randn(40, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.allclose(laplacian_scores(weight + 1e4), laplacian_scores(weight), rtol=1e-8)


class TestSpatialInformation:
    def test_golden(self):
        features = (torch.arange(64) % 7).float().view(2, 2, 4, 4)
        expected = torch.tensor([[2.034650, 2.334215], [2.383571, 2.567649]])
        assert torch.allclose(spatial_information(features), expected, atol=1e-5)

    def test_flat_maps_give_zero_never_nan(self):
        assert spatial_information(torch.zeros(2, 3, 4, 4)).tolist() == [[0.0] * 3] * 2
        assert spatial_information(torch.full((1, 1, 1, 1), 1e4)).tolist() == [[0.0]]
        # Zero padding gives every pixel of a flat 2x2 map the same gradient magnitude, so no variance at all.
        flat = torch.linspace(0.1, 1e4, 500).view(1, 500, 1, 1).expand(1, 500, 2, 2)
        scores = spatial_information(flat)
        assert bool((scores >= 0).all())
        assert bool((scores <= 1e-6 * flat[..., 0, 0]).all())

    def test_equals_the_depthwise_sobel_conv(self):
        features = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        sobel = torch.tensor([[-0.5, 0, 0.5], [-1, 0, 1], [-0.5, 0, 0.5]], dtype=torch.float64)
        x, y = (
            torch.nn.functional.conv2d(features, kernel.expand(3, 1, 3, 3), padding=1, groups=3)
            for kernel in (sobel, sobel.T)
        )
        square = x.square() + y.square()
        expected = (square.mean((2, 3)) - square.sqrt().mean((2, 3)).square()).sqrt()
        assert torch.allclose(spatial_information(features), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_is_computed_in_float32(self, dtype: torch.dtype):
        features = (torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 500).to(dtype)
        scores = spatial_information(features)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, spatial_information(features.float()))

    def test_autocast_does_not_lower_the_precision(self):
        features = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = spatial_information(features)
        assert torch.equal(inside, spatial_information(features))

    def test_float64_stays(self):
        assert spatial_information(torch.zeros(1, 1, 3, 3, dtype=torch.float64)).dtype == torch.float64

    def test_wrong_axes(self):
        with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
            spatial_information(torch.zeros(3, 4, 4))


def test_criteria_by_name():
    assert set(WEIGHT_CRITERIA) == {"css", "l1", "laplacian"}
    assert torch.equal(WEIGHT_CRITERIA["css"](E, 3), css_scores(E, 3))
    assert torch.equal(WEIGHT_CRITERIA["l1"](E, 3), l1_scores(E))
    assert torch.equal(WEIGHT_CRITERIA["laplacian"](E, 3), laplacian_scores(E))
