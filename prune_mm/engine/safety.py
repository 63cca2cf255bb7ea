"""SafetyHook: a training that breaks loses nothing that was saved before."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from prune_mm.engine.checkpointing import make_checkpoints_safe
from prune_mm.engine.failures import LossWatch, check_finite, name_samples
from prune_mm.engine.prunable import unwrapped
from prune_mm.registry import HOOKS


@HOOKS.register_module()
class SafetyHook(Hook):
    """Stops a training that breaks down, with one line that says why, before a good checkpoint is replaced.

    ``tools/train.py`` and :class:`~prune_mm.engine.hook.PruningHook` add it by themselves.
    """

    # Before CheckpointHook (VERY_LOW).
    priority = "BELOW_NORMAL"

    def __init__(self) -> None:
        """Nothing broken was seen yet."""
        self._losses = LossWatch()

    def before_run(self, runner: Runner) -> None:
        """Old checkpoints stay until the next is whole."""
        make_checkpoints_safe(runner)

    def before_train(self, runner: Runner) -> None:
        """Samples that cannot be read are named."""
        name_samples(getattr(runner.train_dataloader, "dataset", None))

    def before_val(self, runner: Runner) -> None:
        """As in training."""
        name_samples(getattr(runner.val_dataloader, "dataset", None))

    def before_test(self, runner: Runner) -> None:
        """As in training."""
        name_samples(getattr(runner.test_dataloader, "dataset", None))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Losses must be numbers."""
        self._losses.check(runner, outputs)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Weights must be numbers; buffers may hold infinities on purpose."""
        names = {name for name, _ in unwrapped(runner.model).named_parameters()}
        state = checkpoint.get("state_dict", {})
        check_finite(((name, state[name]) for name in names if name in state), "saving them over good ones")


def add_safety(runner: Runner) -> None:
    """Register the hook, once."""
    if not any(isinstance(hook, SafetyHook) for hook in runner.hooks):
        runner.register_hook(SafetyHook())
