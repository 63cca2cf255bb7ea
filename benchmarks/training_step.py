"""What does pruning cost while training, and how much memory? One training step, dense against prunable in turns.

Builds each real config (ResNet-50 classifier, SSD, Mask R-CNN; five methods), feeds it generated images of the config's
size, and times whole steps: forward, loss, backward, optimizer, and what the method adds around the optimizer step. On
a GPU it also measures memory, and both with mixed precision; on a CPU use a small ``--batch`` and ``--size``.

    python benchmarks/training_step.py --batch 32
    python benchmarks/training_step.py --batch 2 --size 96 --only maskrcnn --steps 3
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table
from torch import nn

from prune_mm.compat import fix_ssd_head
from prune_mm.engine.compact import without_pretrained
from prune_mm.engine.exporter import build_prunable
from prune_mm.engine.prunable import pruned_module, with_preprocessor

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = tuple(
    f"{method}_{model}"
    for method, detector in (
        ("chex", "ssd_r50"), ("strucspars", "ssd_r50"), ("gconv", "ssd_r50"), ("hinge", "ssd300"), ("onexn", "ssd300"),
    )
    for model in ("resnet50", detector, "maskrcnn_r50")
)  # fmt: skip


def batch_of(model: nn.Module, config: Config, size: int, count: int) -> dict:
    """Generated images and labels, as the data loader would give them."""
    if hasattr(model, "bbox_head") or hasattr(model, "roi_head"):
        from mmdet.testing import demo_mm_inputs

        shapes = [[3, size, size]] * count
        return demo_mm_inputs(count, shapes, num_items=[8] * count, num_classes=80, with_mask=True)
    from mmpretrain.structures import DataSample

    labels = torch.randint(0, 1000, (count,)).tolist()
    return {
        "inputs": torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8),
        "data_samples": [DataSample().set_gt_label(label) for label in labels],
    }


class Trainee:
    """A model with its optimizer; a prunable one with its method in force."""

    def __init__(self, config: Config, prunable: bool, amp: bool, device: str) -> None:
        """Build it on ``device``."""
        init_default_scope(config.get("default_scope", "mmengine"))
        dense = with_preprocessor(without_pretrained(config.model.model), config.get("data_preprocessor"))
        config = Config({**config, "model": {**config.model, "model": dense}})
        self.model = build_prunable(config) if prunable else MODELS.build(dense)
        self.model.to(device).train()
        options = dict(config.optim_wrapper)
        if amp:
            options |= {"type": "AmpOptimWrapper", "loss_scale": "dynamic"}
        self.wrapper = build_optim_wrapper(self.model, options)
        if prunable:
            self._start(config)

    def _start(self, config: Config) -> None:
        pruner, module = self.model.pruner, pruned_module(self.model)
        loop = config.train_cfg
        by_epoch = loop.get("max_epochs") is not None
        epochs = loop.max_epochs if by_epoch else None
        pruner.set_schedule(epochs, epochs * 1000 if by_epoch else loop.max_iters)
        pruner.commit(module, pruner.start(module), 0)
        optimizer = self.wrapper.optimizer
        optimizer.register_step_pre_hook(lambda used, *_: pruner.before_step(module, used))
        optimizer.register_step_post_hook(lambda used, *_: pruner.after_step(module, used))

    def step(self, batch: dict) -> None:
        """One training step."""
        self.model.train_step(batch, self.wrapper)


def measure(config: Config, batch: int, size: int, steps: int, amp: bool, device: str) -> tuple[Any, ...]:
    """Median milliseconds of a step and peak MiB of memory, dense and prunable; memory is None on a CPU."""
    made = [Trainee(config, prunable, amp, device) for prunable in (False, True)]
    data = batch_of(made[0].model, config, size, batch)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(steps + 2):
        for trainee, found in zip(made, times):
            start = time.perf_counter()
            trainee.step(data)
            if device == "cuda":
                torch.cuda.synchronize()
            # The first two steps choose algorithms and allocate.
            if number >= 2:
                found.append((time.perf_counter() - start) * 1000)
    medians = [statistics.median(found) for found in times]
    del made
    gc.collect()
    return *medians, *(peak_memory(config, prunable, data, amp, device) for prunable in (False, True))


def peak_memory(config: Config, prunable: bool, data: dict, amp: bool, device: str) -> float | None:
    """MiB that two steps of one model alone take at most."""
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainee = Trainee(config, prunable, amp, device)
    for _ in range(2):
        trainee.step(data)
    return torch.cuda.max_memory_allocated() / 2**20


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--size", type=int, help="side of the images in pixels; default: the config's input_size")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", default="", help="configs with this in their name")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fix_ssd_head()
    MMLogger.get_instance("training_step", log_level="ERROR")
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    title = f"{machine}, torch {torch.__version__}, batch {args.batch}, median of {args.steps} steps in turns"
    table = Table("config", "size", "AMP", "dense ms", "prunable ms", "ratio", "dense MiB", "prunable MiB", title=title)
    for name in (name for name in NAMES if args.only in name):
        config = Config.fromfile(CONFIGS / f"{name}.py")
        side = config.model.get("input_size", 224)
        # SSD's anchors and extra layers are made for one size.
        size = args.size if args.size and "ssd" not in name else (side if isinstance(side, int) else min(side))
        for amp in (False, True) if device == "cuda" else (False,):
            dense, prunable, *memory = measure(config, args.batch, size, args.steps, amp, device)
            shown = ["-" if value is None else f"{value:.0f}" for value in memory]
            ratio = f"{prunable / dense:.2f}"
            table.add_row(name, str(size), "on" if amp else "off", f"{dense:.0f}", f"{prunable:.0f}", ratio, *shown)
    # Without a terminal rich takes 80 columns, too few for names and numbers.
    Console(width=max(Console().width, 110)).print(table)


if __name__ == "__main__":
    main()
