"""The counters of the published code, for dense networks whose layers are counted as if they had groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from prune_mm.graph.trace import in_eval_mode

#: Group count of a convolution, by its name in the backbone.
Groups = Callable[[str, nn.Conv2d], int]


@dataclass(frozen=True)
class Counts:
    """What one image costs.

    Attributes:
        params: elements of all parameters.
        conv_params: elements of the convolution weights.
        conv_macs: multiply-adds of the convolutions.
        linear_macs: multiply-adds of the linear layers.
        gumi: "ops" of gumi's counter (its spec, section 8).
        hinge: "FLOPs" of Hinge's counter (its spec, section 8).
        relus: elements that ReLU modules put out; both counters have them included.
    """

    params: int
    conv_params: int
    conv_macs: int
    linear_macs: int
    gumi: int
    hinge: int
    relus: int

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and linear layers."""
        return self.conv_macs + self.linear_macs


def uniform(groups: int) -> Groups:
    """The same group count wherever it divides inputs and outputs."""
    return lambda name, conv: 1 if conv.in_channels % groups or conv.out_channels % groups else groups


def max_channels(limit: int) -> Groups:
    """At most ``limit`` channels a group, wherever that gives whole groups (gumi, section 4)."""

    def groups(name: str, conv: nn.Conv2d) -> int:
        small, large = sorted((conv.in_channels, conv.out_channels))
        return 1 if large % limit or small % (large // limit) else large // limit

    return groups


@cache
def calls(model: nn.Module, size: int) -> list[tuple[str, nn.Module, torch.Size]]:
    """Every module call in the order of execution: name, module, shape of what it returns (if that is a tensor).

    The model is an ``ImageClassifier`` on the meta device, its input one image of ``size`` x ``size`` pixels.
    """
    seen = []

    def watch(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            seen.append((names[module], module, out.shape))

    names = {module: name.removeprefix("backbone.") for name, module in model.named_modules()}
    handles = [module.register_forward_hook(watch) for module in names]
    try:
        with in_eval_mode(model), torch.no_grad():
            model(torch.empty(1, 3, size, size, device="meta"), mode="tensor")
    finally:
        for handle in handles:
            handle.remove()
    return seen


def count(model: nn.Module, size: int, groups: Groups | None = None) -> Counts:
    """Count one image of ``size`` x ``size`` pixels, as if the convolutions had the given groups."""
    total = dict.fromkeys(("conv_params", "conv_macs", "linear_macs", "gumi", "hinge", "relus"), 0)
    saved = 0

    def add(**terms: int) -> None:
        for key, value in terms.items():
            total[key] += value

    for name, layer, shape in calls(model, size):
        elements = shape.numel()
        if isinstance(layer, nn.Conv2d):
            weights, rest = divmod(layer.weight.numel(), groups(name, layer) if groups else 1)
            assert not rest
            saved += layer.weight.numel() - weights
            macs = weights * shape[2] * shape[3]
            bias = 0 if layer.bias is None else elements
            add(conv_params=weights, conv_macs=macs, gumi=2 * macs + bias, hinge=macs)
        elif isinstance(layer, nn.Linear):
            macs = layer.weight.numel()
            add(linear_macs=macs, gumi=2 * macs - layer.out_features, hinge=macs)
        elif isinstance(layer, nn.BatchNorm2d):
            add(gumi=2 * elements, hinge=2 * elements)
        elif isinstance(layer, nn.ReLU):
            add(gumi=elements, hinge=elements, relus=elements)
        elif isinstance(layer, nn.MaxPool2d):
            add(gumi=(layer.kernel_size - 1) * elements)
        elif isinstance(layer, nn.AvgPool2d):
            add(gumi=layer.kernel_size * elements)
    return Counts(params=sum(p.numel() for p in model.parameters()) - saved, **total)
