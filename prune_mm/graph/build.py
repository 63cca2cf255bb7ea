"""From a trace record to channel groups: connected components, numbered and put into words."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from prune_mm.graph.groups import ChannelGraph, ChannelGroup, Shortcut
from prune_mm.graph.record import Tie, TraceRecord
from prune_mm.structures.slots import Slot

#: Operators that scale one operand by the other: a gate (squeeze-and-excitation) is not a residual connection.
_GATES = {"mul", "div"}


@dataclass
class _Classes:
    """Equivalence classes of ids, and the group every class belongs to."""

    of_id: np.ndarray
    group: np.ndarray

    def group_of(self, identity: int) -> int:
        """Group of one id."""
        return int(self.group[self.of_id[identity]])

    def groups_of(self, ids: torch.Tensor) -> list[int]:
        """Groups of the ids in a tensor, 0 left out."""
        present = ids[ids > 0].numpy()
        return np.unique(self.group[self.of_id[present]]).tolist()


def build_groups(record: TraceRecord, weights: dict[str, tuple[int, ...]]) -> ChannelGraph:
    """Turn a trace record into groups (union of ids, then of the blocks their producers made)."""
    classes = _classes(record)
    frozen, reshaped = _reasons(record.frozen, classes), _reasons(record.reshaped, classes)
    depthwise = {s.tensor for s in record.slots if s.role == "depthwise"}
    blocks, slots, ties = _by_group(record, classes, depthwise)
    groups, fragile = [], {}
    for key, members in blocks.items():
        group = _make_group(record, classes, members, slots[key], ties[key])
        reason = frozen.get(key)
        if reason is None and group.channels < 2:
            cause = f" ({reshaped[key]})" if key in reshaped else ""
            reason = f"all its channels depend on each other{cause}" if len(members) > 1 or cause else "one channel"
        groups.append(replace(group, frozen=reason))
        if key in reshaped:
            fragile[group.name] = reshaped[key]
    return ChannelGraph(groups, _shortcuts(record, weights, depthwise), {}, fragile, weights)


def _classes(record: TraceRecord) -> _Classes:
    of_id = _components(record.next_id, [e[0].numpy() for e in record.edges], [e[1].numpy() for e in record.edges])
    left, right = [], []
    for block in record.blocks:
        if block.layer is not None:
            # Classes that one layer makes side by side are in one group.
            members = of_id[block.first : block.first + block.count]
            left.append(np.full(len(members), members[0]))
            right.append(members)
    return _Classes(of_id, _components(int(of_id.max()) + 1, left, right))


def _components(count: int, left: list[np.ndarray], right: list[np.ndarray]) -> np.ndarray:
    if not left:
        return np.arange(count)
    rows, columns = (np.concatenate([e.reshape(-1) for e in side]) for side in (left, right))
    matrix = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(count, count))
    return connected_components(matrix, directed=False)[1]


def _reasons(marks: list, classes: _Classes) -> dict[int, str]:
    """First reason recorded for each group."""
    reasons: dict[int, str] = {}
    for ids, reason in marks:
        for key in classes.groups_of(ids):
            reasons.setdefault(key, reason)
    return reasons


def _by_group(record: TraceRecord, classes: _Classes, depthwise: set[str]) -> tuple[dict, dict, dict]:
    """Producing blocks, slots and ties of every group, in order of execution."""
    blocks, slots, ties = {}, defaultdict(list), defaultdict(list)
    for block in record.blocks:
        if block.layer is not None and block.layer not in depthwise:
            blocks.setdefault(classes.group_of(block.first), []).append(block)
    for slot in record.slots:
        for key in classes.groups_of(slot.ids):
            slots[key].append(slot)
    for tie in record.ties:
        for key in {classes.group_of(record.blocks[b].first) for b in tie.blocks if b >= 0}:
            ties[key].append(tie)
    return blocks, slots, ties


def _layer_name(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _make_group(record: TraceRecord, classes: _Classes, blocks: list, slots: list, ties: list[Tie]) -> ChannelGroup:
    """Number the classes of one group and translate its raw slots."""
    order: dict[int, int] = {}
    for block in blocks:
        for label in classes.of_id[block.first : block.first + block.count].tolist():
            order.setdefault(label, len(order))
    numbers = np.full(len(classes.group), -1)
    numbers[list(order)] = list(order.values())
    own = []
    for raw in slots:
        ids = raw.ids.numpy()
        labels = np.where(ids > 0, numbers[classes.of_id[ids]], -1)
        if (labels >= 0).any():
            own.append(Slot(raw.tensor, raw.axis, tuple(labels.tolist()), raw.role))
    return ChannelGroup(
        name=_layer_name(blocks[0].layer),
        channels=len(order),
        slots=tuple(own),
        producers=tuple(_layer_name(block.layer) for block in blocks),
        ties=tuple(f"{tie.operator} at {tie.where or 'the top'}" for tie in ties),
        coupled=len(blocks) > 1 and any(tie.operator not in _GATES for tie in ties),
        stem=blocks[0].reads_input,
    )


def _shortcuts(record: TraceRecord, weights: dict[str, tuple[int, ...]], depthwise: set[str]) -> list[Shortcut]:
    """Projections that meet a deeper branch in an add, with nothing else reading them before the add."""
    found: dict[int, Shortcut | None] = {}
    for tie in record.ties:
        if tie.operator != "add" or len(tie.blocks) != 2:
            continue
        for mine, other in ((0, 1), (1, 0)):
            index = tie.blocks[mine]
            block = record.blocks[index] if index >= 0 else None
            if block is None or block.layer is None or block.layer in depthwise or index in found:
                continue
            kernel = weights[block.layer][2:]
            # A linear layer may have its channels along another axis than 1, where they are restored.
            if not kernel or math.prod(kernel) != 1:
                continue
            if tie.depths[mine] < tie.depths[other] and tie.zero[mine] and not block.reads_input:
                found[index] = _make_shortcut(record, index)
    return [found[index] for index in sorted(found) if found[index] is not None]


def _make_shortcut(record: TraceRecord, index: int) -> Shortcut | None:
    block = record.blocks[index]
    last = block.first + block.count

    def inside(ids: torch.Tensor) -> torch.Tensor:
        return (ids >= block.first) & (ids < last)

    if any(bool(inside(ids).any()) for ids in record.reads):
        return None
    slots = []
    for raw in record.slots:
        own = inside(raw.ids)
        if not bool(own.any()):
            continue
        belongs = raw.role in ("out", "bias", "scale", "shift", "mean", "var") and raw.tensor not in record.reused
        if not belongs or not bool(own.all()):
            return None
        slots.append(Slot(raw.tensor, raw.axis, tuple((raw.ids - block.first).tolist()), raw.role))
    owners = list(dict.fromkeys(slot.module for slot in slots))
    identity = tuple(range(block.count))
    if len(owners) > 2 or any(slot.channels != identity for slot in slots):
        return None
    return Shortcut(_layer_name(block.layer), block.count, tuple(slots), owners[-1])
