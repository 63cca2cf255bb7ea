"""Hooks that set ranks at odds, for configs of test runs: ``custom_imports=['rank_saboteurs']``."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from saboteurs import die
from torch.distributed.distributed_c10d import _set_pg_timeout

from prune_mm.engine import hook


def own_pruner(runner):
    """The pruner of this rank."""
    return getattr(runner.model, "module", runner.model).pruner


@HOOKS.register_module()
class SlowDecision(Hook):
    """Let rank 0 think for longer than the process group waits."""

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            _set_pg_timeout(timedelta(seconds=2))
            original = own_pruner(runner).decide

            def decide(*args, **kwargs):
                time.sleep(4)
                return original(*args, **kwargs)

            own_pruner(runner).decide = decide

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        _set_pg_timeout(timedelta(minutes=10))


@HOOKS.register_module()
class KillInDecision(Hook):
    """Let rank 0 die while it decides."""

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            own_pruner(runner).decide = lambda *args, **kwargs: die()


@HOOKS.register_module()
class ChangeOnOneRank(Hook):
    """Multiply a number of the pruner, or a weight, on rank 1 after every step.

    Args:
        name: dotted name in the model.
        factor: 1 changes nothing.
    """

    def __init__(self, name: str, factor: float) -> None:
        self.name, self.factor = name, factor

    # Before PruningHook (BELOW_NORMAL), which compares.
    priority = "HIGH"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if dist.get_rank() == 1:
            state = getattr(runner.model, "module", runner.model).state_dict()
            state[self.name].mul_(self.factor)


@HOOKS.register_module()
class NoteFeatures(Hook):
    """Write down how many batches this rank looks at for a decision, and what the decision is made from."""

    priority = "VERY_HIGH"

    def before_train(self, runner):
        collect, decide, rank = hook.collect_spatial_information, own_pruner(runner).decide, dist.get_rank()

        def collected(model, loader, batches):
            own = collect(model, loader, batches)
            torch.save({"batches": batches, "own": own}, f"{runner.work_dir}/features_{rank}.pt")
            return own

        def decided(module, step, features):
            torch.save(features, f"{runner.work_dir}/features.pt")
            return decide(module, step, features)

        hook.collect_spatial_information, own_pruner(runner).decide = collected, decided
