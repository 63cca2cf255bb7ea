"""Allocation: golden numbers of CHEX, exact totals, and budgets that are always met."""

from __future__ import annotations

import math

import pytest
import torch
from hash_weights import chex_layers, hash_gamma
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_mm.allocation import fit_to_budget, global_gamma_keep, round_channels, uniform_keep


class TestGlobalGamma:
    @pytest.mark.parametrize(("sparsity", "total"), [(0.5, 5695), (0.7, 3417)])
    def test_golden_resnet50(self, sparsity: float, total: int):
        layers = chex_layers()
        gammas = [hash_gamma(layer["shape"][0], layer["number"]) for layer in layers]
        keep = global_gamma_keep(gammas, sparsity)
        assert keep == [layer[f"num_keep_{sparsity}"] for layer in layers]
        assert sum(keep) == total

    def test_sparsity_zero_drops_the_smallest(self):
        assert global_gamma_keep([torch.tensor([3.0, -1.0]), torch.tensor([2.0])], 0.0) == [1, 1]

    def test_ties_go_together(self):
        assert global_gamma_keep([torch.full((4,), 0.5), torch.full((2,), 0.5)], 0.1) == [0, 0]
        assert global_gamma_keep([torch.tensor([1.0, 1.0, 1.0, 2.0])], 0.0) == [1]

    def test_dead_channels_are_never_kept(self):
        assert global_gamma_keep([torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0])], 0.1) == [2]

    def test_sign_does_not_matter(self):
        assert global_gamma_keep([torch.tensor([-4.0, 1.0, 2.0, 3.0])], 0.5) == [1]

    def test_no_layers(self):
        assert global_gamma_keep([], 0.5) == []
        assert global_gamma_keep([torch.empty(0)], 0.5) == [0]

    @pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
    def test_sparsity_out_of_range(self, sparsity: float):
        with pytest.raises(ValueError, match=str(sparsity)):
            global_gamma_keep([torch.ones(3)], sparsity)

    def test_nan_gamma(self):
        with pytest.raises(ValueError, match="NaN"):
            global_gamma_keep([torch.tensor([1.0, math.nan])], 0.5)

    @given(
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
        sparsity=st.floats(0, 1, exclude_max=True),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=100, deadline=None)
    def test_total_is_exact_without_ties(self, sizes: list[int], sparsity: float, seed: int):
        total = sum(sizes)
        distinct = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).float() + 1
        keep = global_gamma_keep(list(distinct.split(sizes)), sparsity)
        assert sum(keep) == total - min(int(total * sparsity), total - 1) - 1


class TestUniform:
    def test_golden_initial_mask(self):
        channels = [64, 128, 256, 512, 1024, 2048]
        assert uniform_keep(channels, 0.7 - 0.3) == [38, 76, 153, 307, 614, 1228]

    def test_golden_resnet50_initial_mask(self):
        layers = chex_layers()
        keep = uniform_keep([layer["shape"][0] for layer in layers], 0.7 - 0.3)
        assert keep == [layer["init_keep"] for layer in layers]
        assert sum(keep) == 6816
        assert 1 - sum(keep) / 11392 == pytest.approx(0.4016853933)

    @pytest.mark.parametrize(
        ("ratio", "zero_fraction"),
        [
            (0.1, 0.1014747),
            (0.2, 0.2017205),
            (0.25, 0.25),
            (0.3, 0.3014396),
            (0.4, 0.4016854),
            (0.5, 0.5),
            (0.6, 0.6014747),
            (0.7, 0.7017205),
            (0.75, 0.75),
            (0.8, 0.8014396),
        ],
    )
    def test_golden_resnet50_zero_fraction(self, ratio: float, zero_fraction: float):
        keep = uniform_keep([layer["shape"][0] for layer in chex_layers()], ratio)
        assert 1 - sum(keep) / 11392 == pytest.approx(zero_fraction, abs=1e-7)

    @pytest.mark.parametrize(("channels", "keep"), [(10, 1), (24, 4), (40, 8), (48, 2)])
    def test_no_channel_lost_to_truncation(self, channels: int, keep: int):
        assert uniform_keep([channels], 1 - keep / channels) == [keep]

    @given(channels=st.integers(1, 4096), data=st.data())
    @settings(max_examples=200, deadline=None)
    def test_a_whole_share_is_exact(self, channels: int, data: st.DataObject):
        keep = data.draw(st.integers(1, channels))
        assert uniform_keep([channels], 1 - keep / channels) == [keep]

    @pytest.mark.parametrize("sparsity", [-0.01, 1.0])
    def test_sparsity_out_of_range(self, sparsity: float):
        with pytest.raises(ValueError, match=str(sparsity)):
            uniform_keep([4], sparsity)


class TestRound:
    @pytest.mark.parametrize(
        ("keep", "total", "divisor", "minimum", "expected"),
        [
            (13, 64, 8, 0, 16),
            (11, 64, 8, 0, 8),
            (12, 64, 8, 0, 16),
            (1, 64, 8, 0, 8),
            (0, 64, 8, 0, 0),
            (0, 64, 1, 0, 0),
            (0, 64, 8, 1, 1),
            (3, 64, 8, 10, 10),
            (11, 64, 8, 10, 10),
            (3, 6, 8, 0, 6),
            (19, 19, 8, 0, 19),
            (20, 20, 8, 0, 20),
            (17, 19, 8, 0, 16),
            (5, 4, 1, 0, 4),
            (-3, 4, 1, 0, 0),
            (2, 4, 1, 9, 4),
        ],
    )
    def test_cases(self, keep: int, total: int, divisor: int, minimum: int, expected: int):
        assert round_channels(keep, total, divisor, minimum) == expected

    @pytest.mark.parametrize(("total", "divisor", "minimum"), [(0, 1, 0), (4, 0, 0), (4, 1, -1)])
    def test_errors(self, total: int, divisor: int, minimum: int):
        with pytest.raises(ValueError, match=f"total={total}, divisor={divisor}, minimum={minimum}"):
            round_channels(1, total, divisor, minimum)

    @given(total=st.integers(1, 80), divisor=st.integers(1, 40), minimum=st.integers(0, 100))
    @settings(max_examples=200, deadline=None)
    def test_range_form_and_monotony(self, total: int, divisor: int, minimum: int):
        results = [round_channels(keep, total, divisor, minimum) for keep in range(total + 1)]
        assert results == sorted(results)
        assert results[-1] == total
        for keep, result in enumerate(results):
            assert min(minimum, total) <= result <= total
            assert result % divisor == 0 or result in (total, minimum)
            assert result > 0 or keep == 0

    def test_divisor_one_changes_nothing(self):
        assert [round_channels(keep, 9, 1, 0) for keep in range(10)] == list(range(10))


class TestFitToBudget:
    def test_hits_a_known_sparsity(self):
        sparsity, counts = fit_to_budget(sum, lambda s: uniform_keep([1000, 1000], s), 1000)
        # The floor turns anything below 501 channels into 500.
        assert 0.499 < sparsity <= 0.499 + 1e-4
        assert counts == [500, 500]

    def test_dense_when_the_budget_is_generous(self):
        assert fit_to_budget(sum, lambda s: uniform_keep([8], s), 8) == (0.0, [8])

    def test_unreachable_budget_names_the_lowest_cost(self):
        with pytest.raises(ValueError, match="lowest reachable cost is 103"):
            fit_to_budget(
                lambda c: sum(c) + 100,
                lambda s: [round_channels(c, 8, 1, 3) for c in uniform_keep([8], s)],
                50,
            )

    @pytest.mark.parametrize(
        "arguments", [{"budget": math.nan}, {"budget": 5, "tolerance": 0.0}, {"budget": 5, "highest": 1.0}]
    )
    def test_errors(self, arguments: dict[str, float]):
        with pytest.raises(ValueError, match=r"budget|sparsity"):
            fit_to_budget(sum, lambda s: uniform_keep([8], s), **arguments)

    def test_stops_at_the_last_bit(self):
        sparsity, counts = fit_to_budget(sum, lambda s: uniform_keep([64], s), 20, tolerance=1e-300)
        assert counts == [20]
        assert sparsity == pytest.approx(1 - 21 / 64, abs=1e-9)

    def test_a_cost_that_is_not_monotone_still_ends_within_budget(self):
        cost = {8: 8.0, 7: 3.0, 6: 9.0, 5: 2.0, 4: 9.0, 3: 9.0, 2: 1.0, 1: 7.0, 0: 0.0}
        _, counts = fit_to_budget(lambda c: cost[c[0]], lambda s: uniform_keep([8], s), 3.5)
        assert cost[counts[0]] <= 3.5

    @given(
        sizes=st.lists(st.integers(1, 64), min_size=1, max_size=4),
        share=st.floats(0, 1.1),
        divisor=st.sampled_from([1, 4, 8]),
        seed=st.integers(0, 2**16),
        use_gamma=st.booleans(),
    )
    @settings(max_examples=100, deadline=None)
    def test_feasible_and_maximal(self, sizes: list[int], share: float, divisor: int, seed: int, use_gamma: bool):
        gammas = list(torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed)).split(sizes))

        def counts_at(sparsity: float) -> list[int]:
            keep = global_gamma_keep(gammas, sparsity) if use_gamma else uniform_keep(sizes, sparsity)
            return [round_channels(k, c, divisor, 0) for k, c in zip(keep, sizes)]

        def cost(counts: list[int]) -> float:
            # A chain of layers: products of neighbours, like MACs.
            return float(sum(a * b for a, b in zip([3, *counts], [*counts, 10])))

        budget = share * cost(sizes)
        sparsity, counts = fit_to_budget(cost, counts_at, budget)
        assert cost(counts) <= budget
        assert counts == counts_at(sparsity)
        if sparsity > 1e-4:
            assert cost(counts_at(sparsity - 1e-4)) > budget
