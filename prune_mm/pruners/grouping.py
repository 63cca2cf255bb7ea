"""What pruners that divide convolutions into groups have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune_mm.graph import ChannelGraph, ChannelGroup, ConvLayer, fold
from prune_mm.pruners.base import Decision, Pruner, TensorBank
from prune_mm.pruners.options import check_flag, check_integer, check_matches, check_patterns
from prune_mm.structures import GroupedConv, Structure
from prune_mm.structures.plan import count_macs
from prune_mm.structures.slots import get_tensor

#: What budgets of groups can count; ``weights`` are the weights of the convolutions that can be divided.
TARGETS = ("macs", "params", "weights")


class GroupPruner(Pruner):
    """A pruner whose decisions are two permutations and a number of groups per convolution.

    State, in buffers: ``perms`` (per layer ``out:<layer>`` and ``in:<layer>``, channels in the order of the blocks),
    ``groups`` (per layer, into how many groups each of its groups is divided), ``masked`` (whether kernels between
    groups are zero).

    Args:
        share_orders: give the inputs of a layer the order of the outputs it reads, where no residual add or
            concatenation lies between: no gather is left there, and the layers of a block that have equally many
            groups see each other's groups only. Faster, at a price in kept norm; not part of the published methods.
        ignore: regular expressions of layer names that stay dense.
        include_frozen: also divide layers whose weights do not train (frozen stages of a detector), which can not
            recover from it.
        seed: seed of every random choice.

    Raises:
        ValueError: naming the argument and what would be right.
    """

    regroups = True

    def __init__(
        self,
        share_orders: bool = False,
        ignore: Sequence[str] = (),
        include_frozen: bool = False,
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__()
        check_flag("share_orders", share_orders)
        check_patterns("ignore", ignore)
        check_flag("include_frozen", include_frozen)
        check_integer("seed", seed, 0)
        self.share_orders, self.ignore = share_orders, tuple(ignore)
        self.include_frozen, self.seed = include_frozen, seed
        self.perms = TensorBank()
        self.layers: list[ConvLayer] = []
        self.left_dense: dict[str, str] = {}
        self._orderable: list[ChannelGroup] = []
        self._masks: dict[str, Tensor] = {}

    def prepare(
        self, module: nn.Module, graph: ChannelGraph, shapes: dict[str, tuple[int, ...]], positions: dict[str, int]
    ) -> None:
        """Select layers, and register a dense decision."""
        self.layers, self.left_dense = select_layers(graph, self.ignore, self.include_frozen)
        self._orderable = graph.orderable
        self._makers = makers_of_inputs(self._orderable, self.layers) if self.share_orders else {}
        self.cost = GroupCost(shapes, positions, self.layers)
        for layer in self.layers:
            self.perms.put(f"out:{layer.name}", torch.arange(layer.outputs))
            self.perms.put(f"in:{layer.name}", torch.arange(layer.inputs))
        self.register_buffer("groups", torch.ones(len(self.layers), dtype=torch.int64))
        self.register_buffer("masked", torch.tensor(False))

    # -- decisions --------------------------------------------------------------------------------------------

    def take_over(self, decision: Decision) -> None:
        """Store permutations and groups of a decision."""
        for name, _ in self.perms.items():
            self.perms.put(name, decision[name].to(self.perms[name].device))
        self.groups.copy_(decision["groups"])
        self._forget()

    def convs(self) -> list[GroupedConv]:
        """The present decision, a structure per layer that is divided."""
        return [
            GroupedConv.from_perms(
                layer.name,
                layer.base * groups,
                self.perms[f"out:{layer.name}"].cpu(),
                self.perms[f"in:{layer.name}"].cpu(),
                layer.base,
            )
            for layer, groups in zip(self.layers, self.groups.tolist())
            if groups > 1
        ]

    def structures(self) -> list[Structure]:
        """The present decision with its permutations folded into neighbouring layers."""
        return fold(self.convs(), self._orderable)

    def weight(self, module: nn.Module, layer: ConvLayer) -> Tensor:
        """Weight of a layer, ``(outputs, inputs / base, ...)``."""
        return get_tensor(module, f"{layer.name}.weight")

    # -- masks ------------------------------------------------------------------------------------------------

    def after_step(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Mask again what the optimizer moved."""
        self.mask(module)

    @torch.no_grad()
    def mask(self, module: nn.Module) -> None:
        """Zero the kernels between groups, once the decision is final."""
        if not bool(self.masked):
            return
        device = next(module.parameters()).device
        if not self._masks or next(iter(self._masks.values())).device != device:
            self._masks = {conv.weight: conv.mask().to(device) for conv in self.convs()}
        for name, mask in self._masks.items():
            weight = get_tensor(module, name)
            weight.mul_(mask.view(*mask.shape, *[1] * (weight.ndim - 2)))

    def _forget(self) -> None:
        self._masks = {}

    def status(self) -> dict[str, float]:
        """Shares of MACs and parameters of the scope that the present groups leave."""
        groups = self.groups.tolist()
        return {kind: self.cost.of(kind, groups) / max(self.cost.dense(kind), 1) for kind in ("macs", "params")}


def select_layers(
    graph: ChannelGraph, ignore: Sequence[str] = (), include_frozen: bool = False
) -> tuple[list[ConvLayer], dict[str, str]]:
    """Convolutions that may be divided into groups, in order of execution, and why others stay dense.

    Args:
        graph: the scope, traced with ``grouping=True``.
        ignore: regular expressions; a layer whose name one of them matches (from its start) is left out.
        include_frozen: include layers whose weights do not train.

    Raises:
        ValueError: when an expression matches nothing, or when nothing is left, with the reasons.
    """
    assert graph.convs is not None, "trace with grouping=True"
    names = [*graph.not_groupable, *(conv.name for conv in graph.convs)]
    check_matches("ignore", ignore, names, "convolution")
    layers, reasons = [], dict(graph.not_groupable)
    for conv in graph.convs:
        if conv.stem:
            reasons[conv.name] = "reads the input of the scope"
        elif any(re.match(pattern, conv.name) for pattern in ignore):
            reasons[conv.name] = "ignored"
        elif not conv.trains and not include_frozen:
            reasons[conv.name] = "its weight does not train (include_frozen=True would divide it)"
        else:
            layers.append(conv)
    if not layers:
        found = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:8])
        raise ValueError(f"no convolution can be divided into groups: {found or 'there is none'}")
    return layers, reasons


def makers_of_inputs(groups: Sequence[ChannelGroup], layers: Sequence[ConvLayer]) -> dict[str, str]:
    """For layers whose inputs are the outputs of one other layer, in the same order, the name of that.

    Args:
        groups: channel groups whose channels may be in any order.
        layers: the layers in question; those that have groups already are left out.
    """
    plain = {f"{layer.name}.weight": layer.name for layer in layers if layer.base == 1}
    found: dict[str, str] = {}
    for group in groups:
        whole = [slot for slot in group.slots if slot.channels == tuple(range(group.channels))]
        makers = [slot for slot in group.slots if slot.role == "out"]
        if group.coupled or len(makers) != 1 or makers[0] not in whole or makers[0].tensor not in plain:
            continue
        readers = [plain[s.tensor] for s in whole if s.role == "in" and s.axis == 1 and s.tensor in plain]
        found |= dict.fromkeys(readers, plain[makers[0].tensor])
    return found


class GroupCost:
    """Exact MACs, parameters and weights of a scope for any numbers of groups, without building anything.

    Args:
        shapes: shape of every parameter of the scope.
        positions: per conv and linear weight the output positions of one forward of one image.
        layers: the convolutions that groups refer to.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], positions: dict[str, int], layers: Sequence[ConvLayer]
    ) -> None:
        """Count once."""
        numel = {name: math.prod(shape) for name, shape in shapes.items()}
        own = [f"{layer.name}.weight" for layer in layers]
        self._parts = {
            "macs": [numel[name] * positions.get(name, 0) for name in own],
            "params": [numel[name] for name in own],
            "weights": [numel[name] for name in own],
        }
        weights = sum(self._parts["weights"])
        self._dense = {"macs": count_macs(shapes, positions), "params": sum(numel.values()), "weights": weights}

    def dense(self, kind: str) -> int:
        """Cost of the dense scope: ``kind`` is ``macs``, ``params`` or ``weights``."""
        return self._dense[kind]

    def parts(self, kind: str) -> list[int]:
        """Dense cost of each layer."""
        return self._parts[kind]

    def of(self, kind: str, groups: Sequence[int]) -> int:
        """Cost with each layer divided into so many groups."""
        return self._dense[kind] - sum(part - part // g for part, g in zip(self._parts[kind], groups))


def per_base(layer: ConvLayer, scores: Tensor) -> Iterator[Tensor]:
    """Scores ``(outputs, inputs / base)`` of a layer's kernels, one square of rows and columns per group it has."""
    yield from scores.reshape(layer.base, layer.rows, layer.columns)


def joined(perms: Sequence[Tensor]) -> Tensor:
    """Permutations inside each group a layer has, as one of all its channels."""
    return torch.cat([perm + index * perm.numel() for index, perm in enumerate(perms)])


def parts_of(perm: Tensor, base: int) -> list[Tensor]:
    """The reverse of :func:`joined`."""
    return [part - index * part.numel() for index, part in enumerate(perm.chunk(base))]
