"""Is a network that lost channels faster? Dense against compact in turns, in one process: ``make bench``.

Every row cuts a torchvision network to half of its MACs, to widths that are multiples of 16, and prints the share of
MACs that is left, the speed-up, and the share of the ideal speed-up (time in proportion to MACs) that arrived. It also
prints how long tracing takes.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torchvision
from rich.console import Console
from rich.table import Table

from prune_mm.analysis import compare_latency, layer_positions
from prune_mm.graph import trace
from prune_mm.pruners import UniformL1
from prune_mm.structures import Plan

NETWORKS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "resnext50_32x4d")


def compact_copy(
    module: torch.nn.Module, share: float, round_to: int, coupled: bool
) -> tuple[torch.nn.Module, float, float]:
    """A compact copy at a share of MACs, that share as reached, and the seconds tracing took."""
    start = time.perf_counter()
    graph = trace(module, torch.randn(1, 3, 64, 64))
    seconds = time.perf_counter() - start
    pruner = UniformL1({"macs": share}, round_to=round_to, prune_coupled=coupled)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    pruner.prepare(module, graph, shapes, layer_positions(module, torch.randn(1, 3, 224, 224)))
    pruner.commit(module, pruner.start(module), 0)
    small = Plan("", (tuple(pruner.structures()),)).compact(copy.deepcopy(module))
    return small, pruner.status()["macs"], seconds


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.5, help="share of MACs to keep")
    parser.add_argument("--round-to", type=int, default=16, help="widths are multiples of this")
    parser.add_argument("--coupled", action="store_true", help="also cut the channels that residual adds tie")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    title = f"{args.share:.0%} of MACs, widths rounded to {args.round_to}, {torch.get_num_threads()} threads"
    table = Table("network", "batch", "MACs", "dense ms", "compact ms", "speed-up", "of ideal", "trace s", title=title)
    for name in NETWORKS:
        module = getattr(torchvision.models, name)().eval()
        small, macs, seconds = compact_copy(module, args.share, args.round_to, args.coupled)
        for batch in (1, 8):
            dense, compact = compare_latency(module, small, torch.randn(batch, 3, 224, 224), repeats=args.repeats)
            gain = dense.median_ms / compact.median_ms
            table.add_row(
                name, str(batch), f"{macs:.1%}", f"{dense.median_ms:.1f}", f"{compact.median_ms:.1f}", f"{gain:.2f}x",
                f"{gain * macs:.0%}", f"{seconds:.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
