"""The table from operator to rule, and what happens to operators that are not in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prune_mm.graph.record import Shadow
from prune_mm.graph.shadow import ShadowTracer, operator_name
from prune_mm.graph.tensors import tensors_in, varies

Rule = Callable[[ShadowTracer, Any, tuple, dict, Any], None]
RULES: dict[str, Rule] = {}

#: Rules that run although no operand carries channels: layers make channels even when they read none.
_MAKERS: set[Rule] = set()
#: Rules about all tensors among their operands; the others are about the first.
_ABOUT_ALL: set[Rule] = set()


def rule(*names: str, makes_channels: bool = False, reads_all: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operators, named without namespace, overload and in-place underscore.

    Args:
        names: the operators.
        makes_channels: whether the rule runs although no operand carries channels.
        reads_all: whether the operator is about all its tensors, not only about the first.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        if makes_channels:
            _MAKERS.add(function)
        if reads_all:
            _ABOUT_ALL.add(function)
        return function

    return register


def apply_rule(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Find and run the rule of ``func``."""
    found = RULES.get(operator_name(func))
    if found is None:
        found = RULES["pointwise"] if torch.Tag.pointwise in func.tags else unknown
    if found not in _MAKERS:
        tensors = tensors_in((args, kwargs))
        about = tensors if found in _ABOUT_ALL else tensors[:1]
        if not any(tracer.operand_shadow(t) for t in about):
            give_up(tracer, (args, kwargs), result, f"is read by '{operator_name(func)}'")
            return
    found(tracer, func, args, kwargs, result)


def give_up(tracer: ShadowTracer, operands: Any, result: Any, reason: str) -> None:
    """Freeze the channels of the operands; the result holds none."""
    for tensor in tensors_in(operands):
        shadow = tracer.shadow(tensor)
        if shadow is not None:
            tracer.freeze(shadow.ids, reason)
    tracer.make_opaque(result, operands)


@rule("", reads_all=True)
def unknown(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """No rule: whatever the operator reads must stay."""
    name = func._schema.name.split("::")[-1]
    give_up(tracer, (args, kwargs), result, f"passes through the operator '{name}', which has no rule")


def channel_ids(ids: Tensor, axis: int) -> Tensor | None:
    """Ids along ``axis`` when nothing varies along any other axis, else None."""
    for dim in range(ids.ndim):
        if dim != axis:
            if varies(ids, dim):
                return None
            ids = ids.narrow(dim, 0, 1)
    return ids.reshape(-1)


def read_channels(tracer: ShadowTracer, x: Tensor, axis: int, reader: str) -> tuple[Tensor, Shadow | None]:
    """Ids along ``axis`` of what a layer reads, 0 where it reads none; frozen where they lie otherwise."""
    shadow = tracer.shadow(x)
    ids = None if shadow is None else channel_ids(shadow.ids, axis)
    if shadow is not None and ids is None:
        tracer.freeze(shadow.ids, f"is read by a {reader} along another axis")
    if ids is None:
        ids = torch.zeros(x.shape[axis], dtype=torch.int64)
    return ids, shadow
