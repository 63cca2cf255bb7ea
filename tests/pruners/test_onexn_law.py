"""OneByN on networks of all kinds: what trains with masks and what is exported compute the same."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onexn_nets import (
    begun,
    build,
    names,
    randomise,
    rearranged,
)
from torch import nn

from prune_mm.structures import BlockSparse


def torchvision_net(name):
    return randomise(getattr(torchvision.models, name)())


CASES = {
    "resnet18": (lambda: torchvision_net("resnet18"), {"n": 16, "kernels": "all", "rearrange": True}),
    "mobilenet_v3": (lambda: torchvision_net("mobilenet_v3_small"), {"n": 4, "tail": "pad", "rearrange": True}),
    "efficientnet": (lambda: torchvision_net("efficientnet_b0"), {"n": 8, "rate": 0.7, "rearrange": True}),
    "regnet": (lambda: torchvision_net("regnet_y_400mf"), {"n": 3, "kernels": "all", "tail": "pad"}),
    "densenet": (
        lambda: randomise(torchvision.models.DenseNet(12, (3, 4, 3), 20)),
        {"n": 5, "kernels": "all", "rearrange": True},
    ),
    "ssd_vgg": (
        lambda: build(
            {"type": "mmdet.SSDVGG", "depth": 16, "with_last_pool": False, "ceil_mode": True,
             "out_indices": (3, 4), "out_feature_indices": (22, 34)}
        ),
        {"n": 16, "kernels": "all", "rearrange": True},
    ),
    "mmdet_resnet": (
        lambda: build({"type": "mmdet.ResNet", "depth": 18, "frozen_stages": 1, "norm_eval": True}),
        {"n": 32, "kernels": "all", "rearrange": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_masked_equals_compact(name):
    make, options = CASES[name]
    pruner = begun(make(), **options)[3]
    assert len(pruner.layers) >= 14
    assert any(isinstance(s, BlockSparse) for s in pruner.structures())
    if options.get("rearrange"):
        assert len(rearranged(pruner)) >= 5
    if name == "mmdet_resnet":
        assert not any(name.startswith("layer1") for name in names(pruner))


def test_a_classifier_with_its_head():
    """The whole classifier as scope: the fully connected layer is pruned, and the last convolution rearranged."""
    config = {
        "type": "ImageClassifier",
        "backbone": {"type": "MobileNetV2", "widen_factor": 0.25},
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": 10, "in_channels": 1280},
    }
    _, _, small, pruner = begun(build(config), n=4, rearrange=True)
    assert names(pruner)[-1] == "head.fc"
    assert type(small.head.fc).__name__ == "BlockSparseLinear"
    assert "backbone.conv2.conv" in rearranged(pruner)
    assert "head.fc" not in rearranged(pruner)


# -- any network ------------------------------------------------------------------------------------------------------


@st.composite
def networks(draw):
    """A few convolutions in a row, some with a norm, a residual add, a depthwise or a grouped one between."""
    width, layers = draw(st.integers(1, 9)), []
    layers += [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["plain", "residual", "depthwise", "grouped"]))
        kernel = draw(st.sampled_from([1, 3]))
        if kind == "residual":
            layers += [Residual(width, draw(st.integers(1, 9)), kernel), nn.ReLU()]
            continue
        if kind == "depthwise":
            layers += [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=draw(st.booleans()))]
        if kind == "grouped" and width % 2 == 0:
            layers += [nn.Conv2d(width, width, 3, padding=1, groups=2)]
        wider = draw(st.integers(1, 9))
        layers += [nn.Conv2d(width, wider, kernel, stride=draw(st.sampled_from([1, 2])), bias=draw(st.booleans()))]
        layers += [nn.BatchNorm2d(wider)] * draw(st.booleans()) + [nn.Hardswish()]
        width = wider
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, draw(st.integers(1, 9)))]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self, width, hidden, kernel):
        super().__init__()
        self.first = nn.Conv2d(width, hidden, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(hidden)
        self.second = nn.Conv2d(hidden, width, 1)

    def forward(self, x):
        return x + self.second(self.norm(self.first(x)).relu())


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    networks(),
    st.integers(1, 5),
    st.sampled_from([0.1, 0.5, 0.8, 1.0]),
    st.sampled_from(["dense", "pad"]),
    st.sampled_from(["l1", "rearranged", "random", "kernel", "weight", "filter"]),
    st.sampled_from(["pointwise", "all"]),
)
def test_any_network(module, n, rate, tail, criterion, kernels):
    options = {"rearrange": True} if criterion == "rearranged" else {"criterion": criterion}
    image = torch.randn(2, 3, 19, 23, generator=torch.Generator().manual_seed(1))
    _, _, _, pruner = begun(randomise(module), image, n=n, rate=rate, tail=tail, kernels=kernels, **options)
    for layer in pruner.layers:
        if criterion not in ("l1", "rearranged", "random"):
            continue
        rows = -(-layer.shape[0] // n) if tail == "pad" else layer.shape[0] // n
        mask = pruner.masks[layer.name][pruner.perms[layer.name]].reshape(*layer.shape[:2], -1)
        blocks = mask.all(2)[::n][:rows]
        assert int((~blocks).sum()) == int(rows * layer.shape[1] * rate)
