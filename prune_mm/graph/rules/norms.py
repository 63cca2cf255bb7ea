"""Normalisations: the ids go through, affine parameters and statistics are slots."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from prune_mm.graph.record import Shadow
from prune_mm.graph.rules.table import channel_ids, give_up, rule
from prune_mm.graph.shadow import ShadowTracer
from prune_mm.graph.tensors import tensors_in, varies
from prune_mm.structures.slots import Role


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "miopen_batch_norm")  # fmt: skip
def batch_norm(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """The ids go through; scale, shift and running statistics are slots."""
    x, output = args[0], tensors_in(result)[0]
    shadow = tracer.shadow(x)
    ids = channel_ids(shadow.ids, 1)
    # Without running statistics their arguments are missing, and flags follow.
    given = [t if isinstance(t, Tensor) and t.numel() else None for t in args[1:5]]
    names = [tracer.name_of(t) for t in given]
    if ids is None or any(t is not None and name is None for t, name in zip(given, names)):
        for tensor in filter(lambda t: t is not None, given):
            tracer.lose(tracer.names_behind(tensor), "its parameters are computed on the fly")
        give_up(tracer, (x, *args[1:3]), result, "is normalised with computed parameters")
        return
    roles: tuple[Role, ...] = ("scale", "shift", "mean", "var")
    for name, role in zip(names, roles):
        if name:
            _norm_slot(tracer, name, ids, role)
    tracer.set_shadow(output, Shadow(shadow.ids, names[0] is not None, shadow.depth))


def _norm_slot(tracer: ShadowTracer, name: str, ids: Tensor, role: Role) -> None:
    """A norm used twice unites the channels of both uses."""
    slot = tracer.slot(name, 0)
    if slot is None:
        tracer.add_slot(name, 0, ids, role)
        return
    if not bool((slot.ids == ids).all()):
        tracer.record.reused.add(name)
    tracer.unite(slot.ids, ids)
    for some, other in ((slot.ids, ids), (ids, slot.ids)):
        tracer.freeze(some[other == 0], "passes a norm that constant channels pass elsewhere")


@rule("native_group_norm", "group_norm")
def group_norm(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """As batch norm; its statistics count dead channels, so they must be exactly zero on the way in."""
    x, weight, bias = args[:3]
    output = tensors_in(result)[0]
    shadow = tracer.shadow(x)
    ids = channel_ids(shadow.ids, 1)
    name, bias_name = tracer.name_of(weight), tracer.name_of(bias)
    owner = None if name is None else name.rpartition(".")[0]
    if ids is None or not _is_group_norm(tracer, owner) or (bias is not None and bias_name is None):
        tracer.lose(filter(None, (name, bias_name)), "is not the affine parameter of a GroupNorm module")
        give_up(tracer, (x,), result, "is normalised by a group norm without affine parameters of its own")
        return
    if not shadow.zero:
        tracer.freeze(shadow.ids, "is normalised by a group norm while dead channels are not zero there")
    _norm_slot(tracer, name, ids, "scale")
    if bias_name:
        _norm_slot(tracer, bias_name, ids, "shift")
    tracer.set_shadow(output, Shadow(shadow.ids, True, shadow.depth))


def _is_group_norm(tracer: ShadowTracer, owner: str | None) -> bool:
    """Whether the compact form of group norm can take the module's place."""
    if owner is None:
        return False
    module = tracer.module.get_submodule(owner)
    return isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward


@rule("native_layer_norm", "layer_norm")
def layer_norm(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """A norm over the channel axis mixes all channels: they must stay."""
    x, sizes = args[0], args[1]
    shadow = tracer.shadow(x)
    if any(varies(shadow.ids, x.ndim - 1 - d) for d in range(len(sizes))):
        give_up(tracer, (args, kwargs), result, "is normalised over all channels (layer norm)")
        return
    tracer.set_shadow(tensors_in(result)[0], Shadow(shadow.ids, False, shadow.depth))
