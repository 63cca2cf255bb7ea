"""A ResNet-50 whose weights are a formula: golden numbers without downloads or random generators.

h(n, L)_i = frac(43758.5453 * sin(12.9898 * i + 78.233 * L)) - 0.5 for i = 1..n, in float64.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


def hash_values(count: int, seed: int) -> Tensor:
    """float64 (count,), in [-0.5, 0.5)."""
    wave = 43758.5453 * np.sin(12.9898 * np.arange(1, count + 1) + 78.233 * seed)
    return torch.from_numpy(wave - np.floor(wave) - 0.5)


def hash_conv_weight(shape: tuple[int, ...], number: int) -> Tensor:
    """float32 weight (C, Cin, k, k) of the conv with this number, counted from 1 in module order."""
    weight = hash_values(math.prod(shape), number).reshape(shape)
    weight *= (1.0 + 0.5 * hash_values(shape[0], 1000 + number)).view(-1, 1, 1, 1)
    return (weight * math.sqrt(2.0 / (shape[0] * shape[2] * shape[3]))).float()


def hash_gamma(channels: int, number: int) -> Tensor:
    """float32 scales (channels,) of the norm with this number, counted from 1 in module order."""
    return (0.5 + 0.9 * hash_values(channels, 2000 + number) * (0.5 + 0.5 * math.cos(number))).float()


def fill_hash_weights(model: nn.Module) -> nn.Module:
    """Set the convs and batch norms of a model to the hash weights, in place; the rest is left alone."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for number, conv in enumerate(convs, start=1):
            conv.weight.copy_(hash_conv_weight(tuple(conv.weight.shape), number))
        for number, norm in enumerate(norms, start=1):
            norm.weight.copy_(hash_gamma(norm.num_features, number))
            norm.bias.copy_(0.1 * hash_values(norm.num_features, 3000 + number))
            norm.running_mean.copy_(0.2 * hash_values(norm.num_features, 4000 + number))
            norm.running_var.copy_(1.0 + 0.5 * hash_values(norm.num_features, 5000 + number))
            norm.num_batches_tracked.zero_()
    return model


def hash_resnet50() -> nn.Module:
    """ResNet-50 of torchvision in eval mode with hash weights; the classifier is zero."""
    # The default initialisation costs more than the hash weights that would replace it.
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    model.to_empty(device="cpu")
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    return fill_hash_weights(model).eval()


@lru_cache(maxsize=1)
def chex_layers() -> tuple[dict[str, Any], ...]:
    """The 36 prunable convs of ResNet-50 with their golden numbers, in module order."""
    return tuple(json.loads((DATA / "chex_resnet50.json").read_text())["layers"])


def masked_weight(weights: dict[str, Tensor], masks: dict[str, Tensor], layer: dict[str, Any]) -> Tensor:
    """Weight of a prunable conv under masks (bool (C,) by name): rows, and a 3x3 conv's inputs."""
    weight = weights[layer["name"]] * masks[layer["name"]].view(-1, 1, 1, 1)
    if layer["role"] == "l2":
        weight = weight * masks[layer["name"].replace("conv2", "conv1")].view(1, -1, 1, 1)
    return weight
