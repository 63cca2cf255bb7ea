"""Structures that remove channels: a whole group, or the rows of a shortcut projection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prune_mm.structures.base import Structure, index_list, register_structure
from prune_mm.structures.rewrite import scatter_behind
from prune_mm.structures.slots import MASKED_ROLES, Slot, along_axis, get_tensor


@register_structure
@dataclass(frozen=True)
class ChannelSlice(Structure):
    """The channels of one group that stay.

    Masked: every slot of a dead channel is zero (rows, affine parameters and the columns that read it).
    Compact: the slots are cut, so the layers are narrower.

    Attributes:
        name: name of the channel group.
        keep: channels that stay, ascending.
        channels: number of channels before.
        slots: every place to cut.
    """

    kind: ClassVar[str] = "ChannelSlice"
    name: str
    keep: tuple[int, ...]
    channels: int
    slots: tuple[Slot, ...]

    @classmethod
    def from_mask(cls, name: str, mask: Tensor, slots: Iterable[Slot]) -> ChannelSlice:
        """From a boolean vector over the channels of the group."""
        keep = tuple(torch.nonzero(mask.cpu()).flatten().tolist())
        return cls(name, keep, mask.numel(), tuple(slots))

    @property
    def mask(self) -> Tensor:
        """Boolean vector over the channels."""
        mask = torch.zeros(self.channels, dtype=torch.bool)
        mask[list(self.keep)] = True
        return mask

    def cuts(self) -> list[tuple[str, int, Tensor]]:
        """For each slot the boolean vector over its axis of what stays."""
        mask = self.mask
        return [(slot.tensor, slot.axis, slot.kept(mask)) for slot in self.slots]

    def apply_mask(self, module: nn.Module) -> None:
        """Zero the slots of dead channels in place."""
        mask = self.mask
        for slot in self.slots:
            if slot.role in MASKED_ROLES:
                tensor = get_tensor(module, slot.tensor)
                tensor.data.mul_(along_axis(slot.kept(mask).to(tensor), slot.axis, tensor.ndim))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "type": self.kind,
            "name": self.name,
            "channels": self.channels,
            "keep": list(self.keep),
            "slots": [_slot_to_dict(slot, self.channels) for slot in self.slots],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ChannelSlice:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        channels = int(data["channels"])
        keep = index_list(data["keep"], channels, f"{cls.kind} '{data['name']}': keep")
        if not keep:
            raise ValueError(f"{cls.kind} '{data['name']}': keep is empty, at least one channel must stay")
        return cls(str(data["name"]), keep, channels, tuple(_slot_from_dict(s, channels) for s in data["slots"]))


@register_structure
@dataclass(frozen=True)
class ShortcutSlice(ChannelSlice):
    """Rows of a shortcut projection that stay; the residual sum keeps its width.

    Masked: the rows, bias and affine parameters of dead rows are zero.
    Compact: a narrow projection and norm whose output is scattered into zeros of the full width.

    Attributes:
        end: module behind which the width is restored.
    """

    kind: ClassVar[str] = "ShortcutSlice"
    end: str = ""

    @classmethod
    def from_shortcut(cls, name: str, mask: Tensor, slots: Iterable[Slot], end: str) -> ShortcutSlice:
        """From a boolean vector over the rows."""
        keep = tuple(torch.nonzero(mask.cpu()).flatten().tolist())
        return cls(name, keep, mask.numel(), tuple(slots), end)

    def rewrite(self, module: nn.Module) -> None:
        """Restore the width behind ``end``."""
        if len(self.keep) < self.channels:
            scatter_behind(module, self.end, torch.tensor(self.keep), self.channels)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return super().to_dict() | {"end": self.end}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShortcutSlice:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        base = ChannelSlice.from_dict(data)
        return cls(base.name, base.keep, base.channels, base.slots, str(data["end"]))


def _slot_to_dict(slot: Slot, channels: int) -> dict[str, Any]:
    data: dict[str, Any] = {"tensor": slot.tensor, "axis": slot.axis, "role": slot.role}
    if slot.channels != tuple(range(channels)):
        data["channels"] = list(slot.channels)
    return data


def _slot_from_dict(data: dict[str, Any], channels: int) -> Slot:
    role = str(data["role"])
    if role not in MASKED_ROLES | {"mean", "var"}:
        raise ValueError(f"slot of '{data['tensor']}': unknown role '{role}'")
    listed = data.get("channels")
    if listed is None:
        own = tuple(range(channels))
    else:
        own = tuple(int(c) for c in listed)
        if any(c < -1 or c >= channels for c in own):
            raise ValueError(f"slot of '{data['tensor']}': a channel lies outside -1..{channels - 1}")
    return Slot(str(data["tensor"]), int(data["axis"]), own, role)  # type: ignore[arg-type]
