"""What the command-line tools share: reading configs, checking data, and errors in one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from mmengine.config import Config, DictAction
from mmengine.device import get_device

from prune_mm.engine.failures import explain

_HINTS = {
    "CocoDataset": (
        "COCO 2017: get train2017.zip, val2017.zip and annotations_trainval2017.zip from cocodataset.org/#download "
        "and unpack them in {root}"
    ),
    "RecordIODataset": "pack the images with tools/make_recordio.py",
    "ImageNet": "ImageNet: get ILSVRC 2012 from image-net.org and unpack it as {root}/train/<class>/ and {root}/val/",
}


#: Datasets of MMPretrain that fetch themselves when they are missing.
_DOWNLOADED = {"CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options every OpenMMLab tool has."""
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<config name>)")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        help="override settings of the config, key=value; nested keys a.b=c",
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none", help="job launcher")
    # torch.distributed.launch passes --local-rank; torchrun sets the environment variable.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the common options.

    Raises:
        FileNotFoundError: when there is no such config.
    """
    if not Path(args.config).is_file():
        raise FileNotFoundError(f"no config at '{args.config}'")
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    config = Config.fromfile(args.config)
    config.launcher = args.launcher
    if args.cfg_options is not None:
        config.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        config.work_dir = args.work_dir
    elif config.get("work_dir") is None:
        config.work_dir = os.path.join("work_dirs", Path(args.config).stem)
    if args.launcher != "none" and get_device() == "cpu":
        distribute_on_cpu(config)
    return config


def distribute_on_cpu(config: Config) -> None:
    """Let several processes train on a machine without a GPU, by gloo.

    MMEngine's launchers choose a CUDA device before anything else, and its default wrapper insists on one.
    """
    torch.cuda.set_device = lambda device: None
    config.merge_from_dict({"env_cfg.dist_cfg.backend": "gloo"})
    wrapper = config.get("model_wrapper_cfg") or {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": config.get("find_unused_parameters", False),
    }
    config.model_wrapper_cfg = {**wrapper, "device_ids": None}


def latest_checkpoint(work_dir: str | os.PathLike) -> str | None:
    """The checkpoint to resume from; None when there is none yet.

    A process that is killed may leave behind half a checkpoint, or a ``last_checkpoint`` that names none: then it is
    the newest one that is whole.
    """
    pointer = Path(work_dir) / "last_checkpoint"
    named = [Path(pointer.read_text().strip())] if pointer.is_file() else []
    saved = [path for pattern in ("epoch_*.pth", "iter_*.pth") for path in Path(work_dir).glob(pattern)]
    newest_first = sorted(saved, key=lambda path: path.stat().st_mtime, reverse=True)
    return next((str(path) for path in [*named, *newest_first] if path.is_file() and _is_whole(path)), None)


def check_checkpoint_file(path: str | None) -> None:
    """Look at a checkpoint before everything is built for it; addresses are left to MMEngine.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is cut short or something else.
    """
    if path is None or "://" in path:
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at '{path}'")
    if not _is_whole(Path(path)):
        raise ValueError(f"'{path}' is damaged or not a checkpoint")


def _is_whole(path: Path) -> bool:
    """Whether this looks like what ``torch.save`` writes: a ZIP file, or a pickle as before PyTorch 1.6."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(file) or (file.seek(0) == 0 and file.read(1) == b"\x80")


def check_pruning(config: Config) -> None:
    """A prunable model is pruned by its hook; without it the training would be dense, and say nothing.

    Raises:
        ValueError: when the hook is missing.
    """
    kinds = [str(hook.get("type")).rpartition(".")[2] for hook in config.get("custom_hooks") or []]
    if str(config.model.get("type")).rpartition(".")[2] == "PrunableModel" and "PruningHook" not in kinds:
        raise ValueError("a PrunableModel needs custom_hooks=[dict(type='prune_mm.PruningHook')], or nothing is pruned")


def check_data(config: Config, *loaders: str) -> None:
    """Look for the files the dataloaders will read.

    Raises:
        FileNotFoundError: one line: what is missing, where it was looked for, and how to get it.
    """
    for name in loaders:
        for dataset in _dataset_nodes(config.get(name)):
            for path in _paths_of(dataset):
                if not os.path.exists(path):
                    kind = str(dataset.get("type", "")).rpartition(".")[2]
                    root = str(dataset.get("data_root") or "") or os.path.dirname(path)
                    hint = _HINTS.get(kind, "put it there").format(root=root.rstrip("/"))
                    raise FileNotFoundError(
                        f"{name}: '{path}' is missing (looked in '{os.path.abspath(path)}'). {hint}; "
                        f"or point elsewhere with --cfg-options {name}.dataset.data_root=DIR"
                    )


def _dataset_nodes(node: Any) -> Iterator[dict]:
    if isinstance(node, dict):
        if node.get("data_root") or node.get("ann_file") or node.get("rec_file"):
            yield node
        for value in node.values():
            yield from _dataset_nodes(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _dataset_nodes(value)


def _paths_of(dataset: dict) -> list[str]:
    """Files and folders a dataset config names; datasets of prune_mm make what they need."""
    kind = str(dataset.get("type", ""))
    if dataset.get("rec_file"):
        index = dataset.get("idx_file") or f"{os.path.splitext(dataset['rec_file'])[0]}.idx"
        return [os.path.join(dataset.get("data_root") or "", path) for path in (dataset["rec_file"], index)]
    if kind.startswith("prune_mm.") or (kind.rpartition(".")[2] in _DOWNLOADED and dataset.get("download", True)):
        return []
    root = dataset.get("data_root") or ""
    prefix = dataset.get("data_prefix")
    named = [dataset.get("ann_file"), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
    if dataset.get("split"):
        named.append(str(dataset["split"]))
    paths = [os.path.join(root, path) for path in named if isinstance(path, str) and path and "://" not in path]
    return paths or ([root] if root and "://" not in root else [])


def run_tool(main: Callable[[], Any]) -> None:
    """Run a tool; what the user did wrong is told in one line, without a traceback (exit status 2).

    Set PRUNE_MM_TRACEBACK=1 to see where it was raised.
    """
    try:
        main()
        _leave_together()
    except Exception as error:
        message = explain(error) or (str(error) if _is_for_users(error) else None)
        if os.environ.get("PRUNE_MM_TRACEBACK") or message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _leave_together() -> None:
    """End all ranks of a distributed run at once, without taking the interpreter apart.

    Threads of PyTorch's process groups now and then abort a process that has finished ("terminate called without an
    active exception"), and the launcher then reports a failure although everything was trained and saved.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _is_for_users(error: BaseException) -> bool:
    """Whether the innermost frame is this package's or the tool's: then the message was written for the user."""
    if not isinstance(error, (ValueError, FileNotFoundError, FileExistsError)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    innermost = Path(frames[-1].filename).resolve() if frames else Path()
    package, tool = Path(__file__).resolve().parents[1], Path(sys.argv[0]).resolve()
    return innermost == tool or package in innermost.parents
