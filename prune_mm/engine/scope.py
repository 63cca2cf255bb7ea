"""Finding the part of a model that is pruned, and inputs to trace it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prune_mm.analysis.complexity import layer_positions
from prune_mm.graph import ChannelGraph, trace
from prune_mm.graph.trace import in_eval_mode

#: Sides of the square images tried for tracing. Small is fast; some networks need more.
_TRACE_SIZES = (64, 96, 128, 224, 320, 512)


def get_scope(model: nn.Module, scope: str) -> nn.Module:
    """The submodule ``scope`` of ``model``; empty: the model itself (a classifier with its head).

    Raises:
        ValueError: when it names no module, with the names there are.
    """
    # The forward of a whole detector returns what its heads compute, which must keep its shape but is no boundary.
    if scope or not any(hasattr(model, head) for head in ("roi_head", "rpn_head", "bbox_head", "mask_head")):
        try:
            return model.get_submodule(scope)
        except AttributeError:
            pass
    names = ", ".join(name for name, _ in model.named_children() if name not in ("data_preprocessor", "pruner"))
    raise ValueError(f"scope={scope!r} names no module of {type(model).__name__}; there are: {names}")


def trace_scope(
    model: nn.Module, scope: str, input_size: tuple[int, int] | None = None, grouping: bool = False
) -> ChannelGraph:
    """Trace the scope on the smallest image its code accepts, or on one of ``input_size`` when it takes no other.

    Args:
        model: the dense model.
        scope: dotted name of the submodule.
        input_size: height and width in pixels of its real images.
        grouping: also find out which convolutions can be divided into groups.

    Raises:
        ValueError: when no image size works, with the last error.
    """
    module, error = get_scope(model, scope), None
    for size in [*((side, side) for side in _TRACE_SIZES), *([input_size] if input_size else [])]:
        try:
            return trace(module, scope_inputs(model, scope, size), grouping=grouping)
        except (RuntimeError, AssertionError, IndexError) as failure:
            error = failure
    raise ValueError(f"scope={scope!r} cannot be run on an image: {error}") from error


def scope_positions(model: nn.Module, scope: str, input_size: tuple[int, int]) -> dict[str, int]:
    """Output positions of every conv and linear weight of the scope, for one image of ``(height, width)``."""
    return layer_positions(get_scope(model, scope), scope_inputs(model, scope, input_size))


def scope_inputs(model: nn.Module, scope: str, size: tuple[int, int]) -> tuple[Any, ...]:
    """Positional arguments the scope gets when the model extracts features of one random image.

    Args:
        model: a detector or classifier with ``extract_feat``, or a plain module.
        scope: dotted name of the submodule.
        size: height and width of the image in pixels.

    Raises:
        ValueError: when extracting features does not run the scope.
    """
    module = get_scope(model, scope)
    parameter = next(module.parameters(), torch.empty(0))
    channels = getattr(module, "in_channels", 3)
    channels = channels if isinstance(channels, int) and channels in (1, 3, 4) else 3
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels, *size, generator=generator).to(parameter.device)
    if scope in ("", "backbone") or not hasattr(model, "extract_feat"):
        return (image,)
    seen: list[tuple[Any, ...]] = []

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args)

    handle = module.register_forward_pre_hook(look)
    try:
        with in_eval_mode(model), torch.no_grad():
            model.extract_feat(image)
    finally:
        handle.remove()
    if not seen or not _has_tensor(seen[0]):
        raise ValueError(f"scope={scope!r} is not run when {type(model).__name__} extracts features; try 'backbone'")
    return seen[0]


def _has_tensor(args: Any) -> bool:
    return any(isinstance(a, Tensor) or (isinstance(a, (list, tuple)) and _has_tensor(a)) for a in args)
