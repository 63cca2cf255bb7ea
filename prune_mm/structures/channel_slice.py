"""Structures that remove channels: a whole group, or the rows of a shortcut projection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prune_mm.structures.base import Structure, index_list, number, register_structure, text
from prune_mm.structures.rewrite import check_cut, scatter_behind
from prune_mm.structures.slots import MASKED_ROLES, Slot, along_axis, get_tensor

#: Wider groups are taken for damage: a plan must not make its reader allocate without bound.
MAX_CHANNELS = 1 << 24


@register_structure
@dataclass(frozen=True)
class ChannelSlice(Structure):
    """The channels of one group that stay.

    Masked: every slot of a dead channel is zero (rows, affine parameters and the columns that read it).
    Compact: the slots are cut, so the layers are narrower; see also :attr:`stays`.

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
        return cls(name, _indices(mask), mask.numel(), tuple(slots))

    @property
    def mask(self) -> Tensor:
        """Boolean vector over the channels."""
        mask = torch.zeros(self.channels, dtype=torch.bool)
        mask[list(self.keep)] = True
        return mask

    @cached_property
    def stays(self) -> Tensor:
        """Boolean vector over the channels that the compact form holds.

        A group may have several producers side by side (a gate over a concatenation ties them). When all channels of
        one are dead, one of them stays as zeros, since no layer can have no channel.
        """
        stays = self.mask
        for slot in self.slots:
            if not bool(slot.kept(stays).any()):
                stays[slot.channels[0]] = True
        return stays

    def cuts(self) -> list[tuple[str, int, Tensor]]:
        """For each slot the boolean vector over its axis of what stays."""
        return [(slot.tensor, slot.axis, slot.kept(self.stays)) for slot in self.slots]

    def prepare(self, module: nn.Module) -> None:
        """Zero dead channels that stay."""
        if int(self.stays.sum()) > len(self.keep):
            self.apply_mask(module)

    def apply_mask(self, module: nn.Module) -> None:
        """Zero the slots of dead channels in place.

        Raises:
            ValueError: naming the tensor, when ``module`` is not the network the structure was made for.
        """
        mask = self.mask
        cuts = [(slot, slot.kept(mask)) for slot in self.slots]
        for slot, kept in cuts:
            check_cut(module, slot.tensor, {slot.axis: kept})
        for slot, kept in cuts:
            if slot.role in MASKED_ROLES:
                tensor = get_tensor(module, slot.tensor)
                tensor.data.mul_(along_axis(kept.to(tensor), slot.axis, tensor.ndim))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "type": self.kind,
            "name": self.name,
            "channels": self.channels,
            "keep": list(self.keep),
            "slots": [slot_to_dict(slot, self.channels) for slot in self.slots],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ChannelSlice:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        what = f"{cls.kind} '{text(data['name'], f'{cls.kind}: name')[:80]}'"
        channels = number(data["channels"], 1, MAX_CHANNELS, f"{what}: channels")
        keep = index_list(data["keep"], channels, f"{what}: keep")
        if not keep:
            raise ValueError(f"{what}: keep is empty, at least one channel must stay")
        if not isinstance(data["slots"], list):
            raise ValueError(f"{what}: slots must be a list")
        return cls(data["name"], keep, channels, tuple(slot_from_dict(s, channels, what) for s in data["slots"]))


@register_structure
@dataclass(frozen=True)
class ShortcutSlice(ChannelSlice):
    """Rows of a shortcut projection that stay; the residual sum keeps its width.

    Masked: the rows, bias and affine parameters of dead rows are zero.
    Compact: a narrow projection and norm whose output is scattered into zeros of the full width. When the group of
    the sum is cut in the same stage, the full width is what is left of the sum.

    Attributes:
        end: module behind which the width is restored.
        sum_keep: channels of the residual sum that the rest of the stage leaves, None for all.
        blank: whether no row is alive, so that the one that stays must be zero.
    """

    kind: ClassVar[str] = "ShortcutSlice"
    end: str = ""
    sum_keep: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    blank: bool = field(default=False, compare=False, repr=False)

    @classmethod
    def from_shortcut(cls, name: str, mask: Tensor, slots: Iterable[Slot], end: str) -> ShortcutSlice:
        """From a boolean vector over the rows."""
        return cls(name, _indices(mask), mask.numel(), tuple(slots), end)

    def within(
        self, cuts: dict[tuple[str, int], Tensor], orders: dict[tuple[str, int], Tensor] | None = None
    ) -> ShortcutSlice:
        """Rows whose channel leaves the sum go as well; when no row is left, one stays and is zero."""
        row = self.slots[0]
        alive = cuts.get((row.tensor, row.axis))
        if alive is None or alive.numel() != self.channels:
            return self
        both = self.mask & alive
        keep = both if bool(both.any()) else torch.arange(self.channels) == int(torch.nonzero(alive)[0])
        return replace(self, keep=_indices(keep), sum_keep=_indices(alive), blank=not bool(both.any()))

    def claims(self) -> list[str]:
        """One shortcut is scattered behind a module."""
        return [f"{self.end} (output)"]

    def check(self, module: nn.Module) -> None:
        """See :meth:`Structure.check`."""
        if not self.keep:
            raise ValueError(f"no row of shortcut '{self.name}' would stay")
        try:
            end = module.get_submodule(self.end)
        except AttributeError as error:
            raise ValueError(f"the network has no module '{self.end}' (end of shortcut '{self.name}')") from error
        if next(end.parameters(), None) is None:
            raise ValueError(f"'{self.end}' (end of shortcut '{self.name}') has no parameters")
        if hasattr(end, "scatter_index"):
            raise ValueError(f"the output of '{self.end}' is already scattered")

    def prepare(self, module: nn.Module) -> None:
        """See :meth:`Structure.prepare`."""
        for slot in self.slots if self.blank else ():
            if slot.role in MASKED_ROLES:
                get_tensor(module, slot.tensor).data.zero_()

    def rewrite(self, module: nn.Module) -> None:
        """Restore the width behind ``end``."""
        width = range(self.channels) if self.sum_keep is None else self.sum_keep
        if len(self.keep) < len(width):
            place = {channel: position for position, channel in enumerate(width)}
            scatter_behind(module, self.end, torch.tensor([place[c] for c in self.keep]), len(width))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return super().to_dict() | {"end": self.end}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShortcutSlice:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        base = ChannelSlice.from_dict(data)
        if not base.slots:
            raise ValueError(f"{cls.kind} '{base.name}': slots is empty")
        return cls(base.name, base.keep, base.channels, base.slots, text(data["end"], f"{cls.kind} '{base.name}': end"))


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(torch.nonzero(mask.cpu()).flatten().tolist())


def slot_to_dict(slot: Slot, channels: int) -> dict[str, Any]:
    """A slot of a group of ``channels`` as plain data."""
    data: dict[str, Any] = {"tensor": slot.tensor, "axis": slot.axis, "role": slot.role}
    if slot.channels != tuple(range(channels)):
        data["channels"] = list(slot.channels)
    return data


def slot_from_dict(data: Any, channels: int, what: str) -> Slot:
    """Read a slot of ``what``, a group of ``channels``.

    Raises:
        ValueError: naming what is wrong with it.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{what}: a slot must be a table, got {type(data).__name__}")
    tensor = text(data["tensor"], f"{what}: tensor of a slot")
    what = f"{what}: slot of '{tensor[:80]}'"
    axis, role = number(data["axis"], 0, 7, f"{what}: axis"), data["role"]
    if not isinstance(role, str) or role not in MASKED_ROLES | {"mean", "var"}:
        raise ValueError(f"{what}: unknown role {role!r:.80}")
    listed = data.get("channels")
    if listed is None:
        return Slot(tensor, axis, tuple(range(channels)), role)  # type: ignore[arg-type]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{what}: channels must be a list")
    own = tuple(number(c, -1, channels - 1, f"{what}: channels") for c in listed)
    return Slot(tensor, axis, own, role)  # type: ignore[arg-type]
