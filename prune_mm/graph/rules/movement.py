"""Data movement: the ids move as the data do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from prune_mm.graph.record import Shadow
from prune_mm.graph.rules.table import give_up, rule
from prune_mm.graph.shadow import ShadowTracer, operator_name
from prune_mm.graph.tensors import tensors_in, varies

_VIEWS = {"view", "_unsafe_view", "_reshape_alias", "reshape"}

#: Operators that take sizes, which the code may have hard-coded.
_SIZED = _VIEWS | {"split", "split_with_sizes", "slice", "narrow", "select", "unbind", "chunk", "unfold", "roll",
                   "flip", "index", "index_select", "repeat", "expand", "pixel_shuffle", "pixel_unshuffle",
                   "channel_shuffle", "native_channel_shuffle"}  # fmt: skip


@rule("clone", "detach", "alias", "contiguous", "lift_fresh", "_to_copy", reads_all=True)
def same(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """The result is the operand, in other memory or another type."""
    shadow = tracer.operand_shadow(args[0])
    if shadow is not None:
        tracer.set_shadow(result, shadow)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "squeeze",
      "unsqueeze", "slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "index",
      "index_select", "flip", "roll", "repeat", "unfold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
      "native_channel_shuffle", "movedim", reads_all=True)  # fmt: skip
def movement(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Replay the operator on the ids."""
    name = operator_name(func)
    shadows = [s for s in map(tracer.operand_shadow, tensors_in((args, kwargs))) if s]
    if any(tracer.shadow(index) for index in _indices(name, args)):
        give_up(tracer, (args, kwargs), result, "is used as an index")
        return
    replay = torch.ops.aten.reshape.default if name in _VIEWS else func
    moved = replay(*_ids_of(tracer, name, args), **kwargs)
    moved = tensors_in(moved)
    zero, depth = all(s.zero for s in shadows), tracer.depth((args, kwargs))
    for tensor, ids in zip(tensors_in(result), moved):
        tracer.set_shadow(tensor, Shadow(ids, zero, depth))
    if name in _SIZED and not _channels_untouched(shadows[0].ids, moved):
        tracer.mark_reshaped(shadows[0].ids, name)


def _indices(name: str, args: tuple) -> list[Tensor]:
    return tensors_in(args[1:]) if name in ("index", "index_select") else []


def _ids_of(tracer: ShadowTracer, name: str, args: tuple) -> tuple:
    """The arguments with ids in place of data; indices stay what they are."""

    def ids_of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shadow = tracer.operand_shadow(leaf)
        return shadow.ids if shadow else torch.zeros(1, dtype=torch.int64).expand(leaf.shape)

    data = 1 if name in ("index", "index_select") else len(args)
    return (*tree_map(ids_of, args[:data]), *args[data:])


def _channels_untouched(before: Tensor, after: list[Tensor]) -> bool:
    """Whether the channel axis came through whole: one axis before and after, nothing left out."""
    axes = [d for d in range(before.ndim) if varies(before, d)]
    if len(axes) != 1:
        return not axes
    lengths = [[d for d in range(ids.ndim) if varies(ids, d)] for ids in after]
    return all(len(a) == 1 and ids.shape[a[0]] == before.shape[axes[0]] for a, ids in zip(lengths, after))


@rule("constant_pad_nd")
def constant_pad(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Padding beside the channels widens the ids; padding of the channel axis moves them."""
    shadow = tracer.shadow(args[0])
    pads, value = args[1], (args[2] if len(args) > 2 else kwargs.get("value", 0))
    ids = shadow.ids
    for position in range(len(pads) // 2):
        dim = ids.ndim - 1 - position
        if pads[2 * position] == 0 and pads[2 * position + 1] == 0:
            continue
        if varies(ids, dim):
            tracer.mark_reshaped(ids, "pad of the channel axis")
            single = [0] * (2 * position) + list(pads[2 * position : 2 * position + 2])
            ids = torch.nn.functional.pad(ids, single)
        else:
            sizes = list(ids.shape)
            sizes[dim] = result.shape[dim]
            ids = ids.narrow(dim, 0, 1).expand(sizes)
    tracer.set_shadow(result, Shadow(ids, shadow.zero and value == 0, shadow.depth))


@rule("copy", reads_all=True)
def copy_into(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """``dst.copy_(src)``: a whole tensor takes the shadow of the source; writing into a part is frozen."""
    target, source = args[0], args[1]
    shadow = tracer.shadow(source)
    if shadow is None or tracer.has_views(target) or not owns_its_memory(target):
        give_up(tracer, (args, kwargs), result, "is written into a part of a tensor in place")
        return
    tracer.set_shadow(target, Shadow(shadow.ids.expand(target.shape), shadow.zero, shadow.depth))


@rule("zero", "fill")
def fill(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """A whole tensor that is filled holds no channels any more; filling a part is frozen."""
    target = args[0]
    shadow = tracer.shadow(target)
    if shadow is None or tracer.has_views(target) or not owns_its_memory(target):
        give_up(tracer, (args, kwargs), result, "is overwritten in place")
        return
    tracer.set_shadow(target, Shadow(torch.zeros_like(shadow.ids), False, shadow.depth))


def owns_its_memory(tensor: Tensor) -> bool:
    """Whether the tensor is not a part of a larger one."""
    return tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()


@rule("resize", "empty_like", "zeros_like", "ones_like", "new_zeros", "new_empty", "new_ones", "new_full", "full_like",
      "new_empty_strided", "rand_like", "randn_like", "bernoulli", "_local_scalar_dense", "is_same_size", "sym_size",
      "_has_compatible_shallow_copy_type", "set", makes_channels=True)  # fmt: skip
def no_provenance(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """The result holds no channel of its operands."""
