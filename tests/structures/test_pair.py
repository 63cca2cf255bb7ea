"""Pairs of convolutions: attached without changing anything, saved, loaded, merged and traced."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structures.pair_nets import CONVS, EXACT, PAIRED, Chain, paired, same
from torch import nn

from prune_mm.graph import trace
from prune_mm.pruners.hinge_math import init_pair, pair_rank
from prune_mm.structures.pair import (
    attach_pair,
    dense_kernel,
    dense_shapes,
    is_paired,
    merge_pair_,
    pair_matrix,
    reset_unloaded_pair,
    set_pair,
    why_no_pair,
)

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
