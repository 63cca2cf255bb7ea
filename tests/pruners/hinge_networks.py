"""Networks for Hinge's tests, and its pruner on them, attached or started."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from prune_mm.analysis.complexity import layer_positions
from prune_mm.graph import trace
from prune_mm.pruners import Hinge
from prune_mm.pruners.hinge_math import group_norms
from prune_mm.registry import MODELS
from prune_mm.structures.plan import compact_stage

BASES = Path(__file__).parents[2] / "configs/_base_/models"
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Whole(nn.Module):
    """A classifier as one scope, so that the inputs of the last linear layer may go (DenseNet's columns)."""

    def __init__(self, model):
        super().__init__()
        self.backbone, self.neck, self.head = model.backbone, model.neck, model.head

    def forward(self, x, mode=None):
        return self.head.fc(self.neck(self.backbone(x))[-1])


@cache
def published(name, whole=False, **options):
    """A published classifier with pairs, and its pruner, which drops constants as the original does; never changed."""
    init_default_scope("mmpretrain")
    config = Config.fromfile(BASES / f"{name}.py").model
    config.type = f"mmpretrain.{config.type}"
    model = MODELS.build(config)
    scope = Whole(model) if whole else model.backbone
    options = {"carry_constants": False, "min_share": 0.01, "target": {"macs": 1.0}, **options}
    return model, scope, attached(scope, torch.randn(1, 3, 32, 32), **options)


def attached(module, image=IMAGE[:1], **options):
    """The pruner of a module, which gets its pairs; nothing is split yet."""
    pruner = Hinge(**{"target": {"macs": 0.5}, "min_share": 0.1, **options})
    graph = trace(module, image)
    stage = pruner.attach(module, graph)
    if stage:
        compact_stage(module, stage)
        graph = trace(module, image)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    pruner.prepare(module, graph, shapes, layer_positions(module, image))
    return pruner


def begun(module, image=IMAGE[:1], epochs=4, iterations=20, **options):
    """The same, started on the weights as they are."""
    pruner = attached(module, image, **options)
    pruner.set_schedule(epochs, iterations)
    pruner.commit(module, pruner.start(module), 0)
    pruner.started.fill_(True)
    return pruner


def watched(pruner, module, optimizer):
    """Let the pruner see the steps of an optimizer, as the engine does."""
    optimizer.register_step_pre_hook(lambda used, *_: pruner.before_step(module, used))
    optimizer.register_step_post_hook(lambda used, *_: pruner.after_step(module, used))
    return optimizer


def close(first, second, tolerance):
    """Assert that the largest difference is small against the largest value."""
    worst = float((first - second).detach().abs().max() / second.detach().abs().max())
    assert worst < tolerance, worst


class Small(nn.Module):
    """A stem, a convolution whose outputs stay inside, and one whose outputs are the network's."""

    def __init__(self, inner=3, width=3):
        super().__init__()
        self.stem = nn.Conv2d(3, inner, 3, padding=1)
        self.a = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x):
        return self.b(self.norm(self.a(self.stem(x).relu())).relu())


class Basic(nn.Module):
    """A stem and basic blocks."""

    def __init__(self, width=8, blocks=2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv1": nn.Conv2d(width, width, 3, padding=1, bias=False),
                    "bn1": nn.BatchNorm2d(width),
                    "conv2": nn.Conv2d(width, width, 3, padding=1, bias=False),
                    "bn2": nn.BatchNorm2d(width),
                }
            )
            for _ in range(blocks)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            y = block["bn1"](block["conv1"](x)).relu()
            x = (x + block["bn2"](block["conv2"](y))).relu()
        return x


def planted(module, pruner, seed=0):
    """Give every group a norm of its own, in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    for unit in pruner.units:
        parts = unit.parts(module)
        wanted = torch.rand(unit.channels, generator=generator, dtype=torch.float64)
        scale = wanted / group_norms(parts)
        for part in parts:
            part.mul_(scale.to(part.dtype).view(-1, *[1] * (part.ndim - 1)))
