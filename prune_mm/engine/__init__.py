"""Pruning inside MMEngine: model builders and hooks."""

from prune_mm.engine.compact import compact_model
from prune_mm.engine.hook import PruningHook
from prune_mm.engine.prunable import prunable_model

__all__ = ["PruningHook", "compact_model", "prunable_model"]
