"""What a channel pruner decides about: units of channels, and what any choice of counts costs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_mm.graph import ChannelGraph
from prune_mm.pruners.options import check_matches
from prune_mm.structures import ChannelSlice, ShortcutSlice, Slot
from prune_mm.structures.slots import get_tensor


@dataclass(frozen=True)
class Unit:
    """A group of channels, or the rows of a shortcut projection, with the layer that is ranked.

    Attributes:
        name: the layer that makes the channels.
        channels: number of channels.
        slots: every place to mask and to cut.
        end: for a shortcut projection the module behind which the width is restored, else None.
    """

    name: str
    channels: int
    slots: tuple[Slot, ...]
    end: str | None = None

    @property
    def copies(self) -> int:
        """Rows of the layer per channel: more than one in a grouped convolution, whose groups stay equally wide."""
        slot = next(slot for slot in self.slots if slot.role == "out")
        return max(sum(channel >= 0 for channel in slot.channels) // self.channels, 1)

    def structure(self, mask: Tensor) -> ChannelSlice:
        """The decision ``mask`` (boolean, one per channel) as a structure."""
        if self.end is None:
            return ChannelSlice.from_mask(self.name, mask, self.slots)
        return ShortcutSlice.from_shortcut(self.name, mask, self.slots, self.end)

    def rows(self, tensors: dict[str, Tensor] | nn.Module) -> Tensor:
        """Weights that make the channels, ``(channels, elements per channel)``.

        In a grouped convolution the rows at the same offset of every group are one channel. Where several layers
        make the channels, each channel has the rows of the first one; shorter rows are filled with zeros.
        """
        slots = [slot for slot in self.slots if slot.role == "out"]
        return self._collect(
            [(slot, _lookup(tensors, slot.tensor).detach().movedim(slot.axis, 0).flatten(1)) for slot in slots]
        )[0]

    def gamma(self, module: nn.Module, instead: dict[str, Tensor] | None = None) -> Tensor | None:
        """|scale| of the norm behind the layer, ``(channels,)``, or None where a channel has no norm.

        Args:
            module: the scope.
            instead: tensors by name to read rather than the module's.
        """
        slots = [slot for slot in self.slots if slot.role == "scale"]
        source = module if instead is None else instead
        values = [(slot, _lookup(source, slot.tensor).detach().abs().float().reshape(-1, 1)) for slot in slots]
        collected, covered = self._collect(values) if values else (None, False)
        return collected.mean(dim=1) if covered else None

    def per_channel(self, outputs: Tensor) -> Tensor:
        """Figures of the layer's output channels ``(outputs,)`` as figures of the unit's channels (means of copies)."""
        slot = next(slot for slot in self.slots if slot.role == "out")
        return self._collect([(slot, outputs.reshape(-1, 1))])[0].mean(dim=1)

    def _collect(self, parts: list[tuple[Slot, Tensor]]) -> tuple[Tensor, bool]:
        """One row per channel, from the first part that has it, and whether every channel has one."""
        gathered = [(own, rows) for own, rows in (_per_channel(slot, rows) for slot, rows in parts)]
        own, rows = gathered[0]
        if own.numel() == self.channels:
            return rows, True
        width = max(rows.shape[1] for _, rows in gathered)
        result = rows.new_zeros(self.channels, width)
        missing = torch.ones(self.channels, dtype=torch.bool)
        for own, rows in gathered:
            fresh = missing[own]
            result[own[fresh].to(rows.device), : rows.shape[1]] = rows[fresh.to(rows.device)]
            missing[own] = False
        return result, not bool(missing.any())


def _lookup(tensors: dict[str, Tensor] | nn.Module, name: str) -> Tensor:
    return get_tensor(tensors, name) if isinstance(tensors, nn.Module) else tensors[name]


def _per_channel(slot: Slot, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Channels that lie along a slot, ascending, and their rows ``(channels there, copies * d)``."""
    own = torch.tensor(slot.channels)
    order = torch.argsort(own, stable=True)
    order = order[own[order] >= 0]
    channels = torch.unique(own[order])
    return channels, rows[order.to(rows.device)].reshape(channels.numel(), -1)


def select_units(
    graph: ChannelGraph,
    shortcuts: bool = True,
    stem: bool = False,
    coupled: bool = False,
    ignore: Sequence[str] = (),
) -> list[Unit]:
    """Units a channel pruner may decide about, in order of execution.

    Args:
        graph: the traced scope.
        shortcuts: include the rows of shortcut projections.
        stem: include layers that read the input of the scope.
        coupled: include groups that residual adds tie across blocks.
        ignore: regular expressions; a unit whose layer name one of them matches (from its start) is left out.

    Raises:
        ValueError: when an expression matches nothing, or when nothing is left, with the reasons.
    """
    units = [
        Unit(group.name, group.channels, group.slots)
        for group in graph.prunable
        if (stem or not group.stem) and (coupled or not group.coupled)
    ]
    whole = {producer for group in graph.prunable if coupled and group.coupled for producer in group.producers}
    if shortcuts:
        units += [Unit(s.layer, s.channels, s.slots, s.end) for s in graph.shortcuts if s.layer not in whole]
    check_matches("ignore", ignore, (unit.name for unit in units), "prunable layer")
    units = [unit for unit in units if not any(re.match(pattern, unit.name) for pattern in ignore)]
    if not units:
        raise ValueError(f"nothing is prunable: {'; '.join(_left_out(graph, stem, coupled)[:8])}")
    order = {name: index for index, name in enumerate(graph.weights)}
    return sorted(units, key=lambda unit: min(order.get(s.tensor, len(order)) for s in unit.slots if s.role == "out"))


def _left_out(graph: ChannelGraph, stem: bool, coupled: bool) -> list[str]:
    """Why each group was not selected."""
    reasons = graph.why_not()
    for group in graph.prunable:
        if group.stem and not stem:
            reasons.append(f"{group.name}: reads the input of the scope (prune_stem=True would prune it)")
        elif group.coupled and not coupled:
            reasons.append(f"{group.name}: tied by residual adds (prune_coupled=True would prune it)")
        else:
            reasons.append(f"{group.name}: ignored")
    reasons += [f"{layer}: {reason}" for layer, reason in graph.unprunable.items()]
    return reasons or ["no convolution or linear layer was found"]


class CostModel:
    """Exact MACs and parameters of a scope for any kept counts, without building anything.

    Args:
        shapes: shape of every parameter of the scope.
        positions: per conv and linear weight the output positions of one forward of one image.
        units: the units that counts refer to.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], positions: dict[str, int], units: Sequence[Unit]) -> None:
        """Precompute which unit narrows which axis by how much."""
        self.shapes, self.positions, self.units = shapes, positions, list(units)
        self._cuts: dict[str, list[tuple[int, int, int]]] = {}
        for index, unit in enumerate(self.units):
            for slot in unit.slots:
                copies = sum(c >= 0 for c in slot.channels) // unit.channels
                if slot.tensor in shapes and copies:
                    self._cuts.setdefault(slot.tensor, []).append((slot.axis, index, copies))
        full = [unit.channels for unit in self.units]
        self.dense_macs, self.dense_params, self.dense_channels = self.macs(full), self.params(full), sum(full)

    def _shape(self, name: str, counts: Sequence[int]) -> list[int]:
        shape = list(self.shapes[name])
        for axis, index, copies in self._cuts.get(name, ()):
            shape[axis] -= copies * (self.units[index].channels - counts[index])
        return shape

    def _size(self, name: str, counts: Sequence[int]) -> int:
        return math.prod(self._shape(name, counts))

    def macs(self, counts: Sequence[int]) -> int:
        """Multiply-adds of convolutions and linear layers."""
        return sum(self._size(name, counts) * times for name, times in self.positions.items() if name in self.shapes)

    def params(self, counts: Sequence[int]) -> int:
        """Parameters, norms and biases included."""
        return sum(self._size(name, counts) for name in self.shapes)

    def channels(self, counts: Sequence[int]) -> int:
        """Channels that are left."""
        return sum(counts)

    def dense(self, kind: str) -> int:
        """Cost of the dense scope: ``kind`` is ``macs``, ``params`` or ``channels``."""
        return {"macs": self.dense_macs, "params": self.dense_params, "channels": self.dense_channels}[kind]

    def of(self, kind: str, counts: Sequence[int]) -> int:
        """Cost at ``counts``: ``kind`` is ``macs``, ``params`` or ``channels``."""
        return {"macs": self.macs, "params": self.params, "channels": self.channels}[kind](counts)
