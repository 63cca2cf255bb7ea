"""Channel groups: what the shadow execution means, as values one can print and understand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from prune_mm.structures.slots import Slot

if TYPE_CHECKING:
    from prune_mm.graph.grouping import ConvLayer


@dataclass(frozen=True)
class Shortcut:
    """A projection in a residual shortcut: its rows can be zero while the sum keeps its width.

    Attributes:
        layer: dotted name of the 1x1 convolution.
        channels: number of output channels.
        slots: slots that belong to the projection alone (its rows, its norm), channels 0..channels-1.
        end: module behind which the full width is restored in the compact form.
    """

    layer: str
    channels: int
    slots: tuple[Slot, ...]
    end: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.layer}: {self.channels} channels, shortcut projection (zero rows, width kept behind {self.end})"


@dataclass(frozen=True)
class ChannelGroup:
    """A set of channels that live or die one by one, each with all its places in the parameters.

    Attributes:
        name: the layer that makes the channels (the first, when several are tied).
        channels: how many independent channels there are.
        slots: every parameter axis along which they lie.
        producers: all layers whose output rows are in the group.
        ties: where producers were tied to each other, in words.
        coupled: whether a residual add (not only a gate) ties several producers.
        stem: whether the first producer reads the input of the network.
        frozen: why the group must stay whole, or None.
    """

    name: str
    channels: int
    slots: tuple[Slot, ...]
    producers: tuple[str, ...]
    ties: tuple[str, ...] = ()
    coupled: bool = False
    stem: bool = False
    frozen: str | None = None

    @property
    def prunable(self) -> bool:
        """Whether channels may be removed at all."""
        return self.frozen is None

    def __str__(self) -> str:
        """A few lines: who makes the channels, what ties them, what would be cut, why not."""
        state = f"FROZEN: {self.frozen}" if self.frozen else ("coupled" if self.coupled else "inner")
        lines = [f"{self.name}: {self.channels} channels, {state}{', stem' if self.stem else ''}"]
        if len(self.producers) > 1:
            lines.append(f"  made by {', '.join(self.producers)}; tied by {', '.join(self.ties) or 'shared use'}")
        lines.extend(f"  {slot.role:9} {slot.tensor}[axis {slot.axis}]" for slot in self.slots)
        return "\n".join(lines)


@dataclass
class ChannelGraph:
    """All channel groups of a module.

    Attributes:
        groups: in order of execution.
        shortcuts: projections in residual shortcuts, in order of execution.
        unprunable: weight layers that are in no group, with the reason.
        fragile: per group name the operators with sizes its channels pass through.
        weights: every traced weight with its shape.
        convs: convolutions that can be divided into groups, in order of execution; None when that was not asked for.
        not_groupable: convolutions that cannot, with the reason.
        orderable: groups whose channels can be in any order.
        inputs: positional arguments the module was traced with.
    """

    groups: list[ChannelGroup]
    shortcuts: list[Shortcut] = field(default_factory=list)
    unprunable: dict[str, str] = field(default_factory=dict)
    fragile: dict[str, str] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    convs: list[ConvLayer] | None = None
    not_groupable: dict[str, str] = field(default_factory=dict)
    orderable: list[ChannelGroup] = field(default_factory=list)
    inputs: tuple = ()

    @property
    def prunable(self) -> list[ChannelGroup]:
        """Groups whose channels may be removed."""
        return [group for group in self.groups if group.prunable]

    def __iter__(self) -> Iterator[ChannelGroup]:
        """Groups in order of execution."""
        return iter(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        """The group that a layer's output channels belong to.

        Raises:
            KeyError: naming the layer, when no group has it as a producer.
        """
        for group in self.groups:
            if name == group.name or name in group.producers:
                return group
        raise KeyError(f"no channel group is made by '{name}'")

    def freeze(self, name: str, reason: str) -> None:
        """Mark a group as frozen."""
        self.groups = [replace(g, frozen=g.frozen or reason) if g.name == name else g for g in self.groups]

    def __str__(self) -> str:
        """Every group, shortcut and left-out layer in words."""
        free = self.prunable
        lines = [
            f"{len(self.groups)} channel groups, {len(free)} prunable ({sum(g.channels for g in free)} channels), "
            f"{len(self.shortcuts)} shortcut projections"
        ]
        lines += [str(group) for group in self.groups] + [str(shortcut) for shortcut in self.shortcuts]
        lines += [f"{layer}: not prunable: {reason}" for layer, reason in self.unprunable.items()]
        return "\n".join(lines)

    def why_not(self) -> list[str]:
        """One line per frozen group, shortest useful form, for error messages."""
        return [f"{g.name}: {g.frozen}" for g in self.groups if g.frozen]
