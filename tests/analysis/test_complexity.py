"""MACs, positions, parameters and bytes: golden numbers, an independent counter, and nothing changed on the way."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from prune_mm.analysis.complexity import (
    Complexity,
    _count_on_meta,
    _count_real,
    layer_positions,
    measure_complexity,
)
from prune_mm.structures.plan import count_macs


def image(size: int = 224, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, size, size)


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def macs_of_both_paths(module: nn.Module, *inputs: Any) -> dict[str, int]:
    """MACs by name, after checking that the copy without data and the module itself give the same."""
    meta = _count_on_meta(module, inputs)
    real = _count_real(module, lambda: module(*inputs))
    assert meta.macs == real.macs
    assert meta.positions() == real.positions()
    assert not meta.uncounted
    assert not real.uncounted
    return dict(real.macs)


def macs_by_hooks(module: nn.Module, x: Tensor) -> int:
    """An independent count: shapes of inputs and outputs of layers, weights from their hyper-parameters."""
    total = 0

    def hook(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear):
            total += layer.in_features * layer.out_features * (inputs[0].numel() // inputs[0].shape[-1])
        else:
            upsampling = "Transpose" in type(layer).__name__
            field = int(np.prod(layer.kernel_size)) * layer.in_channels * layer.out_channels // layer.groups
            grid = inputs[0] if upsampling else output
            total += field * grid.shape[0] * int(np.prod(grid.shape[2:]))

    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    training = module.training
    with torch.no_grad():
        module.eval()(x)
    module.train(training)
    for handle in handles:
        handle.remove()
    return total


class TestGolden:
    @pytest.mark.parametrize(
        ("name", "macs", "chex_macs", "params"),
        [
            ("resnet18", 1_814_073_344, 1_814_074_344, 11_689_512),
            ("resnet34", 3_663_761_408, 3_663_762_310, 21_797_672),
            ("resnet50", 4_089_184_256, 4_089_185_060, 25_557_032),
            ("resnet101", 7_801_405_440, 7_801_405_362, 44_549_160),
        ],
    )
    def test_resnets(self, name: str, macs: int, chex_macs: int, params: int):
        """CHEX adds the 1000 biases of the classifier, and leaves out weights that happen to be exactly 0 at birth."""
        torch.manual_seed(0)
        net = getattr(torchvision.models, name)()
        found = measure_complexity(net, example_inputs=image())
        assert (found.macs, found.params) == (macs, params)
        positions = layer_positions(net, image())
        zeros = sum(int((net.get_parameter(key) == 0).sum()) * count for key, count in positions.items())
        assert found.macs - zeros == chex_macs - 1000

    def test_detection_backbone(self):
        net = torchvision.models.resnet50()
        net.layer3[0].conv2.stride = net.layer3[0].downsample[0].stride = (1, 1)
        body = nn.Sequential(*list(net.children())[:7])
        positions = layer_positions(body, image(300))
        assert count_macs(parameter_shapes(body), positions) == 13_517_961_984
        assert len(positions) == 43

    def test_a_large_image_on_meta_needs_no_values(self):
        net = torchvision.models.resnet50()
        small, large = (measure_complexity(net, example_inputs=torch.empty(1, 3, *s, device="meta"))
                        for s in ((224, 224), (896, 1344)))  # fmt: skip
        classifier = net.fc.weight.numel()
        assert large.macs - classifier == 24 * (small.macs - classifier)


class TestAgreement:
    @pytest.mark.parametrize(
        "name", ["mobilenet_v2", "resnext50_32x4d", "shufflenet_v2_x1_0", "efficientnet_b0", "densenet121"]
    )
    def test_with_hooks_and_the_plan(self, name: str):
        net = getattr(torchvision.models, name)()
        x = image(64, batch=2)
        expected = macs_by_hooks(net, x)
        assert sum(macs_of_both_paths(net, x).values()) == expected
        assert count_macs(parameter_shapes(net), layer_positions(net, x)) == expected
        assert measure_complexity(net, example_inputs=x).macs == expected

    def test_segmentation_net_with_dict_outputs(self):
        net = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)
        assert measure_complexity(net, example_inputs=image(64)).macs == macs_by_hooks(net, image(64))

    def test_whole_detector_in_its_own_way(self):
        net = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
        images = [torch.rand(3, 200, 300)]
        found = measure_complexity(net, forward=lambda: net(images))
        assert found.macs == macs_by_hooks(net, images)
        assert measure_complexity(net, example_inputs=(images,)).macs == found.macs


class TestLayers:
    @pytest.mark.parametrize(
        ("layer", "shape", "positions"),
        [
            (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 7), 2 * 5 * 4),
            (nn.Conv2d(4, 8, 3, groups=4, bias=False), (1, 4, 9, 7), 7 * 5),
            (nn.Conv1d(4, 6, 3, dilation=2), (3, 4, 10), 3 * 6),
            (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6), 3 * 4 * 5),
            (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 3), 2 * 5 * 3),
            (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (1, 4, 5, 3), 5 * 3),
            (nn.Linear(4, 6), (4,), 1),
            (nn.Linear(4, 6), (5, 4), 5),
            (nn.Linear(4, 6, bias=False), (2, 3, 5, 4), 30),
        ],
    )
    @pytest.mark.parametrize("inference", [False, True])
    def test_one_layer(self, layer: nn.Module, shape: tuple[int, ...], positions: int, inference: bool):
        with torch.inference_mode(inference):
            x = torch.rand(shape)
            assert layer_positions(layer, x) == {"weight": positions}
            counter = _count_real(layer, lambda: run_in_inference_mode(layer, x) if inference else layer(x))
        assert counter.positions() == {"weight": positions}

    def test_linear_over_a_transposed_input(self):
        class Mixer(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens = nn.Linear(5, 5, bias=False)

            def forward(self, x):
                return self.tokens(x.transpose(1, 2))

        assert layer_positions(Mixer(), torch.rand(2, 5, 3)) == {"tokens.weight": 6}

    def test_shared_layer_adds_up(self):
        conv = nn.Conv2d(3, 3, 3, padding=1)
        assert layer_positions(nn.Sequential(conv, nn.AvgPool2d(2), conv), image(8)) == {"0.weight": 64 + 16}

    def test_deformable_convolution(self):
        net = torchvision.ops.DeformConv2d(3, 5, 3, stride=2, padding=1)
        inputs = (image(8), torch.zeros(1, 18, 4, 4))
        assert macs_of_both_paths(net, *inputs) == {"weight": 5 * 27 * 16}

    def test_attention_counts_its_projections_only(self):
        net = nn.MultiheadAttention(8, 2, batch_first=True)
        x = torch.rand(2, 5, 8)
        expected = {"in_proj_weight": 24 * 8 * 10, "out_proj.weight": 8 * 8 * 10}
        assert macs_of_both_paths(net, x, x, x) == expected

    def test_parameters_in_one_flat_storage(self):
        net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False))
        flat = torch.rand(12 + 20)
        net[0].weight.data, net[1].weight.data = flat[:12].view(4, 3), flat[12:].view(5, 4)
        assert layer_positions(net, torch.rand(6, 3)) == {"0.weight": 6, "1.weight": 6}
        assert dict(_count_real(net, lambda: net(torch.rand(6, 3))).macs) == {"0.weight": 72, "1.weight": 120}

    def test_uneven_use_of_one_weight_leaves_the_rest_under_the_module(self):
        class Head(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, queries, memory):
                return self.attention(queries, memory, memory)

        net, inputs = Head(), (torch.rand(1, 3, 8), torch.rand(1, 7, 8))
        positions = layer_positions(net, inputs)
        shapes = {**parameter_shapes(net), "attention": ()}
        assert count_macs(shapes, positions) == 64 * (3 + 7 + 7) + 64 * 3
        assert positions["attention.in_proj_weight"] == 17 // 3
        assert positions["attention"] == 192 * 17 // 3 - 192 * (17 // 3) == 128

    def test_matrix_products_with_a_parameter(self):
        class Products(nn.Module):
            def __init__(self):
                super().__init__()
                self.left = nn.Parameter(torch.rand(6, 4))
                self.vector = nn.Parameter(torch.rand(6))
                self.heads = nn.Parameter(torch.rand(3, 6, 2))

            def forward(self, x):
                hidden = self.left @ x
                return (hidden.t() @ self.vector, torch.einsum("ij,hik->hjk", hidden, self.heads))

        found = macs_of_both_paths(Products(), torch.rand(4, 5))
        assert found == {"left": 6 * 4 * 5, "vector": 6 * 5, "heads": 3 * 6 * 2 * 5}


def run_in_inference_mode(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return layer(x)


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class MaskedLinear(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", torch.ones(self.out_features, 1))

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class DynamicConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Linear(3, 2 * 3)

    def forward(self, x):
        return F.conv2d(x, self.kernel(x.mean((0, 2, 3))).view(2, 3, 1, 1))


class NumpyConv(nn.Conv2d):
    """Stands for a compiled kernel that the dispatcher does not see."""

    def forward(self, x):
        output = np.einsum("nchw,oc->nohw", x.numpy(), self.weight.detach().numpy()[:, :, 0, 0])
        return torch.from_numpy(output)


class TestComputedWeights:
    def test_weight_standardisation_and_masks(self):
        net = nn.Sequential(
            StandardisedConv(3, 4, 3), StandardisedConv(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            MaskedLinear(4, 4),
        )  # fmt: skip
        expected = {"0.weight": 108 * 72, "1.weight": 16 * 72, "4.weight": 16 * 2}
        assert macs_of_both_paths(net, image(8, batch=2)) == expected

    def test_two_sources_of_one_size_go_to_the_weight_of_the_running_module(self):
        class Shifted(nn.Linear):
            def __init__(self):
                super().__init__(3, 4)
                self.change = nn.Parameter(torch.zeros(4, 3))

            def forward(self, x):
                return F.linear(x, self.change + self.weight)

        assert macs_of_both_paths(nn.Sequential(Shifted()), torch.rand(5, 3)) == {"0.weight": 12 * 5}

    def test_of_several_sources_the_one_of_the_size_of_the_weight(self):
        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate = nn.Parameter(torch.rand(1, 3))
                self.kernel = nn.Parameter(torch.rand(4, 3))

            def forward(self, x):
                return F.conv2d(x, (self.gate * self.kernel)[:, :, None, None])

        assert macs_of_both_paths(Gated(), image(8)) == {"kernel": 12 * 64}

    def test_parametrisation(self):
        class Double(nn.Module):
            def forward(self, weight):
                return 2 * weight

        net = nn.Sequential(nn.Conv2d(3, 4, 3))
        parametrize.register_parametrization(net[0], "weight", Double())
        assert macs_of_both_paths(net, image(8)) == {"0.parametrizations.weight.original": 108 * 36}

    def test_weight_written_into_a_buffer_belongs_to_the_running_module(self):
        class Written(nn.Conv2d):
            def forward(self, x):
                weight = torch.zeros(self.weight.shape, device=x.device)
                weight.copy_(self.weight)
                return self._conv_forward(x, weight, self.bias)

        assert macs_of_both_paths(nn.Sequential(Written(3, 4, 3)), image(8)) == {"0.weight": 108 * 36}

    def test_kernel_computed_from_the_input_counts_under_the_module(self):
        expected = {"0.kernel.weight": 18, "0": 6 * 64}
        net = nn.Sequential(DynamicConv())
        assert macs_of_both_paths(net, image(8)) == expected
        assert layer_positions(net, image(8)) == {"0.kernel.weight": 1, "0": 6 * 64}
        assert measure_complexity(net, example_inputs=image(8)).macs == 18 + 6 * 64

    def test_autocast_copies_of_a_weight(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        with torch.autocast("cpu", torch.bfloat16):
            found = measure_complexity(net, forward=lambda: net(image(8)))
        assert found.macs == 108 * 36 + 20

    def test_kernel_outside_of_the_dispatcher(self):
        net = nn.Sequential(NumpyConv(3, 4, 1), nn.Conv2d(4, 5, 1))
        assert layer_positions(net, image(8, batch=2)) == {"0.weight": 128, "1.weight": 128}

    def test_product_without_a_rule_warns(self):
        net = nn.Bilinear(3, 4, 5)
        with pytest.warns(UserWarning, match=r"not counted: '_trilinear' with weight"):
            assert layer_positions(net, (torch.rand(2, 3), torch.rand(2, 4))) == {}

    def test_ordinary_nets_do_not_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer_positions(torchvision.models.convnext_tiny(), image(32))
            layer_positions(torchvision.models.vit_b_32(image_size=64), image(64))


class Restless(nn.Module):
    """Counts its calls in a buffer, replaces another, draws random numbers and needs values."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x):
        self.calls += 1
        self.last = x
        noise = torch.rand(()).item() + random.random() + np.random.rand()
        return self.conv(x) * noise if noise > -1 else x


class BackboneLikeMMDetection(nn.Module):
    """``train`` returns None and freezes a stage again."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.drop = nn.Dropout(0.5)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.stem.training = False
        self.stem[1].training = False

    def forward(self, x):
        if self.training:
            raise RuntimeError("must run in eval mode")
        return (self.drop(self.stem(x)),)


class TestNothingChanges:
    def test_buffers_and_random_numbers(self):
        net = Restless()
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        expected = (torch.rand(()).item(), random.random(), np.random.rand())
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        x = torch.ones(1, 3, 8, 8)
        assert layer_positions(net, x) == {"conv.weight": 36}
        assert measure_complexity(net, forward=lambda: net(x)).macs == 108 * 36
        assert (torch.rand(()).item(), random.random(), np.random.rand()) == expected
        assert net.calls.item() == 0
        assert net.last is None

    @pytest.mark.parametrize("real", [False, True])
    def test_modes_hooks_parameters_and_settings(self, real: bool):
        net = BackboneLikeMMDetection()
        flags = [child.training for child in net.modules()]
        state = {key: value.clone() for key, value in net.state_dict().items()}
        parameters = list(map(id, net.parameters()))
        fast = torch.backends.mha.get_fastpath_enabled()
        x = image(8)
        found = measure_complexity(net, forward=lambda: net(x)) if real else measure_complexity(net, example_inputs=x)
        assert found.macs == 108 * 36
        assert [child.training for child in net.modules()] == flags
        assert list(map(id, net.parameters())) == parameters
        assert all(not child._forward_hooks and not child._forward_pre_hooks for child in net.modules())
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        assert torch.backends.mha.get_fastpath_enabled() is fast
        assert torch.is_grad_enabled()

    def test_after_an_error(self):
        class Failing(nn.Module):
            def forward(self, x):
                raise ArithmeticError("on purpose")

        net = nn.Sequential(nn.Conv2d(3, 4, 3), Failing())
        with pytest.raises(ArithmeticError, match="on purpose"):
            layer_positions(net, image(8))
        assert net.training
        assert all(not child._forward_hooks and not child._forward_pre_hooks for child in net.modules())


class TestComplexity:
    def test_bytes_and_shared_parameters(self):
        net = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False).half(), nn.BatchNorm1d(3)])
        net[0].weight = net.tied = nn.Parameter(torch.rand(4, 4))
        net.register_buffer("scratch", torch.zeros(1000), persistent=False)
        net.forward = net[0].forward
        found = measure_complexity(net, forward=lambda: net(torch.rand(2, 4)))
        assert found == Complexity(macs=32, params=16 + 16 + 6, bytes=64 + 32 + 24 + 24 + 8)

    def test_errors(self):
        net = nn.Linear(3, 3)
        with pytest.raises(ValueError, match="either forward or example_inputs"):
            measure_complexity(net)
        with pytest.raises(ValueError, match="either forward or example_inputs"):
            measure_complexity(net, forward=lambda: None, example_inputs=torch.rand(3))
        with pytest.raises(TypeError, match="must hold a tensor, got str"):
            layer_positions(net, "image.png")

    def test_code_that_needs_values_says_so_for_inputs_without(self):
        with pytest.raises(RuntimeError, match="meta"):
            layer_positions(Restless(), torch.empty(1, 3, 8, 8, device="meta"))
