"""Operators over several elements of a channel, or over several channels."""

from __future__ import annotations

from functools import reduce
from typing import Any

from torch import Tensor

from prune_mm.graph.record import Shadow
from prune_mm.graph.rules.pointwise import pointwise
from prune_mm.graph.rules.table import Rule, give_up, rule
from prune_mm.graph.shadow import ShadowTracer, operator_name
from prune_mm.graph.tensors import tensors_in, varies


def _spatial(dims: int) -> Rule:
    def spatial(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Every channel is resampled on its own over the last dims."""
        shadow = tracer.shadow(args[0])
        ids = shadow.ids
        if any(varies(ids, ids.ndim - 1 - d) for d in range(dims)):
            give_up(tracer, (args, kwargs), result, "is resampled across channels")
            return
        for other in filter(None, map(tracer.shadow, tensors_in((args[1:], kwargs)))):
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


def _reduced_dims(ndim: int, dims: Any) -> list[int]:
    if dims is None or dims == []:
        return list(range(ndim))
    return [d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "prod", "linalg_vector_norm", "norm")
def reduction(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Elements that are reduced together are united (all of them when it is the channel axis)."""
    if any(isinstance(a, Tensor) for a in args[1:]):
        pointwise(tracer, func, args, kwargs, result)
        return
    shadow = tracer.shadow(args[0])
    name = operator_name(func)
    if shadow is None:
        give_up(tracer, args, result, f"is read by '{name}'")
        return
    position = {"norm": 2, "linalg_vector_norm": 2}.get(name, 1)
    dims = _reduced_dims(args[0].ndim, args[position] if len(args) > position else kwargs.get("dim"))
    ids = _unite_along(tracer, shadow.ids, dims, name)
    if not any(varies(ids, d) for d in range(ids.ndim)) and any(varies(shadow.ids, d) for d in dims):
        tracer.freeze(shadow.ids, f"is reduced over all channels ('{name}')")
    keeps_zero = shadow.zero and name in ("mean", "sum", "amax", "amin", "max", "min")
    for tensor in tensors_in(result):
        own = ids if tensor.ndim == ids.ndim else _drop(ids, dims)
        tracer.set_shadow(tensor, Shadow(own.expand(tensor.shape), keeps_zero, shadow.depth))


def _unite_along(tracer: ShadowTracer, ids: Tensor, dims: list[int], name: str) -> Tensor:
    for dim in dims:
        if varies(ids, dim):
            tracer.unite(ids, ids.narrow(dim, 0, 1))
            tracer.mark_reshaped(ids, f"{name} over channels")
        ids = ids.narrow(dim, 0, 1)
    return ids


def _drop(ids: Tensor, dims: list[int]) -> Tensor:
    return reduce(lambda x, d: x.squeeze(d), sorted(dims, reverse=True), ids)


@rule("_softmax", "softmax", "_log_softmax", "log_softmax")
def softmax(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
    """Elements that are normalised together are united."""
    shadow = tracer.shadow(args[0])
    _unite_along(tracer, shadow.ids, [args[1] % args[0].ndim], "softmax")
    tracer.set_shadow(result, Shadow(shadow.ids, False, shadow.depth))
