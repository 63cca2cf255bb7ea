"""Configs of the stages around pruning: of the dense model before it, of the compact model behind it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from prune_mm.engine.compact import without_pretrained

#: Settings of a training that are not those of a model made by it.
_OF_PRUNING = ("work_dir", "finetune", "pretrain", "launcher", "teacher")


def dense_config(config: Config) -> Config:
    """The training config as a config of the dense model: resolved, and without pruning."""
    resolved = copy.deepcopy(config)
    resolved.model = copy.deepcopy(config.model.model)
    resolved.custom_hooks = _other_hooks(config)
    for key in _OF_PRUNING:
        resolved.pop(key, None)
    return resolved


def compact_config(config: Config) -> Config:
    """The training config as a config of the compact model: resolved, and without the search."""
    resolved = copy.deepcopy(config)
    dense = without_pretrained(config.model.model)
    resolved.model = {
        "type": "prune_mm.CompactModel",
        "model": dense,
        "checkpoint": "{{ fileDirname }}/compact.pth",
        "backbone": {},
    }
    resolved.custom_hooks = _other_hooks(config)
    imports = config.get("custom_imports") or {"imports": []}
    names = imports["imports"] if isinstance(imports["imports"], (list, tuple)) else [imports["imports"]]
    resolved.custom_imports = {"imports": list(dict.fromkeys([*names, "prune_mm"])), "allow_failed_imports": False}
    resolved.load_from, resolved.resume = None, False
    for key in _OF_PRUNING:
        resolved.pop(key, None)
    return resolved


def finetune_config(config: Config, artifact: Path, checkpoints: Mapping[str, str | None]) -> Config:
    """The config that trains a compact model further, as ``finetune`` in the training config wants it.

    A ``teacher`` of the training teaches on, unless ``finetune`` brings a ``DistillationHook`` of its own.

    Args:
        config: of the training that pruned.
        artifact: folder of the compact model.
        checkpoints: see :func:`filled`.
    """
    stage = compact_config(config)
    stage.model.checkpoint = str(artifact / "compact.pth")
    if config.get("teacher") and "DistillationHook" not in str(config.finetune):
        stage.teacher = filled(config.teacher.to_dict(), checkpoints)
    stage.merge_from_dict(filled(config.finetune.to_dict(), checkpoints))
    return stage


def filled(node: Any, checkpoints: Mapping[str, str | None]) -> Any:
    """A copy of settings in which ``{{name}}`` is the path that ``checkpoints`` has for the name."""
    if isinstance(node, dict):
        return {key: filled(value, checkpoints) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(filled(value, checkpoints) for value in node)
    if isinstance(node, str):
        for name, path in checkpoints.items():
            node = node.replace("{{" + name + "}}", str(path))
    return node


def _other_hooks(config: Config) -> list:
    """Hooks that have nothing to do with pruning, or with files outside an artifact."""
    ours = ("PruningHook", "DistillationHook", "RecalibrateBN")
    return [hook for hook in config.get("custom_hooks") or [] if str(hook.get("type")).rpartition(".")[2] not in ours]
