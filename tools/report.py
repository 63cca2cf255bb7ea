"""Show what an artifact is worth: ``tools/report.py ARTIFACT``; measures latency and rewrites its report.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prune_mm.analysis import compare_latency, comparison_table, to_markdown
from prune_mm.analysis.report import layer_lines, read_metrics, read_report, report_rows
from prune_mm.engine.launch import run_tool
from prune_mm.engine.scope import get_scope, scope_inputs
from prune_mm.files import write_text_atomically


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", help="folder that tools/export.py wrote")
    parser.add_argument("--dense-metrics", help="JSON that tools/test.py --metrics-out wrote, of the dense model")
    parser.add_argument("--masked-metrics", help="the same of the pruned checkpoint, where no dense model was trained")
    parser.add_argument("--compact-metrics", help="the same of the artifact")
    parser.add_argument("--no-latency", action="store_true", help="do not measure latency")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes to measure latency at")
    parser.add_argument("--repeats", type=int, default=20, help="measured calls of each model")
    parser.add_argument("--layers", action="store_true", help="also list every layer before and after")
    parser.add_argument("--markdown", help="also write the table to this file")
    return parser.parse_args()


def measure_latency(artifact: str, report: dict, batches: list[int], repeats: int) -> list[dict]:
    """Latency of the scope, dense and compact in turns, on the GPU when there is one."""
    config = Config.fromfile(str(Path(artifact) / "config.py"))
    init_default_scope(config.get("default_scope", "mmengine"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense, compact = (MODELS.build(c).to(device) for c in (config.model.model, config.model))
    scope, results = report["scope"], []
    for batch in batches:
        inputs = scope_inputs(compact, scope, tuple(report["input_size"]))
        inputs = tuple(x.expand(batch, *x.shape[1:]).contiguous() if torch.is_tensor(x) else x for x in inputs)
        first, second = compare_latency(get_scope(dense, scope), get_scope(compact, scope), inputs, repeats)
        results.append(
            {
                "what": scope,
                "batch": batch,
                "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
                "threads": torch.get_num_threads(),
                "dense_ms": first.median_ms,
                "compact_ms": second.median_ms,
            }
        )
    return results


def main() -> None:
    """Read, measure, show, write."""
    args = parse_args()
    report = read_report(args.artifact)
    for key, path in (
        ("dense", args.dense_metrics),
        ("masked", args.masked_metrics),
        ("compact", args.compact_metrics),
    ):
        if path is not None:
            report.setdefault("metrics", {})[key] = read_metrics(path)
    if not args.no_latency:
        report["latency"] = measure_latency(args.artifact, report, args.batch, args.repeats)
    path = Path(args.artifact) / "report.json"
    write_text_atomically(path, json.dumps(report, indent=1) + "\n")
    rows = report_rows(report)
    title = f"{report['model']}: {report['scope']} pruned by {report['pruner']} to {report['target']}"
    console = Console()
    summary = comparison_table(title, rows)
    # Rich would break the title at the width of the table.
    summary.title = None
    console.print("", Text(title, style="bold"), summary, sep="\n")
    if args.layers:
        table = Table("layer", "dense", "compact", title="layers")
        for line in layer_lines(report):
            table.add_row(*map(Text, line))
        console.print(table)
    if args.markdown:
        Path(args.markdown).write_text(to_markdown(title, rows) + "\n")


if __name__ == "__main__":
    run_tool(main)
