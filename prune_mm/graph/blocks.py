"""Which convolutions and linear layers can be made block-sparse: tried on a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prune_mm.graph.groups import ChannelGraph
from prune_mm.graph.verify import Checker, rejected
from prune_mm.structures.block_sparse import BlockSparse


@dataclass(frozen=True)
class BlockLayer:
    """A convolution with one group, or a linear layer.

    Attributes:
        name: dotted name relative to the traced module.
        shape: of its weight.
        stem: whether it reads the input of the traced module.
        trains: whether its weight gets gradients.
    """

    name: str
    shape: tuple[int, ...]
    stem: bool
    trains: bool

    @property
    def is_pointwise(self) -> bool:
        """Whether its kernels are single weights."""
        return math.prod(self.shape[2:]) == 1


def find_block_layers(
    module: nn.Module, inputs: tuple, graph: ChannelGraph, seed: int = 0
) -> tuple[list[BlockLayer], dict[str, str]]:
    """Layers that can be made block-sparse, in order of execution, and why others cannot.

    Args:
        module: the traced module; it is not changed.
        inputs: positional arguments of one call.
        graph: its verified graph.
        seed: of the random decisions that are tried.
    """
    stems = {group.name for group in graph.groups if group.stem}
    modules = dict(module.named_modules(remove_duplicate=False))
    uses: dict[int, int] = {}
    for child in set(modules.values()):
        for parameter in child.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    layers, reasons = [], {}
    for weight, shape in graph.weights.items():
        name = weight.removesuffix(".weight")
        layer = modules.get(name)
        if weight != f"{name}.weight" or not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        found = BlockLayer(name, tuple(shape), name in stems, layer.weight.requires_grad)
        try:
            _random_blocks(found, torch.Generator().manual_seed(0)).check(module)
        except ValueError as error:
            grouped = getattr(layer, "groups", 1) > 1
            reasons[name] = f"it has {layer.groups} groups" if grouped else str(error)
            continue
        if uses[id(layer.weight)] > 1:
            reasons[name] = "it shares its weight with another layer"
        else:
            layers.append(found)
    checker = _BlockChecker(module, inputs, seed)
    failed: dict[str, str] = {}
    if checker.failure(layers) is not None:
        baseline = checker.failure([])
        if baseline is not None:
            return [], reasons | {layer.name: f"no blocks can be checked: {baseline}" for layer in layers}
        failed = {layer.name: failure for layer, failure in rejected(checker, [], layers)}
    reasons |= {name: f"its code does more than a plain layer ({failure})" for name, failure in failed.items()}
    passed = [layer for layer in layers if layer.name not in failed]
    unseen = {name: reason for name, reason in graph.unprunable.items() if name not in {layer.name for layer in passed}}
    return passed, unseen | reasons


def _random_blocks(layer: BlockLayer, generator: torch.Generator) -> BlockSparse:
    outputs, inputs = layer.shape[:2]
    kept = torch.rand(-(-outputs // 2), inputs, generator=generator) < 0.7
    return BlockSparse.from_kept(layer.name, 2, outputs, kept)


class _BlockChecker(Checker):
    """Checks layers that are made block-sparse at random."""

    def failure(self, items: Sequence[BlockLayer]) -> str | None:
        """None when masked and compact agree, else what went wrong."""
        pieces = [_random_blocks(item, self.generator) for item in items]
        return self.compare(pieces, {f"{item.name}.weight" for item in items})
