"""Is 1xN sparsity faster? PyTorch's dense convolution against ``BlockSparseConv2d``, in turns, in one process.

Every layer's time is a low quantile of many short repetitions of both sides, one after the other. For each N and rate
the table has the geometric mean of the layers' speed-ups and the ratio of total times. ``--layers 3x3`` measures the
3 x 3 convolutions of ResNet-50, ``--each`` prints every layer.

    OMP_NUM_THREADS=1 python benchmarks/block_sparse.py --threads 1
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from prune_mm.structures.block_sparse import BlockSparseConv2d

#: Inputs, outputs, height and width of the outputs, and how often the layer occurs.
MOBILENET_V1 = (
    (32, 64, 112, 1), (64, 128, 56, 1), (128, 128, 56, 1), (128, 256, 28, 1), (256, 256, 28, 1), (256, 512, 14, 1),
    (512, 512, 14, 5), (512, 1024, 7, 1), (1024, 1024, 7, 1),
)  # fmt: skip
MOBILENET_V2 = (
    (32, 16, 112, 1), (16, 96, 112, 1), (96, 24, 56, 1), (24, 144, 56, 2), (144, 24, 56, 1), (144, 32, 28, 1),
    (32, 192, 28, 3), (192, 32, 28, 2), (192, 64, 14, 1), (64, 384, 14, 4), (384, 64, 14, 3), (384, 96, 14, 1),
    (96, 576, 14, 3), (576, 96, 14, 2), (576, 160, 7, 1), (160, 960, 7, 3), (960, 160, 7, 2), (960, 320, 7, 1),
    (320, 1280, 7, 1),
)  # fmt: skip
RESNET50_3X3 = ((64, 64, 56, 3), (128, 128, 28, 4), (256, 256, 14, 6), (512, 512, 7, 3))
LAYERS = {
    "1x1": {"MobileNetV1": MOBILENET_V1, "MobileNetV2": MOBILENET_V2},
    "3x3": {"ResNet-50": RESNET50_3X3},
}


def compare(first: Callable, second: Callable, seconds: float) -> tuple[float, float]:
    """Low quantiles (5 %) of the seconds two calls take, measured in turns for about ``seconds``."""
    for call in (first, second) * 3:
        call()
    found: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[0]) < 20:
        for call, times in zip((first, second), found):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return tuple(sorted(times)[len(times) // 20] for times in found)


def measure(shape: tuple[int, int, int, int], kernel: int, n: int, rate: float, batch: int, seconds: float):
    """Seconds of the dense and of the block-sparse layer."""
    inputs, outputs, size, _ = shape
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False).eval()
    row_blocks = -(-outputs // n)
    kept = torch.ones(row_blocks * inputs, dtype=torch.bool)
    kept[torch.randperm(kept.numel())[: int(kept.numel() * rate)]] = False
    sparse = BlockSparseConv2d.from_conv(conv, n, kept.view(row_blocks, inputs)).eval()
    x = torch.randn(batch, inputs, size, size)
    return compare(lambda: conv(x), lambda: sparse(x), seconds)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--layers", choices=LAYERS, default="1x1")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.1, help="how long to measure each layer")
    parser.add_argument("--each", action="store_true", help="print every layer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    title = f"{args.layers} convolutions, batch {args.batch}, {args.threads} threads: dense against 1xN"
    table = Table("network", "N", "rate", "dense ms", "1xN ms", "total", "geometric mean", "slowest gain", title=title)
    kernel = int(args.layers[0])
    for network, shapes in LAYERS[args.layers].items():
        for n in args.n:
            for rate in args.rates:
                times = [measure(shape, kernel, n, rate, args.batch, args.seconds) for shape in shapes]
                counts = [shape[3] for shape in shapes]
                dense, sparse = (sum(c * t[side] for c, t in zip(counts, times)) for side in (0, 1))
                gains = [a / b for a, b in times]
                mean = math.exp(sum(c * math.log(gain) for c, gain in zip(counts, gains)) / sum(counts))
                table.add_row(
                    network, str(n), f"{rate:.1f}", f"{dense * 1e3:.2f}", f"{sparse * 1e3:.2f}",
                    f"{dense / sparse:.2f}x", f"{mean:.2f}x", f"{min(gains):.2f}x",
                )  # fmt: skip
                for shape, (a, b) in zip(shapes, times) if args.each else ():
                    print(f"{shape} N={n} rate={rate}: {a * 1e6:.1f} us, {b * 1e6:.1f} us, {a / b:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
