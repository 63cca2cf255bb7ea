"""A structure that re-arranges the channels of a group, everywhere they lie: the same network, in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from prune_mm.structures.base import Structure, number, permutation, register_structure, text
from prune_mm.structures.channel_slice import MAX_CHANNELS, slot_from_dict, slot_to_dict
from prune_mm.structures.rewrite import check_cut
from prune_mm.structures.slots import Slot


@register_structure
@dataclass(frozen=True)
class ChannelOrder(Structure):
    """Another order of the channels of one group.

    Masked: nothing changes. Compact: rows, norms and the columns that read them are permuted together, so the network
    computes what it did. Other structures of the stage, whose decisions name the channels as they were, fold their
    own permutations into the new order.

    Attributes:
        name: name of the channel group.
        order: for each new position the channel that comes to it.
        slots: every place the channels lie in.
    """

    kind: ClassVar[str] = "ChannelOrder"
    name: str
    order: tuple[int, ...]
    slots: tuple[Slot, ...]

    def apply_mask(self, module: nn.Module) -> None:
        """Nothing to mask."""

    def cuts(self) -> list[tuple[str, int, Tensor]]:
        """Nothing to cut."""
        return []

    def orders(self) -> list[tuple[str, int, Tensor]]:
        """For each slot the order of its axis."""
        return [(slot.tensor, slot.axis, axis_order(slot, self.order)) for slot in self.slots]

    def check(self, module: nn.Module) -> None:
        """See :meth:`Structure.check`."""
        for slot in self.slots:
            check_cut(module, slot.tensor, {slot.axis: torch.ones(len(slot.channels), dtype=torch.bool)})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        slots = [slot_to_dict(slot, len(self.order)) for slot in self.slots]
        return {"type": self.kind, "name": self.name, "order": list(self.order), "slots": slots}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ChannelOrder:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        what = f"{cls.kind} '{text(data['name'], f'{cls.kind}: name')[:80]}'"
        if not isinstance(data["order"], list) or not isinstance(data["slots"], list):
            raise ValueError(f"{what}: order and slots must be lists")
        channels = number(len(data["order"]), 1, MAX_CHANNELS, f"{what}: length of order")
        order = permutation(data["order"], f"{what}: order")
        slots = tuple(slot_from_dict(slot, channels, what) for slot in data["slots"])
        for slot in slots:
            try:
                axis_order(slot, order)
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from error
        return cls(data["name"], order, slots)


def axis_order(slot: Slot, order: Sequence[int]) -> Tensor:
    """How the axis of a slot is re-arranged when the channels of its group are.

    A channel may lie at several indices (the same offset in every group of a grouped convolution): the first of them
    takes what was at the first index of the channel that comes, and so on. Indices of other groups stay.

    Returns:
        ``(n,)`` int64: entry p of the new axis is entry ``result[p]`` of the old one.

    Raises:
        ValueError: when channels lie at different numbers of indices.
    """
    own = np.array(slot.channels, dtype=np.int64)
    result = np.arange(own.size)
    places = np.flatnonzero(own >= 0)
    by_channel = places[np.argsort(own[places], kind="stable")]
    channels, counts = np.unique(own[by_channel], return_counts=True)
    arriving = np.array(order, dtype=np.int64)[channels]
    # The group may have channels that do not lie here (producers side by side): those here stay among themselves.
    if (counts.size and (counts != counts[0]).any()) or not np.array_equal(np.sort(arriving), channels):
        raise ValueError(f"'{slot.tensor}' does not hold all channels of the group alike")
    copies = int(counts[0]) if counts.size else 0
    result[by_channel] = by_channel.reshape(-1, copies)[np.searchsorted(channels, arriving)].ravel() if copies else []
    return torch.from_numpy(result)
