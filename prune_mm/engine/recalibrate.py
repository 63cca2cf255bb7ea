"""Statistics of batch norm layers, estimated again: those of the dense network do not fit a freshly cut one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine import dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_mm.engine.features import same_random_state_after
from prune_mm.engine.prunable import unwrapped
from prune_mm.engine.randomness import make_reproducible, seed_everything
from prune_mm.graph.trace import in_eval_mode
from prune_mm.pruners.options import check_flag, check_integer
from prune_mm.registry import HOOKS

#: Buffers of a batch norm layer that training changes.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Recalibrated:
    """What was estimated.

    Attributes:
        batches: training batches looked at, by each rank.
        layers: batch norm layers with new statistics.
        frozen: layers that kept theirs, since training does not change them either.
        unused: layers that kept theirs, since no batch reached them.
    """

    batches: int
    layers: int
    frozen: int
    unused: int

    def __str__(self) -> str:
        """For people."""
        kept = [f"{count} {what}" for count, what in ((self.frozen, "frozen"), (self.unused, "unused")) if count]
        return f"{self.layers} batch norm layers over {self.batches} batches" + (
            f" ({' and '.join(kept)} kept theirs)" if kept else ""
        )


@torch.no_grad()
def recalibrate(
    model: nn.Module, dataloader: Any, batches: int, include_frozen: bool = False, seed: int = 0
) -> Recalibrated:
    """Estimate mean and variance of all batch norm layers of a model again, in place; nothing else changes.

    Batch norm layers run in train mode, everything else (dropout, ...) in eval mode. Each batch has the same weight, as
    with ``momentum=None`` in PyTorch: means and (unbiased) variances of the batches are averaged, over all ranks.

    Args:
        model: an OpenMMLab model; its data preprocessor is used, and ``forward(mode='loss')``, so that batch norm in
            necks and heads sees what it sees in training.
        dataloader: yields training batches; read again from the start when it has fewer than ``batches``.
        batches: how many, on each rank.
        include_frozen: also layers that training leaves alone (``norm_eval``, frozen stages, no gradients).
        seed: of what heads draw at random (samples of proposals).

    Returns:
        How many layers.

    Raises:
        ValueError: in one line, when ``batches`` is no positive number, there is no layer to estimate, the data loader
            is empty, or the statistics are not finite.
    """
    check_integer("batches", batches, 1)
    check_flag("include_frozen", include_frozen)
    norms, frozen = norms_to_estimate(model, include_frozen)
    before = saved_statistics(norms)
    try:
        with in_eval_mode(model), _averaging(norms), same_random_state_after():
            for number, batch in enumerate(_repeated(dataloader, batches)):
                seed_everything(seed, 3, number, dist.get_rank())
                _compute_losses(model, batch)
        _average_ranks(norms)
        _check_finite(norms)
    except BaseException:
        restore_statistics(norms, before)
        raise
    unused = {name: layer for name, layer in norms.items() if int(layer.num_batches_tracked) == 0}
    restore_statistics(unused, before)
    return Recalibrated(batches, len(norms) - len(unused), frozen, len(unused))


def norms_to_estimate(model: nn.Module, include_frozen: bool = False) -> tuple[dict[str, _BatchNorm], int]:
    """Batch norm layers with running statistics, by name, and the number of those left out because they are frozen.

    Frozen are those that training would not change: in eval mode when the model is in train mode, or without gradients.

    Raises:
        ValueError: when there is none to estimate.
    """
    every = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not every:
        raise ValueError(f"re-calibration: {type(model).__name__} has no batch norm layer with running statistics")
    flags = {module: module.training for module in model.modules()}
    model.train()
    learning = {name: layer for name, layer in every.items() if layer.training and _has_gradients(layer)}
    for module, flag in flags.items():
        module.training = flag
    if not learning and not include_frozen:
        raise ValueError(
            f"re-calibration: all {len(every)} batch norm layers of {type(model).__name__} are frozen (norm_eval or "
            "frozen stages); ask for them by include_frozen=True (tools/export.py: --recalibrate-frozen)"
        )
    return (every, 0) if include_frozen else (learning, len(every) - len(learning))


def _has_gradients(layer: _BatchNorm) -> bool:
    """Whether its scale trains; a layer without one has nothing to freeze."""
    return not layer.affine or layer.weight.requires_grad


def saved_statistics(norms: dict[str, _BatchNorm]) -> dict[str, dict[str, Tensor]]:
    """A copy of the statistics of each layer."""
    return {name: {key: getattr(layer, key).clone() for key in STATISTICS} for name, layer in norms.items()}


@torch.no_grad()
def restore_statistics(norms: dict[str, _BatchNorm], saved: dict[str, dict[str, Tensor]]) -> None:
    """Give each layer back what :func:`saved_statistics` found."""
    for name, layer in norms.items():
        for key, tensor in saved[name].items():
            getattr(layer, key).copy_(tensor)


@contextmanager
def _averaging(norms: dict[str, _BatchNorm]) -> Iterator[None]:
    """Statistics start afresh and average all batches."""
    momenta = {layer: layer.momentum for layer in norms.values()}
    for layer in norms.values():
        layer.reset_running_stats()
        layer.momentum, layer.training = None, True
    try:
        yield
    finally:
        for layer, momentum in momenta.items():
            layer.momentum, layer.training = momentum, False


def _repeated(dataloader: Any, batches: int) -> Iterator[Any]:
    """So many batches, from as many passes over the loader as it takes."""
    found = epoch = 0
    while found < batches:
        sampler = getattr(getattr(dataloader, "batch_sampler", None), "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        start = found
        for batch in dataloader:
            yield batch
            found += 1
            if found == batches:
                return
        if found == start:
            raise ValueError("re-calibration: the training data loader yields no batch")
        epoch += 1


def _compute_losses(model: nn.Module, batch: Any) -> None:
    """What a training step computes before it looks at gradients."""
    data = model.data_preprocessor(batch, True)
    _ = model(**data, mode="loss") if isinstance(data, dict) else model(*data, mode="loss")


def _average_ranks(norms: dict[str, _BatchNorm]) -> None:
    """Each batch of each rank counts the same."""
    if dist.get_world_size() == 1:
        return
    for layer in norms.values():
        counted = layer.num_batches_tracked.to(torch.float64)
        total = counted.clone()
        dist.all_reduce(total, "sum")
        for statistic in (layer.running_mean, layer.running_var):
            summed = statistic.to(torch.float64) * counted
            dist.all_reduce(summed, "sum")
            statistic.copy_(summed / total.clamp(min=1.0))
        layer.num_batches_tracked.copy_(total)


def _check_finite(norms: dict[str, _BatchNorm]) -> None:
    for name, layer in norms.items():
        if not bool(layer.running_mean.isfinite().all() and layer.running_var.isfinite().all()):
            raise ValueError(f"re-calibration: batch norm layer '{name}' sees numbers that are not finite")


def training_loader(config: Config, seed: int = 0) -> Any:
    """A loader of its own over the training data of a config, with its augmentations; a function of the seed.

    Raises:
        ValueError: when the config has no ``train_dataloader``.
    """
    if not config.get("train_dataloader"):
        raise ValueError("re-calibration needs training data: the config has no train_dataloader")
    settings = copy.deepcopy(config.train_dataloader)
    settings["persistent_workers"] = False
    loader = Runner.build_dataloader(settings, seed=seed)
    make_reproducible(loader, seed)
    return loader


def recalibrate_by_config(model: nn.Module, config: Config, batches: int, include_frozen: bool = False) -> Recalibrated:
    """:func:`recalibrate` with the training data and the seed of a config, on a GPU where there is one.

    Raises:
        ValueError: see :func:`recalibrate` and :func:`training_loader`.
    """
    norms_to_estimate(model, include_frozen)
    seed = int((config.get("randomness") or {}).get("seed") or 0)
    home = next(model.parameters()).device
    model.to(get_device())
    try:
        return recalibrate(model, training_loader(config, seed), batches, include_frozen, seed)
    finally:
        model.to(home)


@HOOKS.register_module()
class RecalibrateBN(Hook):
    """Evaluates with batch norm statistics estimated for the weights as they are, at each validation and test.

    A network that has just lost channels is judged without the drop that only stale statistics cause. The statistics
    that training goes on with, and that checkpoints hold, are put back behind each evaluation. With ``EMAHook`` it is
    the averaged model that is evaluated so.

    Args:
        batches: training batches to look at, on each rank.
        include_frozen: see :func:`recalibrate`.

    Raises:
        ValueError: naming the argument and what would be right; see :func:`recalibrate` for what is found later.
    """

    # Statistics come back before EMAHook (NORMAL) takes the averaged weights out of the model again.
    priority = "ABOVE_NORMAL"

    def __init__(self, batches: int, include_frozen: bool = False) -> None:
        """See the class."""
        check_integer("batches", batches, 1)
        check_flag("include_frozen", include_frozen)
        self.batches, self.include_frozen = batches, include_frozen
        self._norms: dict[str, _BatchNorm] = {}
        self._saved: dict[str, dict[str, Tensor]] = {}

    def before_run(self, runner: Runner) -> None:
        """Look before anything is trained whether there is something to estimate."""
        norms_to_estimate(unwrapped(runner.model), self.include_frozen)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Estimate, when all hooks have prepared the model for this validation."""
        if batch_idx == 0:
            self._estimate(runner)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """As in validation."""
        if batch_idx == 0:
            self._estimate(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Put back what training goes on with."""
        self._put_back()

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """As after validation."""
        self._put_back()

    def _estimate(self, runner: Runner) -> None:
        model, seed = unwrapped(runner.model), int(runner.seed or 0)
        self._norms, _ = norms_to_estimate(model, self.include_frozen)
        self._saved = saved_statistics(self._norms)
        found = recalibrate(model, training_loader(runner.cfg, seed), self.batches, self.include_frozen, seed)
        print_log(f"evaluated with statistics re-estimated: {found}", "current")

    def _put_back(self) -> None:
        restore_statistics(self._norms, self._saved)
        self._norms, self._saved = {}, {}
