"""Pairs cut, merged, saved and rebuilt: the law, and plain data."""

from __future__ import annotations

import copy

import pytest
import torch
from graph.channel_law import randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from structures.pair_nets import EXACT, PAIRED, Chain, paired, random_mask, same, seeded
from structures.test_law import macs_by_running
from torch import nn

from prune_mm.graph import trace
from prune_mm.pruners.hinge_math import init_pair
from prune_mm.structures import ChannelSlice, GroupedConv, Plan, structure_from_dict
from prune_mm.structures.low_rank import ConvPair, LowRank
from prune_mm.structures.pair import (
    attach_pair,
    is_paired,
    merging_is_cheaper,
    pair_matrix,
    set_pair,
)
from prune_mm.structures.plan import compact_stage, count_macs
from prune_mm.structures.rewrite import scatter_behind

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def decisions(net, seed, merge):
    """Random rows of every pair, random channels of every other group: the stage that cuts."""
    generator = seeded(seed)
    graph = trace(net, torch.randn(1, 3, 9, 9), verify=False)
    stage = []
    for group in graph.prunable:
        mask = random_mask(group.channels, generator)
        if group.name in PAIRED:
            stage.append(LowRank.from_mask(group.name, mask, merge[PAIRED.index(group.name)]))
        else:
            stage.append(ChannelSlice.from_mask(group.name, mask, group.slots))
    return tuple(stage)


class TestLaw:
    @SETTINGS
    @given(st.booleans(), st.sampled_from(EXACT), st.tuples(st.booleans(), st.booleans()), st.integers(0, 999))
    def test_masked_equals_compact_equals_rebuilt(self, bias, method, merge, seed):
        torch.manual_seed(seed)
        dense, x = randomised(Chain(bias), seed), torch.randn(2, 3, 9, 9)
        net = paired(dense, method)
        assert same(dense, net, x, tolerance=1e-5)
        pairs = tuple(
            ConvPair(name, net.get_submodule(name).out_channels, dense.get_submodule(name).out_channels)
            for name in PAIRED
        )
        cut = decisions(net, seed, merge)
        plan = Plan("", (pairs, cut))
        assert Plan.from_json(plan.to_json()) == plan

        masked = copy.deepcopy(net)
        Plan("", (cut,)).apply_masks(masked)
        compact = plan.compact(copy.deepcopy(masked))
        assert same(masked, compact, x, tolerance=1e-5)

        # From the dense config: shapes first, then the weights of the file.
        rebuilt = Plan.from_json(plan.to_json()).compact(Chain(bias)).eval()
        rebuilt.load_state_dict(compact.state_dict())
        assert same(compact, rebuilt, x, tolerance=0)
        assert [is_paired(rebuilt.get_submodule(name)) for name in PAIRED] == [not merged for merged in merge]

        self.costs_what_was_foretold(plan, dense, compact, x)

    def costs_what_was_foretold(self, plan, dense, compact, x):
        shapes = {name: tuple(p.shape) for name, p in dense.named_parameters()}
        macs, positions = macs_by_running(dense, x)
        assert count_macs(shapes, positions) == macs
        foretold = plan.shapes(shapes)
        assert foretold == {name: tuple(p.shape) for name, p in compact.named_parameters()}
        for stage in plan.stages:
            for structure in stage:
                if isinstance(structure, (ConvPair, LowRank)):
                    structure.place(positions)
        found, measured = macs_by_running(compact, x)
        assert count_macs(foretold, positions) == found
        assert positions == measured

    @SETTINGS
    @given(st.sampled_from(EXACT), st.integers(0, 999))
    def test_zero_rows_are_removed_exactly(self, method, seed):
        """Rows of A that a proximal step set to zero; the filters that made them are still there."""
        torch.manual_seed(seed)
        net, x = paired(Chain(True), method).eval(), torch.randn(2, 3, 9, 9)
        stage = []
        for name in PAIRED:
            matrix = pair_matrix(net.get_submodule(name).pair.weight.data)
            mask = random_mask(matrix.shape[0], seeded(seed))
            matrix[~mask] = 0
            stage.append(LowRank.from_mask(name, mask, bool(seed % 2)))
        compact = copy.deepcopy(net)
        compact_stage(compact, stage)
        assert same(net, compact, x)

    def test_the_plan_of_a_paired_network_needs_no_dense_one(self):
        net = paired(Chain(True)).eval()
        stage = decisions(net, 3, (True, False))
        shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        plan = Plan("", (stage,))
        foretold = plan.shapes(shapes)
        assert foretold == Plan("", ((ConvPair("conv1", 8, 8), ConvPair("conv2", 8, 12)), stage)).shapes(shapes)
        assert foretold == {name: tuple(p.shape) for name, p in plan.compact(net).named_parameters()}

    def test_merging_saves_what_it_promises(self):
        for keep in range(1, 9):
            for merge in (False, True):
                net = paired(Chain())
                compact_stage(net, [LowRank("conv1", tuple(range(keep)), 8, merge)])
                count = sum(p.numel() for p in net.conv1.parameters())
                assert count == (8 * 36 if merge else keep * 36 + keep * 8)
            assert merging_is_cheaper(8, keep, 4, 9) == (keep * (36 + 8) >= 8 * 36)

    def test_a_compact_pair_trains_and_is_cut_again(self):
        net = paired(Chain(True)).eval()
        compact_stage(net, decisions(net, 1, (False, False)))
        again = trace(net, torch.randn(1, 3, 9, 9))
        assert {"conv1", "conv1.pair"} <= {group.name for group in again.groups}
        rank = net.conv1.out_channels
        masked = copy.deepcopy(net)
        stage = [LowRank("conv1", (0,), rank)]
        stage[0].apply_mask(masked)
        compact_stage(net, stage)
        x = torch.randn(2, 3, 9, 9)
        assert same(masked, net, x)
        net.train()(x).sum().backward()
        assert all(p.grad is not None for p in net.parameters())

    def test_beside_a_scatter_and_groups(self):
        """Hooks behind the convolution stay behind the pair, those of its own rows before it."""
        conv = nn.Conv2d(4, 6, 3, bias=False)
        scatter_behind(nn.ModuleDict({"conv": conv}), "conv", torch.tensor([0, 2, 3, 4, 6, 7]), 9)
        wide = copy.deepcopy(conv)
        attach_pair(conv)
        set_pair(conv, *init_pair(wide.weight, "svd2"))
        x = torch.randn(2, 4, 5, 5)
        assert same(wide, conv, x)
        order = torch.randperm(6, generator=seeded(0)).tolist()
        divided = GroupedConv.from_perms("", 2, order, [2, 0, 3, 1])
        masked = copy.deepcopy(conv)
        divided.apply_mask(masked)
        compact_stage(conv, [divided])
        assert same(masked, conv, x)
        with pytest.raises(ValueError, match="divided into groups"):
            compact_stage(conv, [LowRank("", (0, 1), 6)])


class TestPlainData:
    @SETTINGS
    @given(st.text(max_size=20), st.integers(1, 50), st.booleans(), st.integers(0, 99))
    def test_round_trip(self, name, rank, merge, seed):
        for structure in (
            LowRank.from_mask(name, random_mask(rank, seeded(seed)), merge),
            ConvPair(name, rank, rank + seed),
        ):
            assert structure_from_dict(structure.to_dict()) == structure
            assert Plan.from_json(Plan("", ((structure,),)).to_json()).stages == ((structure,),)

    GOOD = LowRank("conv1", (0, 2), 8).to_dict()
    PAIR = ConvPair("conv1", 8, 8).to_dict()

    @pytest.mark.parametrize(
        ("data", "word"),
        [
            ({**GOOD, "keep": []}, "keep is empty"),
            ({**GOOD, "keep": [0, 8]}, "below 8"),
            ({**GOOD, "keep": [2, 0]}, "ascending"),
            ({**GOOD, "keep": [True]}, "integers"),
            ({**GOOD, "keep": "0"}, "integers"),
            ({**GOOD, "rank": 0}, "rank"),
            ({**GOOD, "rank": 1 << 30}, "rank"),
            ({**GOOD, "rank": 8.0}, "rank"),
            ({**GOOD, "merge": 1}, "merge"),
            ({**GOOD, "name": 3}, "name"),
            ({k: v for k, v in GOOD.items() if k != "merge"}, "'merge' is missing"),
            ({**PAIR, "outputs": -1}, "outputs"),
            ({**PAIR, "rank": None}, "rank"),
            ({**PAIR, "name": None}, "name"),
            ({k: v for k, v in PAIR.items() if k != "rank"}, "'rank' is missing"),
        ],
    )
    def test_damaged_data(self, data, word):
        with pytest.raises(ValueError, match=word):
            structure_from_dict(data)

    def test_no_channel_stays(self):
        with pytest.raises(ValueError, match="at least one"):
            LowRank.from_mask("conv1", torch.zeros(3, dtype=torch.bool))

    @pytest.mark.parametrize(
        ("stages", "word"),
        [
            (((ConvPair("conv1", 7, 8),),), "rank 8 or 36"),
            (((ConvPair("conv1", 9, 9),),), "8 outputs"),
            (((ConvPair("bn1", 8, 8),),), "BatchNorm2d"),
            (((ConvPair("nowhere", 8, 8),),), "no module 'nowhere'"),
            (((LowRank("nowhere", (0,), 8),),), "nowhere"),
            (((LowRank("conv1", (0,), 8),),), r"conv1\.pair"),
            (((ConvPair("conv1", 8, 8),), (LowRank("conv1", (0,), 7),)), "expects 7"),
            (((ConvPair("conv1", 8, 8),), (LowRank("conv1", (0,), 8), LowRank("conv1", (1,), 8))), "nothing"),
        ],
    )
    def test_a_plan_for_another_network(self, stages, word):
        with pytest.raises(ValueError, match=word):
            Plan("", stages).compact(Chain())

    def test_a_refused_stage_changes_nothing(self):
        net = Chain(True)
        before = {name: tuple(p.shape) for name, p in net.named_parameters()}
        with pytest.raises(ValueError, match="rank"):
            Plan("", ((ConvPair("conv1", 8, 8), ConvPair("conv2", 3, 12)),)).compact(net)
        assert {name: tuple(p.shape) for name, p in net.named_parameters()} == before
        with pytest.raises(ValueError, match="no pair"):
            LowRank("conv1", (0,), 8).apply_mask(net)

    def test_a_pair_of_another_size_is_refused(self):
        net = paired(Chain())
        Plan("", ((ConvPair("conv1", 8, 8),),)).compact(net)
        with pytest.raises(ValueError, match="the plan expects 8 and 36"):
            Plan("", ((ConvPair("conv1", 36, 8),),)).compact(net)
