"""Hooks that do damage, for configs of test runs: ``custom_imports=['saboteurs']`` with this folder in PYTHONPATH."""

from __future__ import annotations

import builtins
import os
import resource
import signal

import torch
from mmengine import dist
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS


def die() -> None:
    """End this process as a power failure would."""
    os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class KillAt(Hook):
    """Kill the process at one moment of a run.

    Args:
        moment: ``iteration`` (before it), ``update`` (right after the update of that epoch or iteration), ``write``
            (when half of that checkpoint is written), ``pointer`` (checkpoint written, ``last_checkpoint`` opened and
            empty).
        step: epoch or iteration, counted from 0; for ``write`` and ``pointer`` the number of the checkpoint.
    """

    priority = "LOWEST"

    def __init__(self, moment: str, step: int) -> None:
        self.moment, self.step, self.written = moment, step, 0

    def before_train(self, runner):
        if self.moment in ("write", "pointer"):
            self.original, LocalBackend.put = LocalBackend.put, lambda backend, data, path: self.put(data, str(path))
            self.open, builtins.open = builtins.open, self.opened

    def before_train_epoch(self, runner):
        if self.moment == "update" and runner.model.pruner.by_epoch and self.updated(runner):
            die()

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.moment == "iteration" and runner.iter == self.step:
            die()
        if self.moment == "update" and not runner.model.pruner.by_epoch and self.updated(runner):
            die()

    def updated(self, runner):
        return int(runner.model.pruner.last_update) == self.step

    def put(self, data, path):
        self.written += ".pth" in path
        half = self.moment == "write" and self.written == self.step
        with self.open(path, "wb") as file:
            file.write(data[: len(data) // 2] if half else data)
        if half:
            die()

    def opened(self, file, mode="r", *args, **kwargs):
        handle = self.open(file, mode, *args, **kwargs)
        if self.moment == "pointer" and self.written == self.step and str(file).endswith("last_checkpoint"):
            die()
        return handle


@HOOKS.register_module()
class FlipMask(Hook):
    """Turn one channel of rank 1 over before an update, or right after it."""

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner):
        if runner.epoch == 1 and dist.get_rank() == 1:
            pruner = getattr(runner.model, "module", runner.model).pruner
            original = pruner.set_masks

            def flipped(decision):
                name = next(iter(pruner.masks.items()))[0]
                decision = {**decision, name: decision[name].clone()}
                decision[name][0] = ~decision[name][0]
                original(decision)

            pruner.set_masks = flipped


@HOOKS.register_module()
class BreakDecision(Hook):
    """Let the decision of rank 0 fail."""

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner):
        if runner.epoch == 1 and dist.get_rank() == 0:
            pruner = getattr(runner.model, "module", runner.model).pruner

            def decide(*args, **kwargs):
                raise torch.linalg.LinAlgError("no convergence")

            pruner.decide = decide


@HOOKS.register_module()
class SaveEachRank(Hook):
    """Save masks and pruner state of every rank after every epoch."""

    priority = "LOWEST"

    def after_train_epoch(self, runner):
        model = getattr(runner.model, "module", runner.model)
        torch.save(model.state_dict(), f"{runner.work_dir}/rank{dist.get_rank()}_epoch{runner.epoch}.pt")


@HOOKS.register_module()
class DieAtEvent(Hook):
    """Kill the process at the n-th thing that happens: epochs, iterations, decisions, writes, renames, removals.

    Args:
        number: of the event, from 1; 0: none, events are only written down.
        log: file that names the events, a line each.
        rank: that dies.
        only: name of the events that count; all when empty.
    """

    priority = "VERY_HIGH"

    def __init__(self, number: int, log: str, rank: int = 0, only: str = "") -> None:
        self.number, self.log, self.rank, self.only, self.seen = number, log, rank, only, 0

    def event(self, name):
        if dist.get_rank() != self.rank or self.only not in ("", name):
            return
        self.seen += 1
        with open(self.log, "a") as file:
            file.write(f"{self.seen} {name}\n")
        if self.seen == self.number:
            die()

    def before_run(self, runner):
        pruner = getattr(runner.model, "module", runner.model).pruner
        for name in ("start", "decide", "commit"):
            setattr(pruner, name, self.around(getattr(pruner, name), name))
        os.replace = self.around(os.replace, "replace")
        LocalBackend.remove = self.around(LocalBackend.remove, "remove")
        LocalBackend.put = self.halves(LocalBackend.put)
        self.open, builtins.open = builtins.open, self.opened

    def around(self, original, name):
        def called(*args, **kwargs):
            self.event(f"before {name}")
            result = original(*args, **kwargs)
            self.event(f"after {name}")
            return result

        return called

    def halves(self, original):
        def put(backend, data, path):
            original(backend, data[: len(data) // 2], path)
            self.event("half a write")
            original(backend, data, path)

        return put

    def opened(self, file, mode="r", *args, **kwargs):
        handle = self.open(file, mode, *args, **kwargs)
        if str(file).endswith("last_checkpoint") and "w" in mode:
            self.event("an empty last_checkpoint")
        return handle

    def before_train_epoch(self, runner):
        self.event("epoch")

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.event("iteration")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.event("after an iteration")


@HOOKS.register_module()
class FillDisk(Hook):
    """From some epoch on no file may grow beyond ``size`` bytes: the kernel refuses as on a full disk."""

    priority = "VERY_HIGH"

    def __init__(self, epoch: int, size: int) -> None:
        self.epoch, self.size = epoch, size

    def before_train_epoch(self, runner):
        if runner.epoch == self.epoch:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@HOOKS.register_module()
class BreakWeight(Hook):
    """Put NaN into a weight behind the last iteration of an epoch, where no loss sees it."""

    priority = "VERY_HIGH"

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def after_train_epoch(self, runner):
        if runner.epoch == self.epoch:
            next(runner.model.backbone.parameters()).data.view(-1)[0] = float("nan")


@TRANSFORMS.register_module()
class DieInWorker:
    """A transform that kills the data worker it runs in."""

    def __call__(self, results):
        assert torch.utils.data.get_worker_info() is not None, "this is no worker"
        die()
