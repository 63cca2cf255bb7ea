"""How long does one round of channel assignment take? Ours against POT's emd, side by side, over ResNet-50.

Every groupable convolution (all but the stem, 52) is ordered once by `solve_permutations` and once by the published
alternation, in turns, in one process: from identity, and warm, from the order found before after every kernel norm
moved by 1 %. Two sets of weights: as torchvision initialises them (hard: nothing to find), and with low-rank structure
and channels of unequal size (as trained layers have). Objectives are summed over layers as shares of their mass.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prune_mm.pruners.assignment import Permutations, alternate_emd, solve_permutations
from prune_mm.pruners.strucspars_math import kernel_norms

Start = tuple[Tensor, Tensor]


def layer_norms(trained_like: bool, limit: int | None) -> list[Tensor]:
    """Kernel norms (O, I) of the groupable convolutions of a ResNet-50; the largest ones first when limited."""
    torch.manual_seed(0)
    convs = [m for m in torchvision.models.resnet50().modules() if isinstance(m, torch.nn.Conv2d)][1:]
    norms = [kernel_norms(conv.weight) for conv in convs]
    if trained_like:
        norms = [_structured(matrix) for matrix in norms]
    return norms if limit is None else sorted(norms, key=Tensor.numel, reverse=True)[:limit]


def _structured(norms: Tensor, rank: int = 8) -> Tensor:
    """Norms times a low-rank pattern and log-normal channel sizes."""
    rows, columns = norms.shape
    pattern = (torch.randn(rows, rank) @ torch.randn(rank, columns)).abs().double() / rank**0.5
    return norms * (0.3 + pattern) * torch.randn(rows, 1).mul(0.3).exp() * torch.randn(1, columns).mul(0.3).exp()


def timed(solve: Callable[..., Permutations], norms: Tensor, rounds: int, start: Start | None) -> tuple[float, float]:
    """Seconds, and the objective as a share of the layer's mass."""
    begin = time.perf_counter()
    found = solve(norms, rounds=rounds, start=start)
    return time.perf_counter() - begin, found.objective / norms.sum().item()


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="alternations of either solver")
    parser.add_argument("--layers", type=int, help="only so many of the largest layers, for a quick look")
    args = parser.parse_args()
    # Whatever is imported or compiled at first use is not part of a round.
    for solve in (solve_permutations, alternate_emd):
        solve(torch.rand(128, 128), rounds=2)
    title = f"{args.rounds} round(s) of assignment over ResNet-50, {torch.get_num_threads()} threads"
    table = Table("weights", "start", "layers", "emd s", "ours s", "ratio", "emd J", "ours J", "not worse", title=title)
    for name, trained_like in (("random", False), ("trained-like", True)):
        norms = layer_norms(trained_like, args.layers)
        for warm in (False, True):
            rows = []
            for matrix in norms:
                start = None
                if warm:
                    found = solve_permutations(matrix, rounds=args.rounds)
                    start = (found.out_perm, found.in_perm)
                    matrix = matrix * (1 + 0.01 * torch.randn_like(matrix)).clamp(min=0)
                plain = timed(alternate_emd, matrix, args.rounds, start)
                rows.append((*plain, *timed(solve_permutations, matrix, args.rounds, start)))
            emd, emd_cost, ours, our_cost = (sum(column) for column in zip(*rows))
            won = sum(row[3] <= row[1] * (1 + 1e-9) for row in rows)
            table.add_row(
                name, "1 % later" if warm else "identity", str(len(rows)), f"{emd:.2f}", f"{ours:.2f}",
                f"{emd / ours:.1f}x", f"{emd_cost:.4f}", f"{our_cost:.4f}", f"{won}/{len(rows)}",
            )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
