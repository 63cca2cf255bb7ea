"""PruningHook: lets the pruner live in an MMEngine run."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from prune_mm.engine.agreement import Decided, check_agreement, decided_on_rank_0, time_of_decision
from prune_mm.engine.checkpoint import check_checkpoint, fitting, strip_pruner
from prune_mm.engine.distillation import add_teacher
from prune_mm.engine.failures import check_finite
from prune_mm.engine.features import collect_spatial_information
from prune_mm.engine.prunable import pruned_module, unwrapped
from prune_mm.engine.randomness import make_reproducible, seed_everything
from prune_mm.engine.safety import add_safety
from prune_mm.engine.training_options import check_resumed_length, check_runner
from prune_mm.pruners import Decision, Pruner
from prune_mm.pruners.options import check_flag, check_integer
from prune_mm.registry import HOOKS


@HOOKS.register_module()
class PruningHook(Hook):
    """Calls the pruner at the right moments, and keeps masks true under EMA, AMP, accumulation and resume.

    Args:
        reproducible: seed every sample and every iteration by its number, so that a resumed run takes the same
            decisions as an uninterrupted one.
        image_interval: let the pruner show its state to the visualizer after every so many updates and after the
            last one (StrucSpars: ordered kernel norms beside the regulariser, a picture per layer); 0: never.

    Raises:
        ValueError: naming the argument and what would be right.
    """

    # After EMAHook (NORMAL), whose averages are masked; before CheckpointHook (VERY_LOW), which saves them.
    priority = "BELOW_NORMAL"

    def __init__(self, reproducible: bool = True, image_interval: int = 0) -> None:
        """See the class."""
        check_flag("reproducible", reproducible)
        check_integer("image_interval", image_interval, 0)
        self.reproducible, self.image_interval = reproducible, image_interval
        self._optimizer_hooks: list[Any] = []
        # Counting live channels waits for the device, so it is done when decisions change, not every iteration.
        self._status: dict[str, float] = {}

    # -- before anything is trained -------------------------------------------------------------------------------

    def before_run(self, runner: Runner) -> None:
        """Check the schedule against the length of the training."""
        check_runner(runner)
        add_safety(runner)
        add_teacher(runner, self.priority)
        model = unwrapped(runner.model)
        pruned_module(model)
        # In a test run the training loop stays a config, and building it would load the training data.
        if not isinstance(runner._train_loop, BaseLoop):
            return
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        self.pruner(runner).set_schedule(runner.max_epochs if by_epoch else None, runner.max_iters)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse checkpoints of other architectures before they are half loaded."""
        model = unwrapped(runner.model)
        check_checkpoint(model, checkpoint, runner._load_from or "the checkpoint", whole=runner._resume)
        if not runner._resume and isinstance(runner._train_loop, BaseLoop):
            removed = strip_pruner(checkpoint)
            if removed:
                print_log("the checkpoint holds pruning decisions; a new run starts its own exploration", "current")

    def before_train(self, runner: Runner) -> None:
        """Start the pruner on the loaded weights, or go on where a resumed run stopped."""
        pruner, module = self.pruner(runner), pruned_module(unwrapped(runner.model))
        if not bool(pruner.started):
            decided = decided_on_rank_0(pruner, module, None, lambda _: pruner.start(module))
            self._commit(runner, decided, step=0)
            pruner.started.fill_(True)
            print_log(f"{pruner.label} starts: {time_of_decision(decided)}", "current")
        else:
            check_resumed_length(runner, pruner.by_epoch)
            with fitting(f"'{runner._load_from}'"):
                pruner.mask(module)
            check_agreement(pruner, module, step=int(pruner.last_update))
            self._status = pruner.status() | pruner.figures()
            if pruner.wants_stop():
                _end_training(runner, runner.epoch, runner.iter)
        self._sync_averages(runner)
        self._mask_averages(runner)
        self._watch_optimizer(runner, pruner, module)
        if self.reproducible:
            sampler = (runner.cfg.get("train_dataloader") or {}).get("sampler") or {}
            make_reproducible(runner.train_dataloader, self._seed(runner), runner._resume and "seed" not in sampler)
        self._log(runner)
        for name, reason in getattr(pruner, "left_dense", {}).items():
            print_log(f"{name} stays dense: {reason}", "current")
        aim = getattr(pruner, "target", None) or "what it was given"
        print_log(f"{pruner.label} prunes to {aim}: {self._summary(runner)}", "current")

    # -- while training ---------------------------------------------------------------------------------------

    def before_train_epoch(self, runner: Runner) -> None:
        """Update by epoch."""
        if self.pruner(runner).by_epoch:
            self._update_if_due(runner, runner.epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Update by iteration, and seed the iteration."""
        pruner = self.pruner(runner)
        if not pruner.by_epoch and not pruner.decides_after:
            self._update_if_due(runner, runner.iter)
        if self.reproducible:
            seed_everything(self._seed(runner), 2, runner.iter, runner.rank)
        self._log(runner)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Mask the averaged models, whose averages mix channels that lived at different times."""
        if self.pruner(runner).decides_after:
            self._update_if_due(runner, runner.iter + 1)
            if self.pruner(runner).wants_stop():
                _end_training(runner, runner.epoch + 1, runner.iter + 1)
        self._mask_averages(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note in the checkpoint what it is, for the export and for people."""
        model = unwrapped(runner.model)
        # EMAHook has put the average into the checkpoint, and may have averaged its copy of the pruner's values.
        self._sync_averages(runner)
        checkpoint.setdefault("meta", {})["prune_mm"] = {
            "scope": model.prune_scope,
            "pruner": model.pruner.label,
            **{key: float(value) for key, value in model.pruner.status().items()},
        }

    def after_train(self, runner: Runner) -> None:
        """Finish, and say that what was saved is still of dense size."""
        pruner, module = self.pruner(runner), pruned_module(unwrapped(runner.model))
        pruner.finish(module)
        for handle in self._optimizer_hooks:
            handle.remove()
        self._optimizer_hooks.clear()
        print_log(
            f"{self._summary(runner)}; checkpoints hold masks at dense size: run tools/export.py for the small model",
            "current",
        )

    # -- parts ------------------------------------------------------------------------------------------------

    @staticmethod
    def pruner(runner: Runner) -> Pruner:
        """The pruner of the run."""
        return unwrapped(runner.model).pruner

    def _update_if_due(self, runner: Runner, step: int) -> None:
        pruner, model = self.pruner(runner), unwrapped(runner.model)
        if not pruner.due(step) or int(pruner.last_update) == step:
            return
        module = pruned_module(model)
        decided = decided_on_rank_0(
            pruner, module, step, lambda found: self._decide(model, step, found), lambda: self._features(runner, model)
        )
        self._commit(runner, decided, step)
        pruner.updates += 1
        pruner.last_update.fill_(step)
        self._sync_averages(runner)
        for average in self._averages(runner):
            pruner.settle(pruned_module(average), decided.decision)
        name, took = f"{pruner.label} update {int(pruner.updates)}", time_of_decision(decided)
        print_log(f"{name} at step {step}: {self._summary(runner)}; {took}", "current")
        if self.image_interval and (int(pruner.updates) % self.image_interval == 0 or step == runner.max_iters):
            for name, image in pruner.images(module):
                runner.visualizer.add_image(name, image, step)

    @staticmethod
    def _decide(model: nn.Module, step: int, features: dict[str, Tensor] | None) -> Decision:
        module = pruned_module(model)
        check_finite(module.named_parameters(), "deciding by them what to prune")
        return model.pruner.decide(module, step, features)

    def _commit(self, runner: Runner, decided: Decided, step: int) -> None:
        model = unwrapped(runner.model)
        model.pruner.commit(pruned_module(model), decided.decision, step)
        check_agreement(model.pruner, pruned_module(model), step)
        self._status = model.pruner.status() | model.pruner.figures() | {"decide_seconds": decided.seconds}

    def _features(self, runner: Runner, model: nn.Module) -> dict[str, Tensor] | None:
        """Scores of feature maps; each rank looks at its share of the batches.

        They come from a loader of their own, so that the training loader loses no batch.
        """
        batches = model.pruner.feature_batches
        if not batches:
            return None
        config = copy.deepcopy(runner.cfg.train_dataloader)
        config.update(persistent_workers=False)
        loader = runner.build_dataloader(config, seed=self._seed(runner))
        make_reproducible(loader, self._seed(runner))
        return collect_spatial_information(model, loader, -(-batches // runner.world_size))

    def _watch_optimizer(self, runner: Runner, pruner: Pruner, module: nn.Module) -> None:
        """Hook real optimizer steps: they happen after clipping and unscaling, once per accumulated batch."""
        wrapper = runner.optim_wrapper
        wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        for item in wrappers:
            optimizer = item.optimizer
            pruner.check_optimizer(module, optimizer)
            self._optimizer_hooks += [
                optimizer.register_step_pre_hook(lambda used, *_: pruner.before_step(module, used)),
                optimizer.register_step_post_hook(lambda used, *_: pruner.after_step(module, used)),
            ]

    def _sync_averages(self, runner: Runner) -> None:
        for average in self._averages(runner):
            average.pruner.load_state_from(self.pruner(runner))

    def _mask_averages(self, runner: Runner) -> None:
        for average in self._averages(runner):
            self.pruner(runner).mask(pruned_module(average))

    @staticmethod
    def _averages(runner: Runner) -> list[nn.Module]:
        """Averaged copies of the model."""
        hooks = [hook for hook in runner.hooks if isinstance(hook, EMAHook) and hasattr(hook, "ema_model")]
        return [hook.ema_model.module for hook in hooks]

    def _log(self, runner: Runner) -> None:
        for name, value in self._status.items():
            runner.message_hub.update_scalar(f"train/{name}", value)

    def _summary(self, runner: Runner) -> str:
        pruner = self.pruner(runner)
        shares = [f"{name.replace('_', ' ')} {value:.1%}" for name, value in pruner.status().items()]
        return ", ".join(shares + [f"{name.replace('_', ' ')} {value:.4g}" for name, value in pruner.figures().items()])

    @staticmethod
    def _seed(runner: Runner) -> int:
        return int(runner.seed or 0)


def _end_training(runner: Runner, epochs: int, iterations: int) -> None:
    """Let the training end after so many epochs or iterations, as if it had been that long: what it ends with is saved
    and validated.
    """
    loop = runner.train_loop
    if isinstance(loop, EpochBasedTrainLoop):
        loop._max_epochs = epochs
    loop._max_iters = iterations
