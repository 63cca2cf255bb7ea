"""Which convolutions can be divided into groups, and which channel groups can be re-ordered: tried on a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from prune_mm.graph.groups import ChannelGraph, ChannelGroup
from prune_mm.graph.verify import Checker, rejected
from prune_mm.structures.base import Structure
from prune_mm.structures.channel_order import ChannelOrder, axis_order
from prune_mm.structures.grouped_conv import GroupedConv, common_divisors


@dataclass(frozen=True)
class ConvLayer:
    """A convolution that can be divided into groups.

    Attributes:
        name: dotted name relative to the traced module.
        outputs: output channels.
        inputs: input channels.
        base: groups it has already; it is divided inside each of them.
        kernel: elements of one kernel.
        stem: whether it reads the input of the traced module.
        trains: whether its weight gets gradients.
    """

    name: str
    outputs: int
    inputs: int
    base: int
    kernel: int
    stem: bool
    trains: bool

    @property
    def rows(self) -> int:
        """Outputs of each group it has."""
        return self.outputs // self.base

    @property
    def columns(self) -> int:
        """Inputs of each group it has."""
        return self.inputs // self.base

    def choices(self) -> list[int]:
        """Into how many groups each of its groups can be divided, ascending from 1."""
        return common_divisors(self.rows, self.columns)


def check_grouping(module: nn.Module, inputs: tuple, graph: ChannelGraph, seed: int = 0) -> None:
    """Fill :attr:`ChannelGraph.convs`, :attr:`~ChannelGraph.not_groupable` and :attr:`~ChannelGraph.orderable`.

    Convolutions are divided at random and groups re-ordered at random on a copy; what then computes something else
    is left out, with the reason (a layer with a forward of its own, weights read behind the layer's back, a norm
    over groups of channels).

    Args:
        module: the traced module; it is not changed.
        inputs: positional arguments of one call.
        graph: its verified graph.
        seed: of the random decisions.
    """
    convs, reasons = _candidates(module, graph)
    orderable = [group for group in graph.prunable if _lies_alike(group) and not _in_group_norm(module, group)]
    checker = _GroupingChecker(module, inputs, seed)
    failed: dict[str, str] = {}
    unordered: set[str] = set()
    if checker.failure([*convs, *orderable]) is not None:
        baseline = checker.failure([])
        if baseline is not None:
            reasons |= {conv.name: f"no grouping can be checked: {baseline}" for conv in convs}
            convs = orderable = []
        good: list = []
        failed = {conv.name: failure for conv, failure in rejected(checker, good, convs)}
        unordered = {group.name for group, _ in rejected(checker, good, orderable)}
    graph.convs = [conv for conv in convs if conv.name not in failed]
    graph.not_groupable = reasons | {
        name: f"its code does more than a plain convolution ({failure})" for name, failure in failed.items()
    }
    graph.orderable = [group for group in orderable if group.name not in unordered]


def _candidates(module: nn.Module, graph: ChannelGraph) -> tuple[list[ConvLayer], dict[str, str]]:
    """Convolutions by their numbers alone, in order of execution, and why the others are none."""
    # Of tied producers only the first reads the input.
    stems = {group.name for group in graph.groups if group.stem}
    uses: dict[int, int] = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    for child in set(modules.values()):
        for parameter in child.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    traced = {id(modules.get(weight.removesuffix(".weight"))) for weight in graph.weights}
    convs, reasons = [], {}
    for name, conv in module.named_modules():
        if isinstance(conv, nn.modules.conv._ConvNd) and id(conv) not in traced:
            reasons[name] = graph.unprunable.get(name, "its weight is computed on the fly")
    for weight in graph.weights:
        name = weight.removesuffix(".weight")
        conv = modules.get(name)
        if not isinstance(conv, nn.modules.conv._ConvNd) or weight != f"{name}.weight":
            continue
        layer = ConvLayer(
            name,
            conv.out_channels,
            conv.in_channels,
            conv.groups,
            math.prod(conv.weight.shape[2:]),
            name in stems,
            conv.weight.requires_grad,
        )
        if conv.transposed:
            reasons[name] = "a transposed convolution"
        elif uses[id(conv.weight)] > 1:
            reasons[name] = "it shares its weight with another layer"
        elif min(layer.rows, layer.columns) == 1:
            reasons[name] = "depthwise, or one channel"
        elif len(layer.choices()) == 1:
            reasons[name] = f"{layer.rows} outputs and {layer.columns} inputs have no common divisor"
        else:
            convs.append(layer)
    return convs, reasons


def _lies_alike(group: ChannelGroup) -> bool:
    """Whether every place holds all channels of a group (producers side by side hold some each)."""
    try:
        for slot in group.slots:
            axis_order(slot, np.roll(np.arange(group.channels), 1))
    except ValueError:
        return False
    return True


def _in_group_norm(module: nn.Module, group: ChannelGroup) -> bool:
    return any(isinstance(module.get_submodule(slot.module), nn.GroupNorm) for slot in group.slots)


class _GroupingChecker(Checker):
    """Checks convolutions that are divided and channel groups that are re-ordered, both at random."""

    def failure(self, items: Sequence[ConvLayer | ChannelGroup]) -> str | None:
        """None when masked and compact agree, else what went wrong."""
        written = {slot.tensor for item in items if isinstance(item, ChannelGroup) for slot in item.slots}
        for item in items:
            if isinstance(item, ConvLayer):
                written |= {f"{item.name}.weight"}
        return self.compare([self._random_piece(item) for item in items], written)

    def _random_piece(self, item: ConvLayer | ChannelGroup) -> Structure:
        if isinstance(item, ChannelGroup):
            return ChannelOrder(item.name, tuple(self._permutation(item.channels).tolist()), item.slots)
        choices = item.choices()[1:]
        groups = choices[int(torch.randint(len(choices), (1,), generator=self.generator))]
        perms = [
            torch.cat([g * width + self._permutation(width) for g in range(item.base)])
            for width in (item.rows, item.columns)
        ]
        return GroupedConv.from_perms(item.name, groups * item.base, *perms, base=item.base)

    def _permutation(self, length: int) -> torch.Tensor:
        """At random, but never all in their places."""
        order = torch.randperm(length, generator=self.generator)
        return order.roll(1) if bool((order == torch.arange(length)).all()) else order
