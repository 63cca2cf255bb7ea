"""Layers with weights: fresh ids for what they produce, a slot for every axis of their parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prune_mm.graph.record import Shadow
from prune_mm.graph.rules.table import give_up, read_channels, rule
from prune_mm.graph.shadow import ShadowTracer
from prune_mm.graph.tensors import varies

_ON_THE_FLY = "is read by a layer whose weight is computed on the fly"


@dataclass(frozen=True)
class _Conv:
    """One call of a convolution."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    groups: int
    transposed: bool
    result: Tensor

    @property
    def positions(self) -> int:
        """At how many positions the kernel is applied."""
        return (self.x if self.transposed else self.result)[0, 0].numel() * self.x.shape[0]


@rule("convolution", "_convolution", makes_channels=True)
def convolution(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
    """Fresh ids for what it produces; input columns, output rows and bias are slots."""
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    _conv_layer(tracer, _Conv(x, weight, bias, groups, transposed, result))


@rule("deform_conv2d", makes_channels=True)
def deformable_convolution(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
    """Torchvision's deformable convolution: as a convolution; offsets and masks have a fixed layout."""
    x, weight, offset, mask, bias = args[:5]
    groups, offset_groups = args[11], args[12]
    for steering in (offset, mask):
        shadow = tracer.shadow(steering)
        if shadow is not None:
            tracer.freeze(shadow.ids, "steers a deformable convolution")
    shadow = tracer.shadow(x)
    if offset_groups > 1 and shadow is not None:
        tracer.freeze(shadow.ids, "is read by a deformable convolution with several offset groups")
    _conv_layer(tracer, _Conv(x, weight, bias, groups, False, result))


def _conv_layer(tracer: ShadowTracer, conv: _Conv) -> None:
    name, bias_name = tracer.name_of(conv.weight), tracer.name_of(conv.bias)
    # mmcv hands an empty or a zero bias to deformable convolutions without one.
    has_bias = conv.bias is not None and conv.bias.numel() > 0 and (bias_name is not None or bool(conv.bias.any()))
    if name is None or (has_bias and bias_name is None):
        _lose_layer(tracer, (conv.weight, conv.bias), "its weight is computed on the fly")
        give_up(tracer, (conv.x, conv.weight), conv.result, _ON_THE_FLY)
        return
    tracer.record.positions[name] = tracer.record.positions.get(name, 0) + conv.positions
    ids_in, shadow = read_channels(tracer, conv.x, 1, "convolution")
    depth = tracer.depth(conv.x) + 1
    ids_out = _output_ids(tracer, name, ids_in, conv.result.shape[1], depth, shadow)
    if conv.groups > 1 and conv.x.shape[1] == conv.groups:
        _depthwise_slots(tracer, name, conv, ids_in, ids_out)
    else:
        _dense_slots(tracer, name, conv, ids_in, ids_out)
    if bias_name:
        tracer.add_slot(bias_name, 0, ids_out, "bias")
    ids = ids_out.view(1, -1, *([1] * (conv.result.ndim - 2))).expand(conv.result.shape)
    tracer.set_shadow(conv.result, Shadow(ids, True, depth))


def _dense_slots(tracer: ShadowTracer, name: str, conv: _Conv, ids_in: Tensor, ids_out: Tensor) -> None:
    rows, columns = (1, 0) if conv.transposed else (0, 1)
    if conv.groups > 1:
        _tie_groups(tracer, ids_in, conv.groups)
        _tie_groups(tracer, ids_out, conv.groups)
    if conv.groups > 1 and conv.transposed:
        for ids in (ids_in, ids_out):
            tracer.freeze(ids, "belongs to a transposed convolution with groups")
        tracer.add_slot(name, rows, ids_out[: len(ids_out) // conv.groups], "out")
        tracer.add_slot(name, columns, ids_in, "in")
        return
    tracer.add_slot(name, rows, ids_out, "out")
    tracer.add_slot(name, columns, ids_in[: len(ids_in) // conv.groups], "in")


def _depthwise_slots(tracer: ShadowTracer, name: str, conv: _Conv, ids_in: Tensor, ids_out: Tensor) -> None:
    per_group = len(ids_out) // conv.groups
    inputs = ids_in.repeat_interleave(per_group)
    tracer.record.reads.append(ids_in)
    tracer.unite(ids_out, inputs)
    tracer.freeze(ids_out[inputs == 0], "is made by a depthwise convolution over constant channels")
    if conv.transposed and per_group > 1:
        tracer.freeze(ids_out, "is made by a depthwise transposed convolution with a multiplier")
    tracer.add_slot(name, 0, ids_in if conv.transposed else ids_out, "depthwise")


def _output_ids(
    tracer: ShadowTracer, name: str, ids_in: Tensor, count: int, depth: int, shadow: Shadow | None
) -> Tensor:
    """Output ids of a weight: fresh at its first use, the same (and inputs united) at later uses."""
    used = tracer.layer_ids(name)
    if used is None:
        reads_input = shadow is not None and shadow.depth == 0
        ids_out = tracer.fresh(count, layer=name, depth=depth, reads_input=reads_input)
        tracer.remember_layer(name, ids_in, ids_out)
        return ids_out
    before, ids_out = used
    tracer.unite(before, ids_in)
    for some, other in ((before, ids_in), (ids_in, before)):
        tracer.freeze(some[other == 0], "is read by a layer that elsewhere reads constant channels")
    return ids_out


def _tie_groups(tracer: ShadowTracer, ids: Tensor, groups: int) -> None:
    """The same offset in every group lives or dies together, so that groups stay equally wide."""
    table = ids.view(groups, -1)
    tracer.unite(table, table[:1])
    if bool((table == 0).any()):
        tracer.freeze(ids, "is read by a grouped convolution over constant channels")


def _lose_layer(tracer: ShadowTracer, tensors: tuple, reason: str) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            tracer.lose(tracer.names_behind(tensor), reason)


@rule("addmm", "mm", "linear", makes_channels=True)
def linear(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
    """``x @ W.T (+ b)``: fresh ids for the outputs; ids that vary along the rows of x pass through."""
    is_linear = func._schema.name.endswith("linear")
    if len(args) >= 3:
        bias, x, weight = (args[2], args[0], args[1]) if is_linear else args[:3]
    else:
        bias, x, weight = None, args[0], args[1]
    name = tracer.name_of(weight) if is_linear else tracer.name_of_transposed(weight)
    bias_name = tracer.name_of(bias)
    if name is None or (bias is not None and bias_name is None):
        _lose_layer(tracer, (x, weight, bias), "its weight is computed on the fly, or read from a part of a tensor")
        give_up(tracer, (args, kwargs), result, "takes part in a product of two activations or a computed weight")
        return
    rows = x.numel() // x.shape[-1]
    tracer.record.positions[name] = tracer.record.positions.get(name, 0) + rows
    shadow = tracer.shadow(x)
    if shadow is not None and not varies(shadow.ids, x.ndim - 1) and any(varies(shadow.ids, d) for d in range(x.ndim)):
        _mixes_positions(tracer, (name, bias_name), shadow, result)
        return
    ids_in, shadow = read_channels(tracer, x, x.ndim - 1, "linear layer")
    depth = tracer.depth(x) + 1
    ids_out = _output_ids(tracer, name, ids_in, result.shape[-1], depth, shadow)
    tracer.add_slot(name, 0, ids_out, "out")
    tracer.add_slot(name, 1, ids_in, "in")
    if bias_name:
        tracer.add_slot(bias_name, 0, ids_out, "bias")
    tracer.set_shadow(result, Shadow(ids_out.expand(result.shape), True, depth))


def _mixes_positions(tracer: ShadowTracer, names: tuple, shadow: Shadow, result: Tensor) -> None:
    """A linear layer along another axis than the channels: they go through, each on its own."""
    tracer.lose(filter(None, names), "it mixes positions, not channels")
    ids = shadow.ids.narrow(-1, 0, 1).expand(result.shape)
    tracer.set_shadow(result, Shadow(ids, shadow.zero and names[1] is None, shadow.depth + 1))


@rule("bmm", "baddbmm", "matmul", "_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention",
      "_scaled_dot_product_attention_math", "_scaled_dot_product_efficient_attention", reads_all=True)  # fmt: skip
def product(tracer: ShadowTracer, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Attention and other products of activations contract channels in ways no slot describes."""
    _lose_layer(tracer, args, "it takes part in a product of two activations")
    give_up(tracer, (args, kwargs), result, "takes part in a product of two activations (attention)")
