"""Evaluate a checkpoint: ``tools/test.py CONFIG CHECKPOINT``; of an artifact the config is enough."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mmengine.runner import Runner

from prune_mm.compat import fix_ssd_head
from prune_mm.engine.launch import add_common_arguments, check_checkpoint_file, check_data, load_config, run_tool


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument("checkpoint", nargs="?", help="checkpoint; not needed for the config of an artifact")
    parser.add_argument("--metrics-out", help="write the metrics to this JSON file")
    return parser.parse_args()


class QuietRunner(Runner):
    """Does not list the environment and the whole config, which are in the log of the training."""

    def _log_env(self, env_cfg: dict) -> None:
        pass


def main() -> None:
    """Read config and checkpoint, evaluate, report the metrics."""
    args = parse_args()
    config = load_config(args)
    is_compact = str(config.model.get("type")).endswith("CompactModel")
    if args.checkpoint is None and not is_compact:
        raise ValueError("a checkpoint is needed: tools/test.py CONFIG CHECKPOINT")
    check_checkpoint_file(args.checkpoint)
    check_data(config, "test_dataloader")
    # The weights of an artifact are in its model already.
    config.load_from = args.checkpoint
    runner = QuietRunner.from_cfg(config)
    fix_ssd_head()  # of dense models too
    metrics = runner.test()
    if args.metrics_out and runner.rank == 0:
        Path(args.metrics_out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.metrics_out).write_text(json.dumps(metrics, indent=1, default=float) + "\n")


if __name__ == "__main__":
    run_tool(main)
