"""Write the small model of a pruned checkpoint: ``tools/export.py CONFIG CHECKPOINT OUT``."""

from __future__ import annotations

import argparse

from prune_mm.engine.exporter import export
from prune_mm.engine.launch import add_common_arguments, load_config, run_tool


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument("checkpoint", help="checkpoint of the pruned training")
    parser.add_argument("out", help="folder of the artifact")
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is there already")
    return parser.parse_args()


def main() -> None:
    """Export, and say what became of it."""
    args = parse_args()
    report = export(load_config(args), args.checkpoint, args.out, overwrite=args.overwrite)
    macs, params = report["macs"], report["params"]
    print(
        f"{args.out}: {report['scope']} MACs {macs['dense'] / 1e6:.1f} M -> {macs['compact'] / 1e6:.1f} M, "
        f"params {params['dense'] / 1e6:.2f} M -> {params['compact'] / 1e6:.2f} M, "
        f"masked == compact to {report['law_relative_difference']:.0e}"
    )


if __name__ == "__main__":
    run_tool(main)
