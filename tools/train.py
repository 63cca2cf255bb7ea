"""Train a config: ``tools/train.py configs/chex_maskrcnn_r50.py``."""

from __future__ import annotations

import argparse

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from prune_mm.compat import fix_ssd_head
from prune_mm.engine import add_safety
from prune_mm.engine.distillation import add_teacher, check_teacher
from prune_mm.engine.launch import (
    add_common_arguments,
    check_checkpoint_file,
    check_data,
    check_pruning,
    latest_checkpoint,
    load_config,
    run_tool,
)
from prune_mm.engine.training_options import check_training_options


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument(
        "--resume", nargs="?", const="auto", help="resume from this checkpoint, or from the latest in the work dir"
    )
    return parser.parse_args()


def apply_training_options(config: Config, args: argparse.Namespace) -> None:
    """``--amp``, ``--auto-scale-lr`` and ``--resume``.

    Raises:
        ValueError: when an option does not fit the config.
    """
    if args.amp:
        kind = config.optim_wrapper.get("type", "OptimWrapper")
        if kind not in ("OptimWrapper", "AmpOptimWrapper"):
            raise ValueError(f"--amp is not supported with optim_wrapper.type={kind!r}")
        if get_device() == "cpu":
            raise ValueError("--amp needs a GPU; MMEngine's AmpOptimWrapper does not run on a CPU")
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise ValueError("--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config")
        config.auto_scale_lr.enable = True
    if args.resume is not None:
        checkpoint = latest_checkpoint(config.work_dir) if args.resume == "auto" else args.resume
        # A run that was stopped before its first checkpoint starts again, from the weights the config names.
        if checkpoint is not None:
            config.resume, config.load_from = True, checkpoint


def main() -> None:
    """Read the config, look for the data, train."""
    args = parse_args()
    config = load_config(args)
    apply_training_options(config, args)
    check_pruning(config)
    check_training_options(config)
    check_teacher(config)
    check_data(config, "train_dataloader", "val_dataloader")
    check_checkpoint_file(config.get("load_from"))
    if config.get("pretrain") and not config.get("load_from") and not config.get("resume"):
        print(f"warning: {args.config} prunes trained weights, but load_from names none; tools/compress.py trains them")
    runner = RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)
    fix_ssd_head()  # of dense models too
    add_safety(runner)
    add_teacher(runner)
    runner.train()


if __name__ == "__main__":
    run_tool(main)
