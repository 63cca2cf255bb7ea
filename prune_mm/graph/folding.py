"""Folding: channel orders that let grouped convolutions do without gathers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prune_mm.graph.groups import ChannelGroup
from prune_mm.structures.base import Structure
from prune_mm.structures.channel_order import ChannelOrder, axis_order
from prune_mm.structures.grouped_conv import GroupedConv
from prune_mm.structures.plan import resolve
from prune_mm.structures.slots import Slot

#: The order of one group depends on its neighbours'; the second pass gains a little, the third next to nothing.
PASSES = 3

Orders = dict[tuple[str, int], Tensor]


def fold(convs: Sequence[GroupedConv], groups: Iterable[ChannelGroup]) -> list[Structure]:
    """Re-order channel groups so that as few gathers as possible remain around ``convs``.

    The channels of a group can be in any order, as long as every layer that makes, scales or reads them is permuted
    alike. A convolution reads (or writes) without a gather when its blocks lie one behind the other. For each group
    the order is chosen that suits most of the convolutions around it. Between two convolutions whose blocks differ,
    one gather is left: there the network shuffles its channels. There are never more gathers than without folding.

    Args:
        convs: decisions of one stage.
        groups: channel groups that may be re-ordered (see :attr:`ChannelGraph.orderable`), in order of execution.

    Returns:
        One :class:`ChannelOrder` per group whose order changes, then ``convs``: a whole stage.
    """
    groups, layout = list(groups), _Layout(convs)
    for _ in range(PASSES):
        if not any([layout.improve(group) for group in groups]):
            break
    chosen = [(group, layout.chosen[group.name]) for group in groups if group.name in layout.chosen]
    return [*(ChannelOrder(group.name, tuple(order.tolist()), group.slots) for group, order in chosen), *convs]


def count_gathers(stage: Sequence[Structure]) -> int:
    """How many gathers the compact form of a stage needs."""
    return sum(structure.gathers() for structure in resolve(stage) if isinstance(structure, GroupedConv))


@dataclass(frozen=True)
class _Side:
    """One side of a grouped convolution: the block of every channel of the group that lies there."""

    conv: GroupedConv
    role: str
    blocks: np.ndarray


class _Layout:
    """The present orders of channel groups, improved group by group."""

    def __init__(self, convs: Sequence[GroupedConv]) -> None:
        self.convs = {conv.weight: conv for conv in convs}
        self.chosen: dict[str, np.ndarray] = {}
        self._orders: Orders = {}

    def improve(self, group: ChannelGroup) -> bool:
        """Give ``group`` a better order; False when none is found."""
        slots = [slot for slot in group.slots if slot.tensor in self.convs]
        names = list(dict.fromkeys(slot.tensor for slot in slots))
        best, least = None, self._cost(names, self._orders)
        for order in self._candidates(group, self._sides(group, slots)):
            orders = self._orders | self._moved(slots, order)
            cost = self._cost(names, orders)
            if cost < least:
                best, least = (order, orders), cost
        if best is not None:
            self.chosen[group.name], self._orders = best
        return best is not None

    def _cost(self, names: list[str], orders: Orders) -> tuple[int, int]:
        """Gathers of some convolutions, and their sides whose blocks are mixed."""
        found = [self.convs[name].within({}, orders) for name in names]
        mixed = sum(sequence is None for conv in found for sequence in conv.sequences())
        return sum(conv.gathers() for conv in found), mixed

    def _moved(self, slots: list[Slot], order: np.ndarray) -> Orders:
        """What a new order of one group changes; indices of other groups on the same axis stay as they are."""
        moved = {}
        for slot in slots:
            own = torch.tensor(slot.channels) >= 0
            before = self._orders.get((slot.tensor, slot.axis), torch.arange(own.numel()))
            moved[slot.tensor, slot.axis] = torch.where(own, axis_order(slot, order), before)
        return moved

    def _sides(self, group: ChannelGroup, slots: list[Slot]) -> list[_Side]:
        """Sides of convolutions along which the channels of ``group`` lie, each once and nothing else."""
        sides = []
        for slot in slots:
            conv = self.convs[slot.tensor]
            if slot.role not in ("out", "in") or (slot.role == "in" and conv.base > 1):
                continue
            channels = np.array(slot.channels)
            if channels.size != group.channels or not np.array_equal(np.sort(channels), np.arange(group.channels)):
                continue
            perm = np.array(conv.out_perm if slot.role == "out" else conv.in_perm)
            blocks = np.empty_like(perm)
            blocks[channels[perm]] = np.arange(perm.size) // (perm.size // conv.groups)
            sides.append(_Side(conv, slot.role, blocks))
        return sides

    def _candidates(self, group: ChannelGroup, sides: list[_Side]) -> Iterator[np.ndarray]:
        """Orders that suit one side for certain, and the others where they can."""
        ranks = [self._rank(side) for side in sides]
        for first in range(len(sides)):
            order = np.arange(group.channels)
            # The last key sorts first: inside the blocks of one side, blocks of the others stay together.
            for index in [*(i for i in reversed(range(len(sides))) if i != first), first]:
                order = order[np.argsort(ranks[index][sides[index].blocks[order]], kind="stable")]
            yield order

    def _rank(self, side: _Side) -> np.ndarray:
        """Where each block of a side should lie: as on the other side, or by its least channel."""
        out_sequence, in_sequence = side.conv.within({}, self._orders).sequences()
        sequence = in_sequence if side.role == "out" else out_sequence
        if sequence is None:
            sequence = np.argsort([int(np.argmax(side.blocks == block)) for block in range(side.conv.groups)])
        rank = np.empty(side.conv.groups, dtype=np.int64)
        rank[np.array(sequence)] = np.arange(side.conv.groups)
        return rank
