"""Pairs of convolutions: attached without changing anything, cut, merged, saved, loaded and rebuilt."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from graph.channel_law import randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from structures.test_law import macs_by_running
from torch import nn

from prune_mm.graph import trace
from prune_mm.pruners.hinge_math import init_pair, pair_rank
from prune_mm.structures import ChannelSlice, GroupedConv, Plan, structure_from_dict
from prune_mm.structures.low_rank import ConvPair, LowRank
from prune_mm.structures.pair import (
    attach_pair,
    dense_kernel,
    dense_shapes,
    is_paired,
    merge_pair_,
    merging_is_cheaper,
    pair_matrix,
    reset_unloaded_pair,
    set_pair,
    why_no_pair,
)
from prune_mm.structures.plan import compact_stage, count_macs
from prune_mm.structures.rewrite import scatter_behind

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
EXACT = ("svd2", "svd", "p-identity")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@torch.no_grad()
def same(first, second, *inputs, tolerance=2e-6):
    """Whether two modules compute the same, relative to the largest output."""
    want, got = first(*inputs), second(*inputs)
    assert want.shape == got.shape
    return float((want - got).abs().max()) <= tolerance * (1 + float(want.abs().max()))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_mask(count, generator):
    mask = torch.rand(count, generator=generator) < 0.6
    mask[int(torch.randint(count, (), generator=generator))] = True
    return mask


class Chain(nn.Module):
    """Two convolutions that get a pair, and one that does not; the last has fewer weights a filter than filters."""

    def __init__(self, bias=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, stride=2, bias=bias), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 1, bias=bias), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


PAIRED = ("conv1", "conv2")


def paired(net, method="svd2"):
    """A copy with pairs, split by ``method``."""
    net = copy.deepcopy(net)
    for name in PAIRED:
        conv = net.get_submodule(name)
        kernel = conv.weight.detach().clone()
        attach_pair(conv, pair_rank(kernel.shape, method))
        set_pair(conv, *init_pair(kernel, method))
    return net


class TestAttach:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("outputs", "inputs", "rank"), [(5, 3, 5), (20, 2, 6), (20, 2, 20), (6, 2, 6)])
    def test_the_function_stays(self, dims, bias, outputs, inputs, rank):
        kernel = [3, *[1] * (dims - 1)]
        conv = CONVS[dims](inputs, outputs, kernel, bias=bias)
        dense = copy.deepcopy(conv)
        pair = attach_pair(conv, rank)
        assert same(dense, conv, torch.randn(2, inputs, *[5] * dims))
        assert same(dense, conv, torch.randn(inputs, *[5] * dims)), "unbatched"
        assert type(conv) is type(pair) is CONVS[dims]
        assert (conv.out_channels, pair.in_channels, pair.out_channels) == (rank, rank, outputs)
        expected = {"weight": (rank, inputs, *kernel), "pair.weight": (outputs, rank, *[1] * dims)}
        expected |= {"pair.bias": (outputs,)} if bias else {}
        assert {name: tuple(p.shape) for name, p in conv.named_parameters()} == expected

    def test_rank_is_the_smaller_one(self):
        for conv, rank in ((nn.Conv2d(2, 6, 1), 2), (nn.Conv2d(2, 6, 3), 6)):
            attach_pair(conv)
            assert conv.out_channels == rank

    @pytest.mark.parametrize(
        "options",
        [
            {"stride": 2},
            {"dilation": 2, "padding": 2},
            {"padding": "same"},
            {"padding": 2, "padding_mode": "reflect"},
            {"padding": (1, 2), "padding_mode": "circular"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("method", EXACT)
    def test_every_exact_method(self, options, method):
        conv = nn.Conv2d(3, 7, 3, **options)
        dense = copy.deepcopy(conv)
        attach_pair(conv, pair_rank(conv.weight.shape, method))
        set_pair(conv, *init_pair(dense.weight, method))
        assert same(dense, conv, torch.randn(2, 3, 9, 8))
        merge_pair_(conv)
        assert torch.allclose(conv.weight, dense.weight, atol=1e-7)
        assert same(dense, conv, torch.randn(2, 3, 9, 8))

    @SETTINGS
    @given(
        st.integers(1, 9),
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from(EXACT),
        st.booleans(),
        st.integers(0, 99),
    )
    def test_attached_split_and_merged(self, outputs, inputs, kernel, method, bias, seed):
        torch.manual_seed(seed)
        conv = nn.Conv2d(inputs, outputs, kernel, bias=bias)
        dense, x = copy.deepcopy(conv), torch.randn(2, inputs, 5, 4)
        attach_pair(conv, pair_rank(conv.weight.shape, method))
        assert same(dense, conv, x)
        parameters = list(conv.parameters())
        set_pair(conv, *init_pair(dense_kernel(conv), method))
        assert same(dense, conv, x)
        assert all(a is b for a, b in zip(parameters, conv.parameters())), "an optimizer holds them"
        merge_pair_(conv)
        assert same(dense, conv, x)
        assert repr(conv) == repr(dense)
        assert not conv._forward_hooks
        assert not conv._load_state_dict_pre_hooks

    def test_frozen_types_modes_and_random_state(self):
        conv = nn.Conv2d(2, 3, 3).to(torch.bfloat16).requires_grad_(False).eval()
        before = torch.get_rng_state()
        pair = attach_pair(conv)
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(p.requires_grad for p in conv.parameters())
        assert pair.weight.dtype is torch.bfloat16
        assert not pair.training
        with torch.device("meta"):
            meta = nn.Conv2d(2, 3, 3)
        assert attach_pair(meta).weight.is_meta

    def test_the_weight_stays_the_same_parameter_where_it_can(self):
        conv = nn.Conv2d(2, 3, 3)
        weight, bias = conv.weight, conv.bias
        attach_pair(conv)
        assert conv.weight is weight
        assert conv.pair.bias is bias

    def test_what_cannot_become_a_pair(self):
        class Own(nn.Conv2d):
            def forward(self, x):
                return super().forward(x).abs()

        for module, word in (
            (nn.Linear(2, 3), "Linear"),
            (nn.ConvTranspose2d(2, 3, 1), "ConvTranspose2d"),
            (nn.Conv2d(4, 4, 1, groups=2), "2 groups"),
            (Own(2, 3, 1), "of its own"),
            (nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 1)), "of its own"),
        ):
            assert word in why_no_pair(module)
            with pytest.raises(ValueError, match=word):
                attach_pair(module)
        conv = nn.Conv2d(2, 3, 3)
        with pytest.raises(ValueError, match="rank 3 or 18, not 4"):
            attach_pair(conv, 4)
        assert not is_paired(conv)
        attach_pair(conv)
        with pytest.raises(ValueError, match="already"):
            attach_pair(conv)

    def test_sizes_are_checked_before_anything_is_set(self):
        conv = nn.Conv2d(2, 3, 3)
        attach_pair(conv)
        before = conv.weight.clone()
        with pytest.raises(ValueError, match="sizes"):
            set_pair(conv, torch.zeros(3, 2, 3, 3), torch.zeros(4, 3))
        assert torch.equal(conv.weight, before)

    def test_the_matrix_is_a_view(self):
        weight = torch.randn(3, 2, 1, 1)
        for kernel in (
            weight,
            weight.to(memory_format=torch.channels_last),
            torch.randn(1, 1, 1, 1),
            torch.randn(3, 2),
        ):
            matrix = pair_matrix(kernel)
            assert matrix.shape == (kernel.shape[1], kernel.shape[0])
            matrix[0, 0] = 7.0
            assert float(kernel.flatten()[0]) == 7
        with pytest.raises(ValueError, match="no matrix"):
            pair_matrix(torch.randn(3, 2, 3, 1))


class TestStateDicts:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("method", EXACT)
    def test_a_dense_checkpoint_loads_into_pairs(self, bias, method):
        dense, net = Chain(bias).eval(), paired(Chain(bias), method).eval()
        state = dense.state_dict()
        names = list(state)
        net.load_state_dict(state)
        assert list(state) == names, "the caller's state dict stays as it is"
        assert same(dense, net, torch.randn(2, 3, 9, 9))

    def test_through_the_loader_of_mmengine(self):
        from mmengine.runner.checkpoint import load_state_dict

        dense, net = Chain(True).eval(), paired(Chain(True)).eval()
        load_state_dict(net, dense.state_dict(), strict=True)
        assert same(dense, net, torch.randn(2, 3, 9, 9))

    def test_one_convolution_alone(self):
        dense, conv = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
        attach_pair(conv)
        conv.load_state_dict(dense.state_dict())
        assert same(dense, conv, torch.randn(1, 2, 4, 4))

    def test_a_paired_checkpoint_loads_as_it_is(self):
        net, other = paired(Chain(True)).eval(), paired(Chain(True), "svd2").eval()
        other.load_state_dict(net.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))

    def test_what_a_dense_checkpoint_must_hold(self):
        dense = {name: tuple(t.shape) for name, t in Chain(True).state_dict().items()}
        for method in EXACT:
            net = paired(Chain(True), method)
            assert dense_shapes({name: t.shape for name, t in net.state_dict().items()}) == dense
        assert dense_shapes(dense) == dense
        conv = nn.Conv2d(2, 3, 1)
        attach_pair(conv)
        shapes = {name: p.shape for name, p in conv.named_parameters()}
        assert dense_shapes(shapes) == {"weight": (3, 2, 1, 1), "bias": (3,)}

    def test_other_sizes_are_refused_by_name(self):
        net = paired(Chain())
        state = Chain().state_dict() | {"conv1.weight": torch.zeros(9, 4, 3, 3)}
        with pytest.raises(RuntimeError, match=r"conv1\.weight"):
            net.load_state_dict(state)
        state["conv1.weight"] = torch.tensor(0.0)
        with pytest.raises(RuntimeError, match=r"conv1\.weight"):
            net.load_state_dict(state)
        del state["conv1.weight"]
        with pytest.raises(RuntimeError, match=r"conv1\.weight"):
            net.load_state_dict(state)
        net.load_state_dict({}, strict=False)

    def test_initialised_pairs_are_made_good_unless_loaded(self):
        """OpenMMLab initialises every convolution it finds, also the 1x1 ones."""
        for load in (False, True):
            dense, net = Chain().eval(), paired(Chain(), "p-identity").eval()
            for module in net.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
            expected = Chain().eval()
            if load:
                net.load_state_dict(dense.state_dict())
                expected = dense
            else:
                expected.load_state_dict({k: v for k, v in net.state_dict().items() if ".pair" not in k})
            for name in PAIRED:
                reset_unloaded_pair(net.get_submodule(name))
            assert same(expected, net, torch.randn(2, 3, 9, 9))

    def test_a_split_that_was_loaded_stays(self):
        source, net = paired(Chain()), paired(Chain())
        net.load_state_dict(source.state_dict())
        for name in PAIRED:
            reset_unloaded_pair(net.get_submodule(name))
        assert torch.equal(net.conv1.pair.weight, source.conv1.pair.weight)

    def test_copies_are_independent(self):
        net = paired(Chain(True)).eval()
        x = torch.randn(2, 3, 9, 9)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert same(net, other, x)
            other.conv1.pair.weight.data.zero_()
            assert not same(net, other, x, tolerance=1e-3), "the copy runs its own pair"
            dense = Chain(True).eval()
            other.load_state_dict(dense.state_dict())
            assert same(dense, other, x)
            assert not same(dense, net, x, tolerance=1e-3)

    def test_averages(self):
        from mmengine.model import ExponentialMovingAverage

        net = paired(Chain(True))
        average = ExponentialMovingAverage(net, momentum=0.5)
        average.update_parameters(net)
        for p in net.parameters():
            p.data.add_(1.0)
        average.update_parameters(net)
        for mine, theirs in zip(average.module.parameters(), net.parameters()):
            assert torch.allclose(mine, theirs - 0.5, atol=1e-6)
        average.module.eval()(torch.randn(2, 3, 9, 9))

    def test_gradients_reach_every_parameter_under_ddp(self, tmp_path):
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1)
        try:
            net = DistributedDataParallel(paired(Chain(True)))
            for _ in range(2):
                net(torch.randn(4, 3, 9, 9)).square().sum().backward()
        finally:
            dist.destroy_process_group()
        assert all(
            p.grad is not None and bool(p.grad.any()) for name, p in net.named_parameters() if "bias" not in name
        )

    def test_traced_by_jit(self):
        net, x = paired(Chain(True)).eval(), torch.randn(2, 3, 9, 9)
        assert same(net, torch.jit.trace(net, x), x)


class TestGraph:
    def test_intermediate_channels_and_outputs_are_groups_of_their_own(self):
        net = paired(Chain(True))
        graph = trace(net, torch.randn(1, 3, 9, 9))
        names = [group.name for group in graph.prunable]
        assert names == ["stem", "conv1", "conv1.pair", "conv2", "conv2.pair"]
        slots = [(slot.tensor, slot.axis) for slot in graph["conv1"].slots]
        assert slots == [("conv1.weight", 0), ("conv1.pair.weight", 1)]
        assert graph["conv2"].channels == 8
        assert ("conv2.weight", 1) in [(slot.tensor, slot.axis) for slot in graph["conv1.pair"].slots]


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
