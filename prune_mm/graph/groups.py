"""Channel groups: what the shadow execution means, as values one can print and understand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from prune_mm.graph.shadow import TraceRecord
from prune_mm.structures.slots import Slot

#: Operators that scale one operand by the other: a gate (squeeze-and-excitation) is not a residual connection.
_GATES = {"mul", "div"}


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

    def slots_of(self, *roles: str) -> list[Slot]:
        """Slots with one of these roles."""
        return [slot for slot in self.slots if slot.role in roles]

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
        group_norms: group norm modules that need the compact form of :mod:`prune_mm.structures.group_norm`.
        fragile: per group name the operators with sizes its channels pass through.
        weights: every traced weight with its shape.
    """

    groups: list[ChannelGroup]
    shortcuts: list[Shortcut] = field(default_factory=list)
    unprunable: dict[str, str] = field(default_factory=dict)
    group_norms: tuple[str, ...] = ()
    fragile: dict[str, str] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)

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


def build_groups(record: TraceRecord, weights: dict[str, tuple[int, ...]]) -> ChannelGraph:
    """Turn a trace record into groups (union of ids, then of the blocks their producers made)."""
    count = record.next_id
    classes = _components(count, record.edges)
    group_of_class = _link_blocks(record, classes)
    frozen = _reasons(record.frozen, classes, group_of_class)
    reshaped = _reasons(record.reshaped, classes, group_of_class)
    members: dict[int, list[int]] = {}
    for index, block in enumerate(record.blocks):
        if block.layer is not None:
            members.setdefault(int(group_of_class[classes[block.first]]), []).append(index)
    depthwise = {s.tensor for s in record.slots if s.role == "depthwise"}
    groups, fragile = [], {}
    for key, blocks in members.items():
        group = _make_group(record, classes, group_of_class, key, blocks, depthwise)
        if group is None:
            continue
        reason = frozen.get(key)
        if reason is None and group.channels < 2:
            reason = "all its channels depend on each other"
        groups.append(replace(group, frozen=reason))
        if key in reshaped:
            fragile[group.name] = reshaped[key]
    graph = ChannelGraph(groups, _shortcuts(record, depthwise), {}, tuple(record.group_norms), fragile, weights)
    made = {name for g in groups for name in g.producers}
    for slot in record.slots:
        layer = slot.tensor.rpartition(".")[0]
        if slot.role == "out" and layer not in made:
            graph.unprunable[layer] = "its outputs reach no other layer"
    return graph


def _components(count: int, edges: list) -> np.ndarray:
    if not edges:
        return np.arange(count)
    left = torch.cat([e[0].reshape(-1) for e in edges]).numpy()
    right = torch.cat([e[1].reshape(-1) for e in edges]).numpy()
    matrix = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    return connected_components(matrix, directed=False)[1]


def _link_blocks(record: TraceRecord, classes: np.ndarray) -> np.ndarray:
    """Group of every class: classes that one layer makes side by side are in one group."""
    number = int(classes.max()) + 1
    left, right = [], []
    for block in record.blocks:
        if block.layer is not None:
            members = classes[block.first : block.first + block.count]
            left.append(np.full(len(members), members[0]))
            right.append(members)
    if not left:
        return np.arange(number)
    rows, columns = np.concatenate(left), np.concatenate(right)
    matrix = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(number, number))
    return connected_components(matrix, directed=False)[1]


def _reasons(marks: list, classes: np.ndarray, group_of_class: np.ndarray) -> dict[int, str]:
    """First reason recorded for each group."""
    reasons: dict[int, str] = {}
    for ids, reason in marks:
        for key in np.unique(group_of_class[classes[ids.numpy()]]):
            reasons.setdefault(int(key), reason)
    return reasons


def _layer_name(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _make_group(
    record: TraceRecord,
    classes: np.ndarray,
    group_of_class: np.ndarray,
    key: int,
    blocks: list[int],
    depthwise: set,
) -> ChannelGroup | None:
    """Number the classes of one group and translate its raw slots."""
    producers = [i for i in blocks if record.blocks[i].layer not in depthwise]
    if not producers:
        return None
    order: dict[int, int] = {}
    for index in producers:
        block = record.blocks[index]
        for label in classes[block.first : block.first + block.count]:
            order.setdefault(int(label), len(order))
    numbers = np.full(len(group_of_class), -1)
    numbers[list(order)] = list(order.values())
    slots = []
    for raw in record.slots:
        ids = raw.ids.numpy()
        labels = np.where(ids > 0, numbers[classes[ids]], -1)
        if (labels >= 0).any():
            slots.append(Slot(raw.tensor, raw.axis, tuple(labels.tolist()), raw.role))
    ties = _ties_of(record, classes, group_of_class, key)
    first = record.blocks[producers[0]]
    return ChannelGroup(
        name=_layer_name(first.layer),
        channels=len(order),
        slots=tuple(slots),
        producers=tuple(_layer_name(record.blocks[i].layer) for i in producers),
        ties=tuple(f"{name} at {where or 'the top'}" for name, where in ties),
        coupled=len(producers) > 1 and any(name not in _GATES for name, _ in ties),
        stem=first.reads_input,
    )


def _ties_of(record: TraceRecord, classes: np.ndarray, group_of_class: np.ndarray, key: int) -> list[tuple[str, str]]:
    found = []
    for tie in record.ties:
        known = [b for b in tie.blocks if b >= 0]
        keys = {int(group_of_class[classes[record.blocks[b].first]]) for b in known}
        if key in keys:
            found.append((tie.operator, tie.where))
    return found


def _shortcuts(record: TraceRecord, depthwise: set[str]) -> list[Shortcut]:
    """Projections that meet a deeper branch in an add, with nothing else reading them before the add."""
    shapes = {}
    shortcuts = []
    for tie in record.ties:
        if tie.operator != "add" or len(tie.blocks) != 2:
            continue
        for mine, other in ((0, 1), (1, 0)):
            index = tie.blocks[mine]
            block = record.blocks[index] if index >= 0 else None
            if block is None or block.layer is None or block.layer in depthwise or block.layer in shapes:
                continue
            if tie.depths[mine] < tie.depths[other] and tie.zero[mine] and not block.reads_input:
                shapes[block.layer] = True
                shortcut = _make_shortcut(record, index)
                if shortcut is not None:
                    shortcuts.append(shortcut)
    order = {block.layer: i for i, block in enumerate(record.blocks)}
    return sorted(shortcuts, key=lambda s: order[f"{s.layer}.weight"])


def _make_shortcut(record: TraceRecord, index: int) -> Shortcut | None:
    block = record.blocks[index]
    last = block.first + block.count
    slots = []
    for raw in record.slots:
        inside = (raw.ids >= block.first) & (raw.ids < last)
        if not bool(inside.any()):
            continue
        if raw.role not in ("out", "bias", "scale", "shift", "mean", "var") or not bool(inside.all()):
            return None
        slots.append(Slot(raw.tensor, raw.axis, tuple((raw.ids - block.first).tolist()), raw.role))
    owners = list(dict.fromkeys(slot.module for slot in slots))
    identity = tuple(range(block.count))
    if len(owners) > 2 or any(slot.channels != identity for slot in slots):
        return None
    return Shortcut(_layer_name(block.layer), block.count, tuple(slots), owners[-1])
