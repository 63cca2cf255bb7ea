"""A plan: the versioned, replayable list of structures that turns a dense network into a compact one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prune_mm.structures.base import Structure, structure_from_dict
from prune_mm.structures.channel_slice import MAX_CHANNELS
from prune_mm.structures.json_text import one_line, read_json
from prune_mm.structures.rewrite import check_cut, cut_tensor
from prune_mm.structures.slots import get_tensor, set_tensor

FORMAT = "prune_mm.plan"
VERSION = 1
#: Most channels that a plan may name without writing them out, all its structures together.
MAX_IMPLIED = 1 << 22
#: What torch and Python raise where parts of a plan contradict each other in a way that no structure looks for.
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


@dataclass(frozen=True)
class Plan:
    """Stages of structures, relative to the submodule ``scope`` (empty: the whole model).

    The structures of one stage are decided together and refer to the network before the stage; each stage starts
    from the compact form of the one before.
    """

    scope: str
    stages: tuple[tuple[Structure, ...], ...]

    def module(self, model: nn.Module) -> nn.Module:
        """The submodule the plan is about.

        Raises:
            ValueError: when the model has no such submodule.
        """
        try:
            return model.get_submodule(self.scope)
        except AttributeError as error:
            raise ValueError(f"the model has no module '{self.scope}' that the plan is about") from error

    def apply_masks(self, model: nn.Module) -> None:
        """Give ``model`` the masked form, in place. Stages that only attach something are applied first.

        Raises:
            ValueError: for a plan of several stages that cut (later ones refer to shapes a dense model does not
                have), and naming the tensor when the model is not the one the plan was made for.
        """
        module = self.module(model)
        try:
            self._mask(module)
        except MISFITS as error:
            raise ValueError(f"the plan does not fit the network: {one_line(repr(error))}") from error

    def _mask(self, module: nn.Module) -> None:
        first = next((i for i, s in enumerate(self.stages) if not all(x.attaches for x in s)), len(self.stages))
        if len(self.stages) > first + 1:
            raise ValueError(f"only a plan of one stage has a masked form, this one has {len(self.stages) - first}")
        for stage in self.stages[:first]:
            compact_stage(module, stage)
        for structure in self.stages[first] if first < len(self.stages) else ():
            structure.apply_mask(module)

    def compact(self, model: nn.Module) -> nn.Module:
        """Give ``model`` the compact form, in place, and return it.

        Raises:
            ValueError: naming the tensor, when the model is not the one the plan was made for.
        """
        module = self.module(model)
        try:
            for stage in self.stages:
                compact_stage(module, stage)
        except MISFITS as error:
            raise ValueError(f"the plan does not fit the network: {one_line(repr(error))}") from error
        return model

    def shapes(self, dense: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the compact form's tensors from the dense ones (names relative to the scope).

        Tensors of the plan that ``dense`` does not list are left out.

        Raises:
            ValueError: naming the tensor, when a size is not the one the plan was made for.
        """
        shapes = {name: list(shape) for name, shape in dense.items()}
        for stage in self.stages:
            stage = resolve(stage)
            for (name, axis), kept in merge_cuts(stage).items():
                if name not in shapes:
                    continue
                if axis >= len(shapes[name]) or shapes[name][axis] != kept.numel():
                    found = tuple(shapes[name])
                    raise ValueError(f"'{name}' has shape {found}, the plan expects {kept.numel()} along axis {axis}")
                shapes[name][axis] = int(kept.sum())
            for structure in stage:
                structure.reshape(shapes)
        return {name: tuple(shape) for name, shape in shapes.items()}

    def positions(self, dense: dict[str, int]) -> dict[str, int]:
        """Positions the compact form's weights are applied at, from the dense ones."""
        positions = dict(dense)
        for stage in self.stages:
            for structure in stage:
                structure.place(positions)
        return positions

    def to_json(self) -> str:
        """The plan as JSON text."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "scope": self.scope,
            "stages": [[structure.to_dict() for structure in stage] for stage in self.stages],
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back.

        Raises:
            ValueError: saying what is wrong, for anything that is not a plan this version can read.
        """
        try:
            data = read_json(text)
        except ValueError as error:
            raise ValueError(f"the plan is not valid JSON: {error}") from error
        try:
            return cls._from_data(data)
        except ValueError as error:
            raise ValueError(one_line(error)) from error

    @classmethod
    def _from_data(cls, data: Any) -> Plan:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"not a plan: the key 'format' must be '{FORMAT}'")
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise ValueError(f"the plan has version {data.get('version')!r:.80}, this prune_mm reads version {VERSION}")
        stages = data.get("stages")
        if not isinstance(stages, list) or not all(isinstance(stage, list) for stage in stages):
            raise ValueError("damaged plan: 'stages' must be a list of lists")
        if not isinstance(data.get("scope"), str):
            raise ValueError("damaged plan: 'scope' must be text")
        implied = sum(_implied(entry) for stage in stages for entry in stage)
        if implied > MAX_IMPLIED:
            raise ValueError(f"damaged plan: its layers would have {implied} channels, more than {MAX_IMPLIED}")
        return cls(data["scope"], tuple(tuple(structure_from_dict(entry) for entry in stage) for stage in stages))


def _implied(entry: Any) -> int:
    """How many channels a structure names by their number only: what it takes in memory beyond its text."""
    if not isinstance(entry, dict):
        return 0
    numbers = [entry.get(key) for key in ("channels", "outputs", "rank")]
    slots = entry["slots"] if isinstance(entry.get("slots"), list) else []
    whole = [slot for slot in slots if isinstance(slot, dict) and slot.get("channels") is None]
    return (1 + len(whole)) * sum(n for n in numbers if type(n) is int and 0 < n <= MAX_CHANNELS)


def merge_cuts(stage: Sequence[Structure]) -> dict[tuple[str, int], Tensor]:
    """What stays along every ``(tensor, axis)`` when all structures of a stage are cut together.

    Raises:
        ValueError: naming the tensor, when two structures disagree about its size or nothing of it would stay.
    """
    merged: dict[tuple[str, int], Tensor] = {}
    for structure in stage:
        for name, axis, kept in structure.cuts():
            other = merged.get((name, axis))
            if other is not None and other.numel() != kept.numel():
                raise ValueError(f"damaged plan: '{name}' has {other.numel()} and {kept.numel()} along axis {axis}")
            merged[name, axis] = kept if other is None else other & kept
    for (name, axis), kept in merged.items():
        if not bool(kept.any()):
            raise ValueError(f"damaged plan: nothing of '{name}' would stay along axis {axis}")
    return merged


def merge_orders(stage: Sequence[Structure]) -> dict[tuple[str, int], Tensor]:
    """How every ``(tensor, axis)`` is re-arranged when all structures of a stage are.

    Raises:
        ValueError: naming the tensor, when two structures disagree about its size, or it is cut as well.
    """
    merged: dict[tuple[str, int], Tensor] = {}
    for structure in stage:
        for name, axis, order in structure.orders():
            other = merged.get((name, axis))
            if other is not None and other.numel() != order.numel():
                raise ValueError(f"damaged plan: '{name}' has {other.numel()} and {order.numel()} along axis {axis}")
            merged[name, axis] = order if other is None else other[order]
    cut = {(name, axis) for structure in stage for name, axis, _ in structure.cuts()}
    for name, axis in sorted(cut & set(merged)):
        raise ValueError(f"damaged plan: '{name}' is cut and re-arranged along axis {axis} in one stage")
    return merged


def resolve(stage: Sequence[Structure]) -> tuple[Structure, ...]:
    """The structures of a stage in the form they take beside each other; see :meth:`Structure.within`.

    Raises:
        ValueError: as :func:`merge_cuts` and :func:`merge_orders`, and when structures contradict each other.
    """
    cut = {name for structure in stage for name, _, _ in structure.cuts()}
    claimed: set[str] = set()
    for structure in stage:
        for name in structure.claims():
            if name in cut or name in claimed:
                raise ValueError(f"damaged plan: '{name}' is changed by several structures of one stage")
            claimed.add(name)
    first = merge_cuts([structure for structure in stage if type(structure).within is Structure.within])
    orders = merge_orders(stage)
    return tuple(structure.within(first, orders) for structure in stage)


def compact_stage(module: nn.Module, stage: Sequence[Structure]) -> None:
    """Give ``module`` the compact form of one stage, in place.

    Raises:
        ValueError: naming the tensor or module, when ``module`` is not the one the stage was made for. It is
            unchanged then.
    """
    stage = resolve(stage)
    cuts: dict[str, dict[int, Tensor]] = {}
    for (name, axis), kept in merge_cuts(stage).items():
        cuts.setdefault(name, {})[axis] = kept
    for name, kept in cuts.items():
        check_cut(module, name, kept)
    for structure in stage:
        structure.check(module)
    for structure in stage:
        structure.prepare(module)
    for (name, axis), order in merge_orders(stage).items():
        tensor = get_tensor(module, name).detach()
        set_tensor(module, name, tensor.index_select(axis, order.to(tensor.device)))
    for name, kept in cuts.items():
        cut_tensor(module, name, kept)
    for structure in stage:
        structure.rewrite(module)


def count_macs(shapes: dict[str, tuple[int, ...]], positions: dict[str, int]) -> int:
    """Multiply-adds of one forward: elements of every conv and linear weight times the positions it is applied at.

    Names that ``shapes`` lacks are left out.
    """
    return sum(math.prod(shapes[name]) * count for name, count in positions.items() if name in shapes)
