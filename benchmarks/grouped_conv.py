"""Is a grouped network faster, and what do folding and shared orders gain? Dense against grouped in turns.

ResNet-50 with every convolution but the stem divided by GConv Prune. *Gathers* counts the channel shuffles that are
left: without folding there are two per layer; folding moves permutations into neighbouring layers; with shared orders
only residual adds need them. *No gathers* is the same network with all of them taken out (it computes something else):
the bound.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torchvision
from rich.console import Console
from rich.table import Table

from prune_mm.analysis import compare_latency, layer_positions
from prune_mm.graph import count_gathers, trace
from prune_mm.pruners import GConvPrune
from prune_mm.structures import Plan


def grouped_copies(
    module: torch.nn.Module, groups: int, share: bool
) -> tuple[torch.nn.Module, torch.nn.Module, tuple[int, int], float]:
    """Copies without and with folding, their gathers, and the share of MACs."""
    graph = trace(module, torch.randn(1, 3, 64, 64), grouping=True)
    pruner = GConvPrune(groups=groups, share_orders=share)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    pruner.prepare(module, graph, shapes, layer_positions(module, torch.randn(1, 3, 224, 224)))
    subject = copy.deepcopy(module)
    pruner.commit(subject, pruner.start(subject), 0)
    stages = tuple(pruner.convs()), tuple(pruner.structures())
    copies = [Plan("", (stage,)).compact(copy.deepcopy(module)) for stage in stages]
    return copies[0], copies[1], (count_gathers(stages[0]), count_gathers(stages[1])), pruner.status()["macs"]


def without_gathers(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that shuffles nothing."""
    bare = copy.deepcopy(module)
    for child in bare.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
    return bare


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    table = Table(title=f"ResNet-50, 224x224, {torch.get_num_threads()} threads")
    for column in ("groups", "batch", "form", "gathers", "MACs", "dense ms", "grouped ms", "speed-up"):
        table.add_column(column, justify="left" if column == "form" else "right")
    module = torchvision.models.resnet50().eval()
    for groups in args.groups:
        plain, folded, (all_gathers, left), macs = grouped_copies(module, groups, share=False)
        _, shared, (_, least), _ = grouped_copies(module, groups, share=True)
        forms = [("as decided", plain, all_gathers), ("folded", folded, left), ("shared orders", shared, least)]
        forms.append(("no gathers", without_gathers(folded), 0))
        for batch in args.batch:
            image = torch.randn(batch, 3, 224, 224)
            for name, small, gathers in forms:
                dense, compact = compare_latency(module, small, image, repeats=args.repeats)
                table.add_row(
                    str(groups), str(batch), name, str(gathers), f"{macs:.1%}", f"{dense.median_ms:.1f}",
                    f"{compact.median_ms:.1f}", f"{dense.median_ms / compact.median_ms:.2f}x",
                )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
