"""Folding: channel orders that let grouped convolutions do without gathers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prune_mm.graph.groups import ChannelGroup
from prune_mm.structures.base import Structure
from prune_mm.structures.channel_order import ChannelOrder, axis_order
from prune_mm.structures.grouped_conv import GroupedConv, block_sequence
from prune_mm.structures.plan import resolve
from prune_mm.structures.slots import Slot

#: The order of one group depends on its neighbours'; the second pass gains a little, the third next to nothing.
PASSES = 3


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
        improved = [layout.improve(group) for group in groups]
        if not any(improved):
            break
    chosen = [(group, layout.chosen[group.name]) for group in groups if group.name in layout.chosen]
    return [*(ChannelOrder(group.name, tuple(order.tolist()), group.slots) for group, order in chosen), *convs]


def count_gathers(stage: Sequence[Structure]) -> int:
    """How many gathers the compact form of a stage needs."""
    return sum(structure.gathers() for structure in resolve(stage) if isinstance(structure, GroupedConv))


#: In which order the blocks of one side lie; None where their channels are mixed.
Lying = tuple[int, ...] | None


@dataclass(frozen=True)
class _Side:
    """One side of a grouped convolution along which channels of a group lie.

    Attributes:
        slot: where they lie; axis 0 are its outputs, axis 1 its inputs.
        places: the channel at each index.
        blocks: the block of each channel, when every channel lies there once and nothing else, else None.
    """

    slot: Slot
    places: np.ndarray
    blocks: np.ndarray | None


class _Layout:
    """The present orders of channel groups, improved group by group."""

    def __init__(self, convs: Sequence[GroupedConv]) -> None:
        self.convs = {conv.weight: conv for conv in convs}
        self.chosen: dict[str, np.ndarray] = {}
        # Per weight and axis: the block at each index, and how blocks and indices are ordered at present.
        self._blocks = {name: conv.blocks() for name, conv in self.convs.items()}
        self._lying = {name: conv.sequences() for name, conv in self.convs.items()}
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    def improve(self, group: ChannelGroup) -> bool:
        """Give ``group`` a better order; False when none is found."""
        sides = [self._side(slot, group.channels) for slot in group.slots if slot.tensor in self.convs]
        best, least = None, _cost({side.slot.tensor: self._lying[side.slot.tensor] for side in sides})
        for order in self._candidates(group, [side for side in sides if side.blocks is not None]):
            if least == (0, 0):
                break
            lying = self._would_lie(sides, order)
            cost = _cost(lying)
            if cost < least:
                best, least = (order, lying), cost
        if best is None:
            return False
        self.chosen[group.name], lying = best
        self._lying |= lying
        self._orders |= {(side.slot.tensor, side.slot.axis): self._moved(side, best[0]) for side in sides}
        return True

    def _side(self, slot: Slot, channels: int) -> _Side:
        places, blocks = np.array(slot.channels), self._blocks[slot.tensor][slot.axis]
        # A convolution that had groups before reads every channel in several places.
        if blocks.size != channels or not np.array_equal(np.sort(places), np.arange(channels)):
            return _Side(slot, places, None)
        return _Side(slot, places, blocks[np.argsort(places)])

    def _would_lie(self, sides: list[_Side], order: np.ndarray) -> dict[str, tuple[Lying, Lying]]:
        """The orders of blocks around a group with its channels in another order."""
        lying = {side.slot.tensor: list(self._lying[side.slot.tensor]) for side in sides}
        for side in sides:
            weight, axis = side.slot.tensor, side.slot.axis
            if side.blocks is not None:
                blocks = side.blocks[order[side.places]]
            else:
                # Along its second axis a weight has the inputs of one of its groups; the others are ordered alike.
                blocks = self._blocks[weight][axis].reshape(-1, side.places.size)[:, self._moved(side, order)].ravel()
            lying[weight][axis] = block_sequence(blocks, self.convs[weight].groups)
        return {name: (pair[0], pair[1]) for name, pair in lying.items()}

    def _moved(self, side: _Side, order: np.ndarray) -> np.ndarray:
        """Which index comes to each; those of other groups stay as they are."""
        before = self._orders.get((side.slot.tensor, side.slot.axis), np.arange(side.places.size))
        return np.where(side.places >= 0, axis_order(side.slot, order).numpy(), before)

    def _candidates(self, group: ChannelGroup, sides: list[_Side]) -> Iterator[np.ndarray]:
        """Orders that suit one side for certain, and the others where they can."""
        keys = [self._rank(side)[side.blocks] for side in sides]
        for first in range(len(sides)):
            # The last key counts most: inside the blocks of one side, blocks of the others stay together.
            yield np.lexsort([*(keys[i] for i in reversed(range(len(sides))) if i != first), keys[first]])

    def _rank(self, side: _Side) -> np.ndarray:
        """Where each block of a side should lie: as on the other side, or as decided.

        Layers that share an order number their blocks alike, however many they have.
        """
        sequence = self._lying[side.slot.tensor][1 - side.slot.axis]
        if sequence is None:
            sequence = np.arange(self.convs[side.slot.tensor].groups)
        rank = np.empty(len(sequence), dtype=np.int64)
        rank[np.array(sequence)] = np.arange(len(sequence))
        return rank


def _cost(lying: dict[str, tuple[Lying, Lying]]) -> tuple[int, int]:
    """Gathers of some convolutions, and their sides whose blocks are mixed."""
    mixed = sum(sequence is None for pair in lying.values() for sequence in pair)
    turned = sum(None not in pair and pair[0] != pair[1] for pair in lying.values())
    return mixed + turned, mixed
