"""PrunableModel: the dense model, with a pruner attached as its child."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from prune_mm.compat import fix_ssd_head
from prune_mm.engine.scope import get_scope, scope_positions, trace_scope
from prune_mm.pruners import Pruner
from prune_mm.pruners.sequence import PrunerSequence
from prune_mm.registry import MODELS, PRUNERS
from prune_mm.structures.plan import compact_stage


@MODELS.register_module(name="PrunableModel")
def prunable_model(
    model: dict | nn.Module,
    pruner: dict | Pruner | Sequence[dict | Pruner],
    scope: str = "backbone",
    input_size: int | Sequence[int] = 224,
    data_preprocessor: dict | None = None,
) -> nn.Module:
    """Build the dense model and attach a pruner to it.

    The result *is* the dense model (a ``MaskRCNN``, an ``ImageClassifier``): same class, same parameter names, plus a
    child ``pruner`` whose buffers travel in checkpoints as ``pruner.*``.

    Args:
        model: config of the dense model (or a built one).
        pruner: config of the pruning method, e.g. ``dict(type='CHEX', target=dict(macs=0.5))``; or a list of several
            that apply in order, see :class:`~prune_mm.pruners.sequence.PrunerSequence`.
        scope: dotted name of the submodule that is pruned. What it outputs keeps its shape.
        input_size: side, or (height, width), in pixels of the image that MACs are counted for.
        data_preprocessor: the ``data_preprocessor`` at the top of a config, which MMEngine hands to the model.

    Raises:
        ValueError: naming the option, its value and what would be right; before anything is trained.
    """
    dense = MMENGINE_MODELS.build(with_preprocessor(model, data_preprocessor)) if isinstance(model, dict) else model
    fix_ssd_head()
    if hasattr(dense, "pruner"):
        raise ValueError(f"{type(dense).__name__} already has a child 'pruner'; wrap a model once")
    built = build_pruner(pruner)
    module = get_scope(dense, scope)
    graph = trace_scope(dense, scope, image_size(input_size), grouping=built.regroups)
    attached = built.attach(module, graph)
    if attached:
        compact_stage(module, attached)
        graph = trace_scope(dense, scope, image_size(input_size), grouping=built.regroups)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    built.prepare(module, graph, shapes, scope_positions(dense, scope, image_size(input_size)))
    dense.add_module("pruner", built)
    dense.prune_scope, dense.prune_input_size = scope, image_size(input_size)
    dense.prune_attached = tuple(attached)
    _keep_out_of_ddp(dense)
    return dense


def with_preprocessor(model: dict, data_preprocessor: dict | None) -> dict:
    """The config of a dense model with the ``data_preprocessor`` of the whole config, unless it has its own."""
    return model if data_preprocessor is None else {"data_preprocessor": data_preprocessor, **model}


def build_pruner(config: dict | Pruner | Sequence[dict | Pruner]) -> Pruner:
    """Build a pruner from its config, or several from a list.

    Raises:
        ValueError: for an unknown method or an unknown option, with those there are.
    """
    if isinstance(config, Pruner):
        return config
    if isinstance(config, (list, tuple)) and config:
        built = [build_pruner(item) for item in config]
        return built[0] if len(built) == 1 else PrunerSequence(built)
    if not isinstance(config, dict) or "type" not in config:
        raise ValueError(f"pruner must be a dict with a 'type', or a list of them, got {config!r}")
    kind = str(config["type"]).rpartition(".")[2]
    cls = PRUNERS.get(kind)
    if cls is None:
        raise ValueError(f"unknown pruner {kind!r}; there are: {', '.join(sorted(PRUNERS.module_dict))}")
    options = {key: value for key, value in config.items() if key != "type"}
    known = [name for name in inspect.signature(cls).parameters if name != "kwargs"]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"{kind} has no option {unknown[0]!r}; there are: {', '.join(known)}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from error


def image_size(size: int | Sequence[int]) -> tuple[int, int]:
    """``(height, width)`` from a side or a pair.

    Raises:
        ValueError: for anything else.
    """
    pair = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"input_size={size!r} must be a side or (height, width) in pixels")
    return pair


def _keep_out_of_ddp(model: nn.Module) -> None:
    """DDP must neither broadcast the pruner's buffers at every forward nor average them: the engine syncs decisions."""
    with contextlib.suppress(AttributeError):
        known = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
        model._ddp_params_and_buffers_to_ignore = known + [f"pruner.{name}" for name, _ in model.pruner.named_buffers()]


def unwrapped(model: Any) -> nn.Module:
    """The model inside a DDP (or other) wrapper."""
    return getattr(model, "module", model) if not hasattr(model, "pruner") else model


def pruned_module(model: nn.Module) -> nn.Module:
    """The scope of a prunable model.

    Raises:
        ValueError: when the model has no pruner.
    """
    if not isinstance(getattr(model, "pruner", None), Pruner):
        raise ValueError(f"{type(model).__name__} has no pruner; its config needs type='prune_mm.PrunableModel'")
    return get_scope(model, model.prune_scope)
