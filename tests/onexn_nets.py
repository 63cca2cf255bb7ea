"""OneByN without a runner: networks, and the pruner's life on them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from prune_mm.analysis.complexity import layer_positions
from prune_mm.graph import trace
from prune_mm.pruners import OneByN
from prune_mm.structures import Plan
from prune_mm.structures.plan import count_macs

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

#: Backbones whose numbers are published.
NETWORKS = {
    "v1": {"type": "prune_mm.MobileNetV1"},
    "v2": {"type": "MobileNetV2"},
    "v3_small": {"type": "MobileNetV3", "arch": "small"},
    "v3_large": {"type": "MobileNetV3", "arch": "large"},
    "r50": {"type": "ResNet", "depth": 50},
}


def randomise(module):
    """Norms that do something, and weights without ties."""
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            for tensor, low, high in (
                (child.weight, 0.5, 1.5), (child.bias, -0.3, 0.5), (child.running_mean, -0.3, 0.3),
                (child.running_var, 0.5, 1.5),
            ):  # fmt: skip
                nn.init.uniform_(tensor, low, high)
    module.train(False)
    return module


def build(config):
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return randomise(MODELS.build(config))


def shapes_of(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def prepared(module, pruner, graph=None, image=IMAGE):
    graph = graph or trace(module, image[:1], grouping=pruner.regroups)
    pruner.prepare(module, graph, shapes_of(module), layer_positions(module, image[:1]))
    return pruner


def started(module, pruner):
    pruner.commit(module, pruner.start(module), 0)
    pruner.started.fill_(True)
    return pruner


def tensors(output):
    return output if isinstance(output, (tuple, list)) else (output,)


def begun(module, image=IMAGE, **options):
    """Dense, masked and compact network, and the pruner; the law is checked on the way."""
    dense = copy.deepcopy(module)
    pruner = started(module, prepared(module, OneByN(**options), image=image))
    plan = Plan("", (tuple(pruner.structures()),))
    assert Plan.from_json(plan.to_json()) == plan
    small = plan.compact(copy.deepcopy(module))
    # The dense network and the plan give the same, and take the small weights as they are.
    again = plan.compact(copy.deepcopy(dense))
    if pruner.criterion != "weight":
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, small.state_dict()[name]), name
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        outputs = [tensors(network(image)) for network in (module, small, again)]
        for expected, found, rebuilt in zip(*outputs, strict=True):
            assert torch.equal(found, rebuilt)
            assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
    # What is said about the compact form is true of it.
    numbers = plan.shapes(shapes_of(dense))
    assert sum(map(math.prod, numbers.values())) == sum(p.numel() for p in small.parameters())
    positions = layer_positions(dense, image[:1])
    status, macs = pruner.status(), [count_macs(s, positions) for s in (numbers, shapes_of(dense))]
    assert status["macs"] == pytest.approx(macs[0] / macs[1])
    assert status["params"] == pytest.approx(
        sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters())
    )
    return dense, module, small, pruner


def zeros(pruner):
    return sum(int((~mask).sum()) for _, mask in pruner.masks.items())


def rearranged(pruner):
    return {layer.name for layer in pruner.layers} & set(pruner._orders)


def names(pruner):
    return [layer.name for layer in pruner.layers]


class Net(nn.Module):
    """Residual adds, a depthwise convolution, a gate, k x k kernels, and a classifier."""

    def __init__(self, width=16, hidden=22, classes=7):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.expand = nn.Conv2d(width, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden, width, 1)
        self.wide = nn.Conv2d(width, hidden, 3, padding=1)
        self.squeeze, self.gate = nn.Conv2d(hidden, 6, 1), nn.Conv2d(6, hidden, 1)
        self.down = nn.Conv2d(hidden, width, (1, 3), stride=2, padding=(0, 1))
        self.last = nn.Conv2d(width, 18, 1)
        self.fc = nn.Linear(18, classes)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.depthwise(self.norm(self.expand(x)).relu()).relu()
        x = x + self.project(y)
        y = self.wide(x).relu()
        y = y * self.gate(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.fc(self.last(self.down(y).relu()).relu().mean((2, 3)))


SMALL = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
POINTWISE = ["expand", "project", "squeeze", "gate", "last", "fc"]


def net(**options):
    torch.manual_seed(0)
    return randomise(Net(**options))
