"""Write ``docs/matrix.md``: every method on every task, with what the dense and the compact network cost.

``python docs/make_matrix.py`` builds the model of each config without weights, and asks its pruner what will be left;
nothing is trained. Published numbers come from ``docs/published.json``, where each is tagged ``(paper)``.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matrix_costs import Cost, Goal, dense_cost, figure, goal_of
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.progress import track

from prune_mm.engine.exporter import build_prunable
from prune_mm.engine.launch import run_tool
from prune_mm.engine.prunable import image_size
from prune_mm.engine.stages import compact_config, dense_config
from prune_mm.files import write_text_atomically
from prune_mm.pruners import GConvPrune, Hinge, Pruner

ROOT = Path(__file__).resolve().parents[1]
MATRIX, PUBLISHED = ROOT / "docs" / "matrix.md", ROOT / "docs" / "published.json"

#: Per task its configs, each with its demo.
TASKS: dict[str, dict[str, str]] = {
    "ResNet-50 classifier": {
        "chex_resnet50": "chex_resnet18",
        "strucspars_resnet50": "strucspars_resnet18",
        "gconv_resnet50": "gconv_resnet18",
        "hinge_resnet50": "hinge_resnet18",
        "onexn_resnet50": "onexn_mobilenet",
    },
    "SSD": {
        "chex_ssd_r50": "chex_ssd",
        "chex_ssd300": "chex_ssd",
        "strucspars_ssd_r50": "strucspars_ssd",
        "gconv_ssd_r50": "gconv_ssd",
        "hinge_ssd300": "hinge_ssd",
        "onexn_ssd300": "onexn_ssd",
    },
    "Mask R-CNN": {
        "chex_maskrcnn_r50": "chex_maskrcnn",
        "strucspars_maskrcnn_r50": "strucspars_maskrcnn",
        "gconv_maskrcnn_r50": "gconv_maskrcnn",
        "hinge_maskrcnn_r50": "hinge_maskrcnn",
        "onexn_maskrcnn_r50": "onexn_maskrcnn",
    },
}

HEAD = """\
# Methods and tasks

Every method on a ResNet-50 classifier, an SSD and a Mask R-CNN, each config with its demo: what the dense network
costs, what the config aims at, how it is trained, and what was published. `python docs/make_matrix.py` writes this
file; it builds each model and asks its pruner, and trains nothing.

**MACs** are the multiply-adds of convolution and linear weights in one forward of one image of the size given; biases,
norms, activation functions and pooling are not counted. **Params** are the elements of all parameters. *Backbone* is
what is pruned; *model* is the whole network: with neck and classifier, or with neck and SSD head. Of Mask R-CNN the box
head is counted for as many proposals as a test takes (`test_cfg.rpn.max_per_img`) and the mask head for as many
detections as it returns (`test_cfg.rcnn.max_per_img`); both are given below the table.

An arrow leads from the dense network to the compact one, and the percentage is what stays. **≤** is a budget that the
method meets or stays below; two numbers are bounds, between which the weights decide; without a sign the number follows
from the config alone. **open** is what the target does not fix. All of it is arithmetic on the config: no accuracy of
ours is in this file. Under *training*, *dense* is what trains before pruning, *pruned* the run that prunes, *compact*
the fine-tuning of what it leaves; the number of GPUs is the one that the learning rate is for.
"""


# -- one config ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One config of the matrix."""

    name: str
    config: Config
    pruner: Pruner
    cost: Cost
    goal: Goal

    @property
    def link(self) -> str:
        """The config, as a link from the docs."""
        return f"[`{self.name}`](../configs/{self.name}.py)"

    def cost_line(self) -> str:
        """Line of the table of costs."""
        height, width = image_size(self.config.model.input_size)
        cells = [self.link, self.target(), f"{height}x{width}"]
        for part in ("backbone", "model"):
            cells += [self._change(kind, part) for kind in ("macs", "params")]
        return line(cells)

    def target(self) -> str:
        """What was asked for."""
        if isinstance(self.pruner, GConvPrune) and self.pruner.target is None:
            return f"{self.pruner.source} groups"
        return str(self.pruner.target)

    def _change(self, kind: str, part: str) -> str:
        costs, span = getattr(self.cost, kind), getattr(self.goal, kind)
        added = self.cost.outside(kind) if part == "model" else 0
        dense = costs["backbone"] + added
        if span is None:
            return f"{figure(dense)} → open"
        if span.low is None:
            return f"{figure(dense)} → ≤ {figure(span.high + added)} ({share(span.high + added, dense)})"
        found = list(dict.fromkeys(figure(bound + added) for bound in (span.low, span.high)))
        shares = list(dict.fromkeys(share(bound + added, dense) for bound in (span.low, span.high)))
        return f"{figure(dense)} → {' to '.join(found)} ({' to '.join(shares)})"

    def training_line(self) -> str:
        """Line of the table of trainings."""
        stages = [("pruned", self.config)]
        if "pretrain" in self.config:
            stages.insert(0, ("dense", staged(dense_config(self.config), self.config.pretrain)))
        if "finetune" in self.config:
            stages.append(("compact", staged(compact_config(self.config), self.config.finetune)))
        limit = "at most " if isinstance(self.pruner, Hinge) else ""
        told = [f"{name}: {limit * (config is self.config)}{length(config)}" for name, config in stages]
        return line([self.link, batch(self.config), start(self.config), "; ".join(told)])

    def notes(self) -> list[str]:
        """Sentences below the table of costs."""
        return [f"{self.link}: {self.goal.note}."] if self.goal.note else []


def build(name: str, path: Path | None = None) -> Cell:
    """Build what a config describes, without weights.

    Args:
        name: path below ``configs``, without its ending.
        path: of the config, where it is another.
    """
    config = Config.fromfile(path or ROOT / "configs" / f"{name}.py")
    pruner, cost = build_prunable(config).pruner, dense_cost(config)
    return Cell(name, config, pruner, cost, goal_of(pruner, cost))


def staged(base: Config, settings: Any) -> Config:
    """The config of a further stage, as ``tools/compress.py`` makes it."""
    base.merge_from_dict(settings.to_dict())
    return base


def length(config: Config) -> str:
    """How long, at which learning rate and weight decay."""
    loop, optimizer = config.train_cfg, config.optim_wrapper.optimizer
    if loop.get("max_iters"):
        text = f"{loop.max_iters:,} iterations"
    else:
        dataset = config.train_dataloader.dataset
        times = f" of {dataset.times} passes" if dataset.type == "RepeatDataset" else ""
        text = f"{loop.max_epochs} epochs{times}"
    return f"{text}, {optimizer.type} lr {optimizer.lr:.4g}, wd {optimizer.get('weight_decay', 0):.3g}"


def batch(config: Config) -> str:
    """GPUs times images: what the learning rate is for."""
    images = config.train_dataloader.batch_size
    return f"{config.auto_scale_lr.base_batch_size // images} x {images}"


def start(config: Config) -> str:
    """What the first stage starts from."""
    if config.get("load_from"):
        return "trained model"
    inner = config.model.model
    trained = [(part.get("init_cfg") or {}) for part in (inner.backbone, inner.get("head") or {})]
    found = [isinstance(init, dict) and init.get("type") == "Pretrained" for init in trained]
    whole = all(found) or (inner.get("init_cfg") or {}).get("type") == "Pretrained"
    return "trained model" if whole else "trained backbone" if found[0] else "random weights"


# -- text ---------------------------------------------------------------------------------------------------------


def share(part: int, whole: int) -> str:
    """A percentage."""
    return f"{part / whole * 100:.1f} %"


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def table(columns: Sequence[str], lines: Sequence[str]) -> list[str]:
    """A table."""
    return [line(columns), line(["---"] * len(columns)), *lines, ""]


def published_lines(entries: Sequence[dict]) -> list[str]:
    """Lines of the table of published numbers, each tagged ``(paper)`` in the file."""
    return [
        line([entry["method"], *(entry[key] or "" for key in ("model", "cost", "result", "source"))])
        for entry in entries
    ]


def region_notes(cells: Sequence[Cell]) -> list[str]:
    """How many regions the heads of two-stage detectors were counted for, and how much of a model that is."""
    found = {}
    for cell in cells:
        if cell.cost.regions is not None:
            boxes, masks = cell.cost.regions
            part = share(cell.cost.macs["roi_head"], sum(cell.cost.macs.values()))
            demos = "demos" if cell.name.startswith("demo/") else "configs"
            found[demos] = f"{boxes:,} proposals and {masks:,} detections in the {demos}, {part} of the dense MACs"
    return [f"Counted for {'; '.join(found.values())}."] if found else []


def section(task: str, cells: Sequence[Cell], published: Sequence[dict]) -> list[str]:
    """One task: costs, trainings, published numbers."""
    notes = [*region_notes(cells), *(note for cell in cells for note in cell.notes())]
    costs = ("config", "target", "input", "backbone MACs", "backbone params", "model MACs", "model params")
    trainings = ("config", "GPUs x images", "starts from", "training")
    return [
        f"## {task}",
        "",
        *table(costs, [cell.cost_line() for cell in cells]),
        *(f"* {note}" for note in notes),
        "",
        *table(trainings, [cell.training_line() for cell in cells]),
        *table(("method", "published model", "cost", "result", "source"), published_lines(published)),
    ]


def names_of(task: str) -> list[str]:
    """Configs of a task, each followed by its demo."""
    return list(dict.fromkeys(name for own, demo in TASKS[task].items() for name in (own, f"demo/{demo}")))


def main() -> None:
    """Build everything, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(MATRIX), help="file to write")
    out = parser.parse_args().out
    quiet()
    published = json.loads(PUBLISHED.read_text())
    names = [name for task in TASKS for name in names_of(task)]
    cells = {name: build(name) for name in track(names, description="building models")}
    text = [HEAD]
    for task in TASKS:
        text += section(task, [cells[name] for name in names_of(task)], published[task])
    write_text_atomically(out, "\n".join(text).rstrip() + "\n")
    print(f"wrote {out}")


def quiet() -> None:
    """No word about scopes that change from config to config."""
    warnings.simplefilter("ignore")
    MMLogger.get_current_instance().setLevel("ERROR")


if __name__ == "__main__":
    run_tool(main)
