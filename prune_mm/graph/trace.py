"""Entry point: trace a module into a verified :class:`~prune_mm.graph.groups.ChannelGraph`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prune_mm.graph.build import build_groups
from prune_mm.graph.grouping import check_grouping
from prune_mm.graph.groups import ChannelGraph
from prune_mm.graph.shadow import ShadowTracer
from prune_mm.graph.tensors import tensors_in, tensors_of
from prune_mm.graph.verify import drop_shortcuts_that_fail, freeze_what_fails


def trace(module: nn.Module, example_inputs: Any, verify: bool = True, grouping: bool = False) -> ChannelGraph:
    """Find out which channels of ``module`` are tied to which.

    The module runs once, in eval mode without gradients, on ``example_inputs``; frozen parameters and stages are
    traced like any other. What it returns is the boundary: channels that reach an output stay. Then a copy with
    random weights is cut at random, and groups whose cut form does not compute what the masked form computes are
    frozen (code with hard-coded widths).

    Args:
        module: any module; it is not changed.
        example_inputs: one tensor, or a tuple of positional arguments. A small input is enough.
        verify: cut a copy and compare. Turn it off only to look at what tracing alone finds.
        grouping: also find out which convolutions can be divided into groups.

    Returns:
        The channel graph; printing it shows what is tied, and what is frozen and why.

    Raises:
        TypeError: if ``example_inputs`` or what the module returns holds no tensor.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not tensors_in(inputs):
        raise TypeError(f"example_inputs must hold a tensor, got {type(example_inputs).__name__}")
    with in_eval_mode(module), torch.no_grad():
        tracer = ShadowTracer(module)
        for tensor in tensors_in(inputs):
            tracer.add_input(tensor)
        with tracer.names_on_stack(), tracer:
            outputs = module(*inputs)
        returned = tensors_of(outputs)
        if not returned:
            raise TypeError(f"the module must return tensors, got {type(outputs).__name__}")
        for tensor in returned:
            shadow = tracer.shadow(tensor)
            if shadow is not None:
                tracer.freeze(shadow.ids, "output of the traced scope")
    weights = {name: tuple(module.get_parameter(name).shape) for name in tracer.record.positions}
    graph = build_groups(tracer.record, weights)
    graph.unprunable, graph.inputs = _left_out(tracer, graph), inputs
    if verify:
        freeze_what_fails(module, inputs, graph)
        drop_shortcuts_that_fail(module, inputs, graph)
    if grouping:
        check_grouping(module, inputs, graph)
    return graph


def _left_out(tracer: ShadowTracer, graph: ChannelGraph) -> dict[str, str]:
    """Every layer with a weight matrix that is in no group, with the reason."""
    inside = {slot.tensor for group in graph.groups for slot in group.slots}
    reasons = {}
    for name, parameter in tracer.module.named_parameters(remove_duplicate=False):
        tied = tracer.tied_to(name, parameter)
        # A vector in the shape of a matrix is a layer scale, unless it is the weight of a layer with one channel.
        is_matrix = parameter.ndim >= 2 and (parameter.numel() > max(parameter.shape) or name.endswith("weight"))
        if not is_matrix or name in inside or (tied is None and tracer.first_name(parameter) != name):
            continue
        if tied is not None:
            reason = f"its weight is tied to '{tied}'"
        elif not tracer.was_used(parameter):
            reason = "not used in the traced call"
        elif tracer.slot(name, 0) is not None:
            reason = "no layer before it makes the channels it works on"
        else:
            reason = tracer.record.lost.get(name, "not the weight of a convolution or linear layer")
        reasons[name.removesuffix(".weight")] = reason
    return reasons


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Set every module's ``training`` flag off and back on, without calling ``train()``.

    OpenMMLab backbones override ``train`` (it returns None and freezes stages again).
    """
    flags = {child: child.training for child in module.modules()}
    for child in flags:
        child.training = False
    try:
        yield
    finally:
        for child, flag in flags.items():
            child.training = flag
