"""What does a pruning decision cost a distributed training? Bytes, seconds, and how often, per config.

Every config is built as it stands, with random weights; each kind of decision is then taken once, on one core, and its
CPU time is measured: alone, and by that of the rank with the most to do where ranks compute parts side by side. Shares
of the training are these seconds (nobody trains meanwhile) over the seconds of the training at `--images-per-second` of
each GPU, which is an assumption and no measurement. More GPUs than the 8 of the configs decide as often per image.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.table import Table
from torch import nn

from prune_mm.engine.agreement import evidence, shares
from prune_mm.engine.compact import without_pretrained
from prune_mm.engine.prunable import pruned_module
from prune_mm.pruners import Decision, Pruner
from prune_mm.registry import MODELS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
METHODS = ("chex", "strucspars", "gconv", "hinge", "onexn")
NAMES = [f"{method}_{model}" for model in ("resnet50", "maskrcnn_r50") for method in METHODS]
#: Training images: ImageNet 2012; COCO train2017 without images that have no annotation.
IMAGES = {"imagenet": 1_281_167, "coco": 117_266}


@dataclass(frozen=True)
class Cost:
    """One kind of decision of a config: how often, tensors and bytes sent, and seconds of parts and of the rest."""

    kind: str
    times: int
    tensors: int
    sent: int
    alone: float
    parts: dict[str, float]
    costs: dict[str, float]
    rest: float

    def seconds(self, ranks: int) -> float:
        """Until the decision is taken, on so many ranks."""
        if not self.parts or ranks == 1:
            return self.alone
        return max(sum(self.parts[name] for name in names) for names in shares(self.costs, ranks)) + self.rest


@dataclass(frozen=True)
class Schedule:
    """Length of a training."""

    epochs: int | None
    iterations: int
    images: int


def schedule_of(config: Config, gpus: int = 8) -> Schedule:
    """Length of the training on as many GPUs as it was written for."""
    root = str(config.train_dataloader.dataset.get("data_root") or config.train_dataloader.dataset.dataset.data_root)
    images, batch = IMAGES["coco" if "coco" in root else "imagenet"], config.train_dataloader.batch_size * gpus
    if "max_iters" in config.train_cfg:
        return Schedule(None, config.train_cfg.max_iters, config.train_cfg.max_iters * batch)
    epochs = config.train_cfg.max_epochs
    return Schedule(epochs, epochs * -(-images // batch), epochs * images)


def build(name: str) -> tuple[nn.Module, Config]:
    """The prunable model of a config, with random weights."""
    config = Config.fromfile(CONFIGS / f"{name}.py")
    init_default_scope(config.default_scope)
    return MODELS.build(without_pretrained(config.model)), config


def moments(pruner: Pruner, schedule: Schedule) -> Iterator[tuple[str, int, int]]:
    """Kinds of decisions behind the first: name, how many there are, and a step to take one at."""
    length = (schedule.epochs if pruner.by_epoch else schedule.iterations) or 0
    due = [step for step in range(length + 1) if pruner.due(step)]
    final = [schedule.iterations] if pruner.decides_after and schedule.iterations in due else []
    ends = getattr(pruner, "_ends_epoch", None)
    epochs = [step for step in due if ends and ends(step) and step not in final]
    between = [step for step in due if step not in set(epochs) | set(final)]
    named = {"update": between, "after an epoch": epochs, "at the end": final}
    yield from ((kind, len(steps), steps[0]) for kind, steps in named.items() if steps)


def timed(compute: Callable[[], Decision]) -> tuple[float, Decision]:
    """CPU seconds of something, and what it gives."""
    begin = time.process_time()
    found = compute()
    return time.process_time() - begin, found


def measured(pruner: Pruner, module: nn.Module, kind: str, times: int, step: int | None) -> tuple[Cost, Decision]:
    """Take a decision, alone and from parts."""

    def decide() -> Decision:
        return pruner.start(module) if step is None else pruner.decide(module, step)

    alone, decision = timed(decide)
    costs = pruner.parts(step)
    parts = {name: timed(lambda name=name: pruner.part(module, step, name)) for name in costs}
    pruner.give_parts({name: part for name, (_, part) in parts.items()})
    rest, _ = timed(decide)
    pruner.give_parts({})
    sent = sum(tensor.numel() * tensor.element_size() for tensor in decision.values())
    seconds = {name: took for name, (took, _) in parts.items()}
    return Cost(kind, times, len(decision), sent, alone, seconds, costs, rest), decision


def costs_of(model: nn.Module, schedule: Schedule) -> tuple[list[Cost], float, int]:
    """Costs of each kind of decision; and seconds and bytes of what a rank tells the others."""
    pruner, module = model.pruner, pruned_module(model)
    pruner.set_schedule(schedule.epochs, schedule.iterations)
    first, decision = measured(pruner, module, "first", 1, None)
    pruner.commit(module, decision, 0)
    pruner.started.fill_(True)
    found = [first]
    found += [measured(pruner, module, kind, times, step)[0] for kind, times, step in moments(pruner, schedule)]
    check, told = timed(lambda: evidence(pruner, module))
    return found, check, len(pickle.dumps(told))


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="*", default=NAMES, help="names of configs, without .py")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64], help="of the training, all of them")
    parser.add_argument("--images-per-second", type=float, default=400.0, help="per GPU, of an ImageNet training")
    parser.add_argument("--detector-images-per-second", type=float, default=12.0, help="the same of Mask R-CNN")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    speeds = f"{args.images_per_second:g} and {args.detector_images_per_second:g} images/s/GPU"
    table = Table(title=f"pruning decisions, in seconds of one core; shares assume {speeds}", title_justify="left")
    columns = ["config", "decision", "times", "tensors", "kB sent", "s alone"]
    columns += [text for gpus in args.gpus for text in (f"s, {gpus} GPUs", "share")] + ["check s", "check kB/rank"]
    for column in columns:
        table.add_column(column, justify="left" if column in ("config", "decision") else "right")
    for name in args.configs:
        print(name, file=sys.stderr)
        model, config = build(name)
        schedule = schedule_of(config)
        found, check, told = costs_of(model, schedule)
        speed = args.detector_images_per_second if "rcnn" in name else args.images_per_second
        for cost in found:
            row = [name, cost.kind, f"{cost.times}", f"{cost.tensors}", f"{cost.sent / 1e3:,.1f}", f"{cost.alone:.2f}"]
            for gpus in args.gpus:
                seconds = cost.seconds(gpus)
                row += [f"{seconds:.2f}", f"{seconds * cost.times / (schedule.images / gpus / speed):.3%}"]
            table.add_row(*row, f"{check:.2f}", f"{told / 1e3:.1f}")
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
