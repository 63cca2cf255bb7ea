"""Pointwise operators: channels that meet live or die together."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from prune_mm.graph.record import Shadow, Tie
from prune_mm.graph.rules.movement import owns_its_memory
from prune_mm.graph.rules.table import give_up, rule
from prune_mm.graph.shadow import ShadowTracer, operator_name
from prune_mm.graph.tensors import tensors_in, varies


# Operators that PyTorch tags as pointwise need no entry; these have no tag, or none in older versions and in place.
@rule("pointwise", "hardswish", "prelu", "_prelu_kernel", "dropout", "native_dropout", "alpha_dropout", "relu6",
      "rrelu_with_noise", "relu", "leaky_relu", "hardsigmoid", "hardtanh", "silu", "mish", "gelu", "elu", "celu",
      "selu", "softplus", "threshold", "sigmoid", "tanh", "clamp", "clamp_min", "clamp_max", "hardshrink", "softshrink",
      reads_all=True)  # fmt: skip
def pointwise(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Ids that meet are united; a channel that meets a tensor of fixed width is frozen."""
    output = tensors_in(result)[0]
    operands = [(t, tracer.operand_shadow(t)) for t in tensors_in((args, kwargs))]
    shadows = [s for _, s in operands if s is not None]
    expanded = [s.ids.expand(output.shape) for s in shadows]
    for tensor, shadow in operands:
        if shadow is None:
            _freeze_at_fixed_width(tracer, tensor, expanded)
            tracer.lose(tracer.names_behind(tensor), f"is an operand of '{operator_name(func)}', not of a layer")
    main = _along_the_channels(tracer, [s.ids for s in shadows], expanded)
    if not main:
        give_up(tracer, (args, kwargs), result, "meets channels along another axis")
        return
    for left, right in zip(main, main[1:]):
        tracer.unite(expanded[left], expanded[right])
    in_place = func._schema.is_mutable
    if in_place and len(shadows) > 1 and not owns_its_memory(output):
        give_up(tracer, (args, kwargs), (), "is changed in a part of a tensor in place")
    zero = _zero_stays_zero(tracer, func, args, kwargs)
    ids = _merged_ids(tracer, operator_name(func), [shadows[i] for i in main], [expanded[i] for i in main])
    tracer.set_shadow(output, Shadow(ids, zero, tracer.depth((args, kwargs))))


def _freeze_at_fixed_width(tracer: ShadowTracer, other: Tensor, expanded: list[Tensor]) -> None:
    """``other`` has no ids: where it is as wide as the channels, the channels cannot go."""
    for ids in expanded:
        offset = ids.ndim - other.ndim
        if any(other.shape[dim] > 1 and varies(ids, dim + offset) for dim in range(other.ndim)):
            tracer.freeze(ids, "meets a tensor of fixed width")


def _along_the_channels(tracer: ShadowTracer, own: list[Tensor], expanded: list[Tensor]) -> list[int]:
    """Indices of the operands whose channels meet (none: they lie along different axes); others are frozen."""
    axes = [{d for d in range(ids.ndim) if varies(ids, d)} for ids in expanded]
    for mine, other in product(range(len(own)), repeat=2):
        if mine == other:
            continue
        empty = expanded[mine] == 0
        if not axes[other] or axes[mine] & axes[other]:
            if bool(empty.any()):
                tracer.freeze(expanded[other][empty], "meets constant elements of the same width")
        elif not bool(empty.all()):
            tracer.freeze(own[mine], "is broadcast over other channels")
        else:
            offset = expanded[mine].ndim - own[mine].ndim
            if any(d >= offset and own[mine].shape[d - offset] > 1 for d in axes[other]):
                tracer.freeze(own[other], "meets a tensor of fixed width")
    main = [i for i in range(len(own)) if axes[i]] or list(range(len(own)))
    apart = any(axes[a] and not axes[a] & axes[b] for a, b in product(main, repeat=2))
    return [] if apart else main


def _merged_ids(tracer: ShadowTracer, name: str, shadows: list[Shadow], expanded: list[Tensor]) -> Tensor:
    """Ids of the result. Where two producers meet, new ids tell what comes before from what comes after."""
    if len(expanded) == 1:
        return expanded[0]
    result = expanded[0]
    for ids in expanded[1:]:
        result = torch.where(result > 0, result, ids)
    blocks = [tracer.block_of(s.ids) for s in shadows]
    real = [b for b in blocks if b is not None and not tracer.record.blocks[b].vector]
    if len(set(real)) < 2 and all(b is not None for b in blocks):
        # A layer scale or a tensor that meets itself: the producer's own ids go on.
        for ids, block in zip(expanded, blocks):
            if block in real:
                return torch.where(ids > 0, ids, result)
        return result
    present, inverse = torch.unique(_without_repeats(result), return_inverse=True)
    fresh = tracer.fresh(len(present), layer=None)
    fresh = torch.where(present > 0, fresh, torch.zeros_like(fresh))
    tracer.unite(fresh, present)
    known = tuple(-1 if b is None else b for b in blocks)
    depths = tuple(s.depth for s in shadows)
    tracer.record.ties.append(Tie(name, tracer.where(), known, tuple(s.zero for s in shadows), depths))
    return fresh[inverse].expand(expanded[0].shape)


def _without_repeats(ids: Tensor) -> Tensor:
    for dim in range(ids.ndim):
        if ids.shape[dim] > 1 and not varies(ids, dim):
            ids = ids.narrow(dim, 0, 1)
    return ids


def _zero_stays_zero(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the operator gives 0 when every operand that is 0 in a dead channel is 0; found by running it.

    The other operands may hold anything, so both signs and both truth values are tried.
    """

    def probe_with(number: float, truth: int) -> Any:
        def probe(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if not leaf.dtype.is_floating_point:
                return torch.full((1,), truth, dtype=leaf.dtype)
            shadow = tracer.operand_shadow(leaf)
            dead = shadow is not None and shadow.zero
            return torch.full((1,), 0.0 if dead else number, dtype=leaf.dtype)

        return probe

    try:
        for number, truth in product((0.7, -0.7), (1, 0)):
            probe = probe_with(number, truth)
            value = func(*tree_map(probe, args), **tree_map(probe, kwargs))
            if not bool((tensors_in(value)[0] == 0).all()):
                return False
    except (RuntimeError, TypeError, ValueError):
        return False
    return True
