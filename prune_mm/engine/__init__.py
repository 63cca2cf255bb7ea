"""Pruning inside MMEngine: model builders and hooks."""

from prune_mm.compat.train_iterator import start_workers_late
from prune_mm.engine.compact import compact_model
from prune_mm.engine.dataloaders import install_loader_types
from prune_mm.engine.distillation import DistillationHook
from prune_mm.engine.hook import PruningHook
from prune_mm.engine.prunable import prunable_model
from prune_mm.engine.reading import guard_mmengine
from prune_mm.engine.recalibrate import RecalibrateBN
from prune_mm.engine.safety import SafetyHook, add_safety
from prune_mm.engine.stopwatch import StopwatchHook

__all__ = [
    "DistillationHook",
    "PruningHook",
    "RecalibrateBN",
    "SafetyHook",
    "StopwatchHook",
    "add_safety",
    "compact_model",
    "prunable_model",
]

install_loader_types()
guard_mmengine()
start_workers_late()
