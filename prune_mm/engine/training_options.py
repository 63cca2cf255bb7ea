"""Options of MMEngine that pruning cannot work with, or that do not go together: refused before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model.wrappers import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.nn.parallel import DistributedDataParallel

_WHOLE = "pruning needs whole layers under their own names on every rank"
_DDP = "use MMDistributedDataParallel, MMEngine's default"


def check_training_options(config: Config) -> None:
    """Look at the options of a training.

    Raises:
        ValueError: naming the option, why it does not work, and what does.
    """
    if _kind(config.get("model")) == "PrunableModel":
        _check_runner(_kind({"type": config.get("runner_type", "Runner")}))
        _check_wrapper(_kind(config.get("model_wrapper_cfg")))
    on_cpu = get_device() == "cpu"
    kinds = {_kind(wrapper) for wrapper in _nodes(config.get("optim_wrapper"))}
    if on_cpu and "AmpOptimWrapper" in kinds:
        raise ValueError(
            "optim_wrapper.type='AmpOptimWrapper' needs a GPU and there is none; set optim_wrapper.type=OptimWrapper"
        )
    if config.get("launcher", "none") != "none":
        _check_together(config)
        if on_cpu:
            _check_sync_bn(config)


def check_runner(runner: Any) -> None:
    """The same of a runner that was built already (by the ``tools/train.py`` of another package).

    Raises:
        ValueError: when the hook cannot work in it.
    """
    _check_runner("Runner" if isinstance(runner, Runner) else type(runner).__name__)
    if is_model_wrapper(runner.model):
        _check_wrapper(type(runner.model).__name__, isinstance(runner.model, DistributedDataParallel))


def check_resumed_length(runner: Runner, counts_epochs: bool) -> None:
    """A pruner that counts iterations cannot go on where an epoch has another number of them.

    Args:
        runner: that has loaded its checkpoint.
        counts_epochs: whether the pruner counts epochs.

    Raises:
        ValueError: when the checkpoint comes from another number of processes, another batch size, or the middle of an
            epoch, which MMEngine starts again.
    """
    if counts_epochs or not runner._resume or not isinstance(runner.train_loop, EpochBasedTrainLoop):
        return
    epoch, length = runner.epoch, len(runner.train_dataloader)
    if runner.iter != epoch * length:
        raise ValueError(
            f"the checkpoint has done {runner.iter} iterations in {epoch} epochs, and here an epoch has {length}; the "
            "pruner counts iterations: resume from the end of an epoch, with as many processes and images per process"
        )


def _check_runner(kind: str) -> None:
    # Runners of users derive from Runner, and its strategies (DeepSpeed, FSDP, ColossalAI) belong to FlexibleRunner.
    if kind == "FlexibleRunner":
        raise ValueError(
            f"runner_type={kind!r} (DeepSpeed, FSDP, ColossalAI) does not work with PruningHook: {_WHOLE}; leave out "
            f"runner_type and strategy, and {_DDP}"
        )


def _check_wrapper(kind: str, is_ddp: bool = True) -> None:
    if not is_ddp or "Separate" in kind or "FullySharded" in kind:
        raise ValueError(
            f"model_wrapper_cfg.type={kind!r} cuts the model into parts, and {_WHOLE}; leave it out, or {_DDP}"
        )


def _check_together(config: Config) -> None:
    """Options of DDP that PyTorch cannot combine; its own errors come in the first backward pass."""
    wrapper = config.get("model_wrapper_cfg") or {}
    unused = wrapper.get("find_unused_parameters", config.get("find_unused_parameters", False))
    counts = max((node.get("accumulative_counts", 1) for node in _nodes(config.get("optim_wrapper"))), default=1)
    if wrapper.get("static_graph") and counts > 1:
        raise ValueError(
            f"model_wrapper_cfg.static_graph=True and optim_wrapper.accumulative_counts={counts} do not go together "
            "in PyTorch; leave one of them out"
        )
    if unused and not wrapper.get("static_graph") and any(node.get("with_cp") for node in _nodes(config.get("model"))):
        raise ValueError(
            "find_unused_parameters=True and with_cp=True do not go together in PyTorch; leave one of them out, or, if "
            "the same parameters are used in every iteration, set "
            "model_wrapper_cfg=dict(type='MMDistributedDataParallel', static_graph=True)"
        )


def _check_sync_bn(config: Config) -> None:
    named = [node for node in _nodes(config.get("model")) if _kind(node) in ("SyncBN", "MMSyncBN", "SyncBatchNorm")]
    if not named and config.get("sync_bn") is None:
        return
    where = "sync_bn" if not named else "norm_cfg.type='SyncBN'"
    raise ValueError(
        f"{where} needs GPUs and there is none: train one process, where it becomes ordinary batch norm, or set "
        f"{'sync_bn=None' if not named else 'the type to BN'}"
    )


def _kind(node: Any) -> str:
    """The type of a config node without its scope."""
    kind = node.get("type", "") if isinstance(node, dict) else ""
    return (kind if isinstance(kind, str) else getattr(kind, "__name__", "")).rpartition(".")[2]


def _nodes(node: Any) -> Iterator[dict]:
    """All tables of a config node."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _nodes(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _nodes(value)
