"""What each operator does to the shadows: one small function a rule, one table from operator to rule.

An operator without a rule freezes the channels it reads, is counted in ``TraceRecord.unknown_operators`` and so shows
up as a reason in the graph. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from prune_mm.graph.shadow import Shadow, ShadowTracer, Tie, distinct, tensors_in, varies

Rule = Callable[[ShadowTracer, Any, tuple, dict, Any], None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, named without namespace, overload and in-place underscore."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply_rule(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Find and run the rule of ``func``."""
    name = func._schema.name.split("::")[-1].rstrip("_")
    found = _RULES.get(name)
    if found is None and torch.Tag.pointwise in func.tags:
        found = pointwise
    if found not in _READS_NO_CHANNELS and not any(tracer.operand_shadow(t) for t in _operands(found, args, kwargs)):
        tracer.make_opaque(result, name)
        return
    (found or unknown)(tracer, func, args, kwargs, result)


def _operands(found: Rule | None, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors whose channels an operator is about: all for movement and arithmetic, else the first."""
    tensors = tensors_in((args, kwargs))
    return tensors if found in (movement, pointwise, copy_into, product, None) else tensors[:1]


def unknown(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """No rule: whatever the operator reads must stay."""
    name = func._schema.name.split("::")[-1]
    tracer.record.unknown_operators[name] = tracer.record.unknown_operators.get(name, 0) + 1
    _give_up(tracer, (args, kwargs), result, f"operator '{name}' has no rule")


def _give_up(tracer: ShadowTracer, operands: Any, result: Any, reason: str) -> None:
    for tensor in tensors_in(operands):
        shadow = tracer.shadow(tensor)
        if shadow is not None:
            tracer.freeze(shadow.ids, reason)
    tracer.make_opaque(result, reason)


def _depth(tracer: ShadowTracer, operands: Any) -> int:
    return max((s.depth for s in map(tracer.shadow, tensors_in(operands)) if s), default=0)


# -- data movement: the ids move as the data do ---------------------------------------------------------------------

_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "split", "split_with_sizes", "slice", "narrow",
             "select", "unbind", "chunk", "constant_pad_nd", "unfold", "roll", "flip", "index", "index_select",
             "as_strided", "repeat", "expand", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"}  # fmt: skip


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze",
      "slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "index",
      "index_select", "flip", "roll", "repeat", "unfold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
      "clone", "detach", "alias", "contiguous", "lift_fresh", "movedim", "_to_copy")  # fmt: skip
def movement(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Replay the operator on the ids."""
    name = func._schema.name.split("::")[-1].rstrip("_")
    shadows = [s for s in map(tracer.operand_shadow, tensors_in((args, kwargs))) if s]
    if name in ("clone", "detach", "alias", "contiguous", "lift_fresh", "_to_copy"):
        tracer.set_shadow(result, shadows[0])
        return

    def ids_of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dtype.is_floating_point:
            return leaf
        shadow = tracer.shadow(leaf)
        return shadow.ids if shadow else torch.zeros(leaf.shape, dtype=torch.int64)

    replay = torch.ops.aten.reshape.default if name in ("view", "_unsafe_view", "_reshape_alias") else func
    moved = replay(*tree_map(ids_of, args), **tree_map(ids_of, kwargs))
    outputs, moved = tensors_in(result), tensors_in(moved)
    zero, depth = all(s.zero for s in shadows), max(s.depth for s in shadows)
    for tensor, ids in zip(outputs, moved):
        tracer.set_shadow(tensor, Shadow(ids, zero, depth))
    if name in _RESHAPES and not _channels_untouched(shadows[0].ids, moved):
        tracer.mark_reshaped(shadows[0].ids, name)


def _channels_untouched(before: Tensor, after: list[Tensor]) -> bool:
    """Whether the channel axis came through whole: same axis, same ids, nothing left out."""
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


@rule("copy")
def copy_into(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """``dst.copy_(src)``: a whole tensor takes the shadow of the source; writing into a part is frozen."""
    target, source = args[0], args[1]
    shadow = tracer.shadow(source)
    whole = target.untyped_storage().nbytes() == target.numel() * target.element_size()
    if not whole or shadow is None:
        _give_up(tracer, (args, kwargs), result, "in-place write into a part of a tensor")
        return
    tracer.set_shadow(target, Shadow(shadow.ids.expand(target.shape), shadow.zero, shadow.depth))


@rule("resize", "empty_like", "zeros_like", "ones_like", "new_zeros", "new_empty", "new_ones", "new_full", "full_like",
      "rand_like", "randn_like", "bernoulli", "_local_scalar_dense", "set", "_has_compatible_shallow_copy_type",
      "is_same_size", "sym_size", "zero", "fill")  # fmt: skip
def no_provenance(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """The result holds no channel of its operands."""


# -- pointwise ------------------------------------------------------------------------------------------------------


@rule(
    "hardswish",
    "prelu",
    "_prelu_kernel",
    "dropout",
    "native_dropout",
    "alpha_dropout",
    "relu6",
    "rrelu_with_noise",
)
def pointwise(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Ids that meet are united; a channel that meets a tensor of fixed width is frozen."""
    output = tensors_in(result)[0]
    name = func._schema.name.split("::")[-1].rstrip("_")
    operands = [(t, tracer.operand_shadow(t)) for t in tensors_in((args, kwargs))]
    with_ids = [(t, s) for t, s in operands if s is not None]
    expanded = [s.ids.expand(output.shape) for _, s in with_ids]
    for tensor, shadow in operands:
        if shadow is None:
            _freeze_at_fixed_width(tracer, tensor, expanded)
    for (_, shadow), ids in zip(with_ids, expanded):
        _freeze_where_others_have_no_channel(tracer, shadow.ids, ids, expanded)
    for left, right in zip(expanded, expanded[1:]):
        tracer.unite(left, right)
    zero = _zero_stays_zero(tracer, func, args, kwargs)
    depth = max(s.depth for _, s in with_ids)
    ids = _merged_ids(tracer, name, [s for _, s in with_ids], expanded)
    in_place = output is (operands[0][0] if operands else None) or func._schema.name.endswith("_")
    if in_place and len(with_ids) > 1 and not _owns_its_memory(output):
        _give_up(tracer, (args, kwargs), (), "in-place arithmetic on a part of a tensor")
    tracer.set_shadow(output, Shadow(ids, zero, depth))


def _owns_its_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()


def _freeze_at_fixed_width(tracer: ShadowTracer, other: Tensor, expanded: list[Tensor]) -> None:
    """``other`` has no ids: where it is as wide as the channels, the channels cannot go."""
    if other.numel() == 1:
        return
    for ids in expanded:
        offset = ids.ndim - other.ndim
        for dim in range(other.ndim):
            if other.shape[dim] > 1 and varies(ids, dim + offset):
                tracer.freeze(ids, "meets a tensor of fixed width")
                return


def _freeze_where_others_have_no_channel(
    tracer: ShadowTracer, own: Tensor, ids: Tensor, expanded: list[Tensor]
) -> None:
    """Elements without a channel, as wide as this operand, hold this operand's channels where they are."""
    empty = ids == 0
    if not bool(empty.any()) or own.numel() == 1:
        return
    for other in expanded:
        if other is not ids:
            tracer.freeze(other[empty], "meets constant elements of the same width")


def _merged_ids(tracer: ShadowTracer, name: str, shadows: list[Shadow], expanded: list[Tensor]) -> Tensor:
    """Ids of the result. Where two producers meet, new ids tell what comes before from what comes after."""
    if len(expanded) == 1:
        return expanded[0]
    result = expanded[0]
    for ids in expanded[1:]:
        result = torch.where(result > 0, result, ids)
    blocks = [_block_of(tracer, s.ids) for s in shadows]
    real = [b for b in blocks if b is not None and not _is_vector(tracer, b)]
    if len({*real}) < 2 and all(b is not None for b in blocks):
        # A layer scale or a tensor that meets itself: the producer's own ids go on.
        for ids, block in zip(expanded, blocks):
            if block in real:
                return torch.where(ids > 0, ids, result)
        return result
    present, inverse = torch.unique(_compact_dims(result), return_inverse=True)
    fresh = tracer.fresh(len(present), layer=None)
    fresh = torch.where(present > 0, fresh, torch.zeros_like(fresh))
    tracer.unite(fresh, present)
    known = [(b, s.zero, s.depth) for b, s in zip(blocks, shadows)]
    tracer.record.ties.append(
        Tie(
            name,
            tracer.where(),
            *(tuple(v) for v in zip(*((-1 if b is None else b, z, d) for b, z, d in known))),
        )
    )
    return fresh[inverse].expand(expanded[0].shape)


def _compact_dims(ids: Tensor) -> Tensor:
    for dim in range(ids.ndim):
        if ids.shape[dim] > 1 and not varies(ids, dim):
            ids = ids.narrow(dim, 0, 1)
    return ids


def _block_of(tracer: ShadowTracer, ids: Tensor) -> int | None:
    """Index of the block all ids of a shadow belong to; None when they come from several."""
    present = distinct(ids)
    if not present.numel():
        return None
    low, high = int(present[0]), int(present[-1])
    for index in range(len(tracer.record.blocks) - 1, -1, -1):
        block = tracer.record.blocks[index]
        if block.first <= low:
            return index if high < block.first + block.count else None
    return None


def _is_vector(tracer: ShadowTracer, block: int) -> bool:
    first = tracer.record.blocks[block].first
    return any(int(ids.reshape(-1)[0]) == first for ids in tracer._vector_ids.values())


def _zero_stays_zero(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the operator gives 0 when every operand that is 0 in a dead channel is 0; found by running it."""

    def probe(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shadow = tracer.shadow(leaf)
        dead = shadow is not None and shadow.zero
        if not leaf.dtype.is_floating_point:
            return torch.ones(1, dtype=leaf.dtype)
        return torch.zeros(1, dtype=leaf.dtype) if dead else torch.full((1,), 0.7, dtype=leaf.dtype)

    try:
        value = func(*tree_map(probe, args), **tree_map(probe, kwargs))
    except (RuntimeError, TypeError, ValueError):
        return False
    return bool((tensors_in(value)[0] == 0).all())


# -- per-channel operators over space -------------------------------------------------------------------------------


def _spatial(dims: int) -> Rule:
    def spatial(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Every channel is resampled on its own over the last dims."""
        shadow = tracer.shadow(args[0])
        ids = shadow.ids
        if any(varies(ids, ids.ndim - 1 - d) for d in range(dims)):
            _give_up(tracer, (args, kwargs), result, "resampling across channels")
            return
        others = [s for s in map(tracer.shadow, tensors_in((args[1:], kwargs))) if s]
        for other in others:
            tracer.freeze(other.ids, "steers a resampling")
        for d in range(dims):
            ids = ids.narrow(ids.ndim - 1 - d, 0, 1)
        for tensor in tensors_in(result):
            tracer.set_shadow(tensor, Shadow(ids.expand(tensor.shape), shadow.zero, shadow.depth))

    return spatial


for _dims, _names in {
    1: ("max_pool1d_with_indices", "avg_pool1d", "adaptive_avg_pool1d", "upsample_linear1d", "upsample_nearest1d",
        "reflection_pad1d", "replication_pad1d"),
    2: ("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
        "adaptive_max_pool2d", "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d",
        "_upsample_bilinear2d_aa", "reflection_pad2d", "replication_pad2d", "grid_sampler_2d", "max_unpool2d"),
    3: ("max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "upsample_trilinear3d", "upsample_nearest3d"),
}.items():  # fmt: skip
    rule(*_names)(_spatial(_dims))


# -- reductions -----------------------------------------------------------------------------------------------------


def _dims(ndim: int, dims: Any) -> list[int]:
    if dims is None or dims == []:
        return list(range(ndim))
    return [d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "var_mean",
    "std",
    "prod",
    "linalg_vector_norm",
    "norm",
)
def reduction(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Elements that are reduced together are united (all of them when it is the channel axis)."""
    shadow = tracer.shadow(args[0])
    if any(isinstance(a, Tensor) for a in args[1:]):
        pointwise(tracer, func, args, kwargs, result)
        return
    name = func._schema.name.split("::")[-1]
    position = {"norm": 2, "linalg_vector_norm": 2}.get(name, 1)
    dims = _dims(args[0].ndim, args[position] if len(args) > position else kwargs.get("dim"))
    ids = _unite_along(tracer, shadow.ids, dims)
    keeps_zero = shadow.zero and name in ("mean", "sum", "amax", "amin", "max", "min")
    for tensor in tensors_in(result):
        own = ids if tensor.ndim == ids.ndim else _drop(ids, dims)
        tracer.set_shadow(tensor, Shadow(own.expand(tensor.shape), keeps_zero, shadow.depth))


def _unite_along(tracer: ShadowTracer, ids: Tensor, dims: list[int]) -> Tensor:
    for dim in dims:
        if varies(ids, dim):
            tracer.unite(ids, ids.narrow(dim, 0, 1))
            tracer.mark_reshaped(ids, "reduction over channels")
        ids = ids.narrow(dim, 0, 1)
    return ids


def _drop(ids: Tensor, dims: list[int]) -> Tensor:
    return reduce(lambda x, d: x.squeeze(d), sorted(dims, reverse=True), ids)


@rule("_softmax", "softmax", "_log_softmax", "log_softmax")
def softmax(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
    """Elements that are normalised together are united."""
    shadow = tracer.shadow(args[0])
    dim = args[1] % args[0].ndim
    _unite_along(tracer, shadow.ids, [dim])
    tracer.set_shadow(result, Shadow(shadow.ids, False, shadow.depth))


# -- layers with weights --------------------------------------------------------------------------------------------


def _channel_ids(ids: Tensor, axis: int) -> Tensor | None:
    """Ids along ``axis`` when nothing varies along any other axis, else None."""
    for dim in range(ids.ndim):
        if dim != axis:
            if varies(ids, dim):
                return None
            ids = ids.narrow(dim, 0, 1)
    return ids.reshape(-1)


@rule("convolution", "_convolution", "conv2d")
def convolution(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
    """Fresh ids for what it produces; input columns, output rows and bias are slots."""
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    positions = (x if transposed else result)[0, 0].numel() * x.shape[0]
    _conv_layer(tracer, x, weight, bias, groups, transposed, positions, result)


@rule("deform_conv2d")
def deformable_convolution(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
    """torchvision's deformable convolution: as a convolution; offsets and masks have a fixed layout."""
    x, weight, offset, mask, bias = args[:5]
    groups, offset_groups = args[11], args[12]
    for steering in (offset, mask):
        shadow = tracer.shadow(steering)
        if shadow is not None:
            tracer.freeze(shadow.ids, "steers a deformable convolution")
    shadow = tracer.shadow(x)
    if offset_groups > 1 and shadow is not None:
        tracer.freeze(shadow.ids, "deformable convolution with several offset groups")
    _conv_layer(tracer, x, weight, bias, groups, False, result[0, 0].numel() * x.shape[0], result)


def _conv_layer(
    tracer: ShadowTracer, x: Tensor, weight: Tensor, bias: Tensor | None,
    groups: int, transposed: bool, positions: int, result: Tensor,
) -> None:  # fmt: skip
    name = tracer.name_of(weight)
    if name is None or (bias is not None and tracer.name_of(bias) is None and bias.numel() and bool(bias.any())):
        _give_up(tracer, (x,), result, "its weight is computed on the fly")
        return
    tracer.record.positions[name] = tracer.record.positions.get(name, 0) + positions
    shadow = tracer.shadow(x)
    ids_in = None if shadow is None else _channel_ids(shadow.ids, 1)
    if shadow is not None and ids_in is None:
        tracer.freeze(shadow.ids, "convolution over an axis where channels vary")
    if ids_in is None:
        ids_in = torch.zeros(x.shape[1], dtype=torch.int64)
    # Two calls on one input image per trace keep counts per image.
    out_count = result.shape[1]
    depth = (shadow.depth if shadow else 0) + 1
    depthwise = groups > 1 and (x.shape[1] == groups)
    ids_out = _layer_output_ids(tracer, name, ids_in, out_count, depth, weight, reads_input=not bool(ids_in.any()))
    rows, columns = (1, 0) if transposed else (0, 1)
    if depthwise:
        tracer.unite(ids_out, ids_in.repeat_interleave(out_count // groups))
        _weight_slot(tracer, name, columns if transposed else rows, ids_in if transposed else ids_out, "depthwise")
        if transposed and out_count != groups:
            tracer.freeze(ids_in, "depthwise transposed convolution with a multiplier")
    elif groups > 1:
        _tie_groups(tracer, ids_in, groups)
        _tie_groups(tracer, ids_out, groups)
        if transposed:
            _give_up(tracer, (x,), (), "transposed convolution with groups")
            tracer.freeze(ids_out, "transposed convolution with groups")
        _weight_slot(tracer, name, rows, ids_out, "out")
        _weight_slot(tracer, name, columns, ids_in[: x.shape[1] // groups], "in")
    else:
        _weight_slot(tracer, name, rows, ids_out, "out")
        _weight_slot(tracer, name, columns, ids_in, "in")
    bias_name = tracer.name_of(bias)
    if bias_name:
        _weight_slot(tracer, bias_name, 0, ids_out, "bias")
    ids = ids_out.view(1, -1, *([1] * (result.ndim - 2))).expand(result.shape)
    tracer.set_shadow(result, Shadow(ids, True, depth))


def _layer_output_ids(
    tracer: ShadowTracer, name: str, ids_in: Tensor, count: int, depth: int, weight: Tensor, reads_input: bool
) -> Tensor:
    """Output ids of a weight: fresh at its first use, the same (and inputs united) at later uses."""
    used = tracer.layer_ids(name)
    if used is not None:
        tracer.unite(used[0], ids_in)
        _freeze_where_others_have_no_channel(tracer, ids_in, ids_in, [used[0]])
        _freeze_where_others_have_no_channel(tracer, used[0], used[0], [ids_in])
        return used[1]
    ids_out = tracer.fresh(count, layer=name, depth=depth, reads_input=reads_input)
    tracer.remember_layer(name, ids_in, ids_out)
    other = tracer.tied_storages.get(weight.untyped_storage()._cdata)
    if other:
        for ids in (ids_in, ids_out):
            tracer.freeze(ids, f"the weight is shared with {other}")
    return ids_out


def _weight_slot(tracer: ShadowTracer, name: str, axis: int, ids: Tensor, role: Any) -> None:
    known = any(s.tensor == name and s.axis == axis for s in tracer.record.slots)
    if not known:
        tracer.add_slot(name, axis, ids, role)


def _tie_groups(tracer: ShadowTracer, ids: Tensor, groups: int) -> None:
    """The same offset in every group lives or dies together, so that groups stay equally wide."""
    table = ids.view(groups, -1)
    tracer.unite(table, table[:1])
    if bool((table == 0).any()):
        tracer.freeze(ids, "grouped convolution over constant channels")


@rule("addmm", "mm", "linear")
def linear(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
    """``x @ W.T (+ b)``: fresh ids for the outputs; ids that vary along the rows of x pass through."""
    if len(args) >= 3:
        (bias, x, weight) = (args[2], args[0], args[1]) if "linear" in str(func) else args[:3]
    else:
        bias, x, weight = None, args[0], args[1]
    name = tracer.name_of(weight) if "linear" in str(func) else tracer.name_of_transposed(weight)
    bias_name = tracer.name_of(bias)
    shadow = tracer.shadow(x)
    if name is None or (bias is not None and bias_name is None):
        _give_up(tracer, (args, kwargs), result, "product of two activations")
        return
    rows = x.numel() // x.shape[-1]
    tracer.record.positions[name] = tracer.record.positions.get(name, 0) + rows
    if shadow is not None and not varies(shadow.ids, x.ndim - 1) and any(varies(shadow.ids, d) for d in range(x.ndim)):
        tracer.set_shadow(result, Shadow(shadow.ids.narrow(-1, 0, 1).expand(result.shape), bias is None, shadow.depth))
        return
    ids_in = None if shadow is None else _channel_ids(shadow.ids, x.ndim - 1)
    if shadow is not None and ids_in is None:
        tracer.freeze(shadow.ids, "linear layer over an axis where channels vary")
    if ids_in is None:
        ids_in = torch.zeros(x.shape[-1], dtype=torch.int64)
    depth = (shadow.depth if shadow else 0) + 1
    ids_out = _layer_output_ids(
        tracer, name, ids_in, result.shape[-1], depth, weight, reads_input=not bool(ids_in.any())
    )
    _weight_slot(tracer, name, 0, ids_out, "out")
    _weight_slot(tracer, name, 1, ids_in, "in")
    if bias_name:
        _weight_slot(tracer, bias_name, 0, ids_out, "bias")
    tracer.set_shadow(result, Shadow(ids_out.expand(result.shape), True, depth))


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "batch_norm", "_batch_norm_no_update", "miopen_batch_norm")  # fmt: skip
def batch_norm(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """The ids go through; scale, shift and running statistics are slots."""
    x, output = args[0], tensors_in(result)[0]
    shadow = tracer.shadow(x)
    ids = _channel_ids(shadow.ids, 1)
    names = [tracer.name_of(t) for t in args[1:5]]
    given = [isinstance(t, Tensor) and t.numel() > 0 for t in args[1:5]]
    if ids is None or any(g and n is None for g, n in zip(given, names)):
        _give_up(tracer, (x,), result, "normalisation with computed statistics")
        return
    for name, role in zip(names, ("scale", "shift", "mean", "var")):
        if name:
            _norm_slot(tracer, name, ids, role)
    tracer.set_shadow(output, Shadow(shadow.ids, names[0] is not None, shadow.depth))


def _norm_slot(tracer: ShadowTracer, name: str, ids: Tensor, role: Any) -> None:
    """A norm used twice unites the channels of both uses."""
    for slot in tracer.record.slots:
        if slot.tensor == name:
            tracer.unite(slot.ids, ids)
            return
    tracer.add_slot(name, 0, ids, role)


@rule("native_group_norm", "group_norm")
def group_norm(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """As batch norm; its statistics count dead channels, so they must be exactly zero on the way in."""
    x, weight, bias = args[:3]
    output = tensors_in(result)[0]
    shadow = tracer.shadow(x)
    ids = _channel_ids(shadow.ids, 1)
    name, bias_name = tracer.name_of(weight), tracer.name_of(bias)
    owner = None if name is None else name.rpartition(".")[0]
    is_module = owner is not None and isinstance(tracer.module.get_submodule(owner), torch.nn.GroupNorm)
    if ids is None or not is_module or (bias is not None and bias_name is None):
        _give_up(tracer, (x,), result, "group norm without its own affine parameters")
        return
    if not shadow.zero:
        _give_up(tracer, (x,), (), "group norm over channels that are not zero when dead")
    _norm_slot(tracer, name, ids, "scale")
    if bias_name:
        _norm_slot(tracer, bias_name, ids, "shift")
    tracer.record.group_norms.append(owner)
    tracer.set_shadow(output, Shadow(shadow.ids, True, shadow.depth))


@rule("native_layer_norm", "layer_norm")
def layer_norm(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """A norm over the channel axis mixes all channels: they must stay."""
    x, sizes = args[0], args[1]
    shadow = tracer.shadow(x)
    if any(varies(shadow.ids, x.ndim - 1 - d) for d in range(len(sizes))):
        _give_up(tracer, (args, kwargs), result, "layer norm over the channels")
        return
    tracer.set_shadow(tensors_in(result)[0], Shadow(shadow.ids, False, shadow.depth))


@rule("bmm", "baddbmm", "matmul", "_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention",
      "_scaled_dot_product_attention_math", "_scaled_dot_product_efficient_attention")  # fmt: skip
def product(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Attention and other products of activations contract channels in ways no slot describes."""
    _give_up(tracer, (args, kwargs), result, "product of two activations")


#: Layers make channels even when they read none (the stem), so they run whatever their operands are.
_READS_NO_CHANNELS = {convolution, linear, deformable_convolution, no_provenance}
