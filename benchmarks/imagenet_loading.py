"""Images per second of the data path: DALI on the CPU against MMPretrain's own loader, on the same cores, in turns.

Photo-like JPEG files of ImageNet's usual size (500x375, about 110 kB) are generated; both loaders are built from the
same config and read them for training (random crop, flip) and for validation (scale, central crop). The first pass of
each warms up caches and worker processes and is not counted; passes alternate, so that other load on the machine hits
both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

import prune_mm.engine  # noqa: F401  registers the loader

PIPELINES: dict[str, list[dict[str, Any]]] = {
    "train": [
        {"type": "RandomResizedCrop", "scale": 224},
        {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"},
    ],
    "val": [{"type": "ResizeEdge", "scale": 256, "edge": "short"}, {"type": "CenterCrop", "crop_size": 224}],
}


def write_images(root: Path, count: int) -> float:
    """JPEG files in two classes; returns their mean size in kB."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
    for number in track(range(count), "images"):
        clouds = rng.integers(0, 255, (25, 33, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(clouds).resize((500, 375), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 16, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / "ab"[number % 2] / f"{number:06d}.JPEG", quality=90)
    return sum(file.stat().st_size for file in root.rglob("*.JPEG")) / count / 1e3


def build_loader(root: Path, split: str, batch: int, workers: int, dali: bool) -> Any:
    """A loader as a config of MMPretrain describes it."""
    pipeline = [{"type": "LoadImageFromFile"}, *PIPELINES[split], {"type": "PackInputs"}]
    config: dict[str, Any] = {
        "batch_size": batch,
        "num_workers": workers,
        "persistent_workers": True,
        "collate_fn": {"type": "default_collate"},
        "dataset": {"type": "CustomDataset", "data_prefix": str(root), "pipeline": pipeline},
        "sampler": {"type": "DefaultSampler", "shuffle": split == "train"},
    }
    if dali:
        config.update(type="prune_mm.DALIDataLoader", device="cpu")
    return Runner.build_dataloader(config, seed=0)


def images_per_second(loader: Any) -> float:
    """One pass."""
    start = time.perf_counter()
    count = sum(len(batch["data_samples"]) for batch in loader)
    return count / (time.perf_counter() - start)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes, threads of DALI")
    parser.add_argument("--repeats", type=int, default=5, help="counted passes of each")
    args = parser.parse_args()
    init_default_scope("mmpretrain")
    with tempfile.TemporaryDirectory() as folder:
        size = write_images(Path(folder), args.images)
        table = Table(title=f"{args.images} JPEG files of 500x375, {size:.0f} kB, batches of {args.batch}, images/s")
        for column in ("split", "workers", "PyTorch", "range", "DALI on the CPU", "range", "speed-up"):
            table.add_column(column, justify="left" if column == "split" else "right")
        for split in PIPELINES:
            loaders = [build_loader(Path(folder), split, args.batch, args.workers, dali) for dali in (False, True)]
            passes = [[images_per_second(loader) for loader in loaders] for _ in range(args.repeats + 1)][1:]
            cells, medians = [], []
            for rates in zip(*passes):
                medians.append(statistics.median(rates))
                cells += [f"{medians[-1]:.0f}", f"{min(rates):.0f}-{max(rates):.0f}"]
            table.add_row(split, str(args.workers), *cells, f"{medians[1] / medians[0]:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
