"""A structure that removes whole groups of grouped convolutions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prune_mm.structures.base import register_structure, text
from prune_mm.structures.channel_slice import ChannelSlice
from prune_mm.structures.slots import Slot


@register_structure
@dataclass(frozen=True)
class GroupSlice(ChannelSlice):
    """The groups of grouped convolutions that stay, with the layers before and behind them (ResNeXt's cardinality).

    As :class:`ChannelSlice`, where a channel is a whole group: each slot holds the channels of a group one behind the
    other. Compact: the convolutions have fewer groups.

    Attributes:
        convs: names of the convolutions that have a group per channel.
    """

    kind: ClassVar[str] = "GroupSlice"
    convs: tuple[str, ...] = ()

    @classmethod
    def from_groups(cls, name: str, mask: Tensor, slots: Iterable[Slot], convs: Iterable[str]) -> GroupSlice:
        """From a boolean vector over the groups."""
        return cls(name, tuple(torch.nonzero(mask.cpu()).flatten().tolist()), mask.numel(), tuple(slots), tuple(convs))

    def claims(self) -> list[str]:
        """One structure of a stage changes how many groups a convolution has."""
        return [f"{name} (groups)" for name in self.convs]

    def check(self, module: nn.Module) -> None:
        """See :meth:`Structure.check`."""
        for name in self.convs:
            try:
                conv = module.get_submodule(name)
            except AttributeError as error:
                raise ValueError(f"the network has no module '{name}'") from error
            if getattr(conv, "groups", None) != self.channels:
                raise ValueError(f"'{name}' is no convolution of {self.channels} groups, which the plan expects")

    def rewrite(self, module: nn.Module) -> None:
        """Tell the convolutions how many groups are left."""
        for name in self.convs:
            conv = module.get_submodule(name)
            conv.groups = int(self.stays.sum())
            conv.out_channels, conv.in_channels = conv.weight.shape[0], conv.weight.shape[1] * conv.groups

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return super().to_dict() | {"convs": list(self.convs)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GroupSlice:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        base = ChannelSlice.from_dict(data)
        if not isinstance(data["convs"], list):
            raise ValueError(f"{cls.kind} '{base.name[:80]}': convs must be a list")
        convs = tuple(text(name, f"{cls.kind} '{base.name[:80]}': a name in convs") for name in data["convs"])
        return cls(base.name, base.keep, base.channels, base.slots, convs)
