"""Pruning inside MMEngine: model builders and hooks."""

from prune_mm.engine.compact import compact_model
from prune_mm.engine.distillation import DistillationHook
from prune_mm.engine.hook import PruningHook
from prune_mm.engine.prunable import prunable_model

__all__ = ["DistillationHook", "PruningHook", "compact_model", "prunable_model"]
