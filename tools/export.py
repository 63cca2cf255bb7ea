"""Write the small model of a pruned checkpoint: ``tools/export.py CONFIG CHECKPOINT OUT``."""

from __future__ import annotations

import argparse

from prune_mm.engine.exporter import export
from prune_mm.engine.launch import add_common_arguments, check_data, load_config, run_tool


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument("checkpoint", help="checkpoint of the pruned training")
    parser.add_argument("out", help="folder of the artifact")
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is there already")
    parser.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="estimate the statistics of batch norm layers again, on the small model, over N training batches",
    )
    parser.add_argument("--recalibrate-frozen", action="store_true", help="also those that training leaves alone")
    return parser.parse_args()


def main() -> None:
    """Export, and say what became of it."""
    args = parse_args()
    if args.recalibrate_frozen and args.recalibrate is None:
        raise ValueError("--recalibrate-frozen needs --recalibrate N")
    config = load_config(args)
    if args.recalibrate is not None:
        check_data(config, "train_dataloader")
    report = export(config, args.checkpoint, args.out, args.overwrite, args.recalibrate, args.recalibrate_frozen)
    macs, params, again = report["macs"], report["params"], report.get("recalibrated", {})
    print(
        f"{args.out}: {report['scope']} MACs {macs['dense'] / 1e6:.1f} M -> {macs['compact'] / 1e6:.1f} M, "
        f"params {params['dense'] / 1e6:.2f} M -> {params['compact'] / 1e6:.2f} M, "
        f"masked == compact to {report['law_relative_difference']:.0e}"
        + ("; batch norm re-calibrated: {layers} layers, {batches} batches" if again else "").format(**again)
    )


if __name__ == "__main__":
    run_tool(main)
