"""What the dense network of a config costs, and what its pruner will leave of it; for ``make_matrix.py``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from prune_mm.allocation import uniform_keep
from prune_mm.analysis.complexity import layer_positions
from prune_mm.engine.compact import without_pretrained
from prune_mm.engine.prunable import image_size
from prune_mm.pruners import CHEX, GConvPrune, Hinge, OneByN, Pruner, StrucSpars
from prune_mm.pruners.onexn_math import block_counts


@dataclass(frozen=True)
class Span:
    """Bounds of what is left of the backbone; ``low`` None: a budget."""

    high: int
    low: int | None = None


@dataclass(frozen=True)
class Goal:
    """What a pruner will leave of the backbone's MACs and params; None: its target does not fix it."""

    macs: Span | None
    params: Span | None
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """Dense cost of the parts of a model."""

    macs: dict[str, int]
    params: dict[str, int]
    #: Regions of the box head and of the mask head.
    regions: tuple[int, int] | None
    #: Output positions of the backbone's weights.
    positions: dict[str, int]

    def outside(self, kind: str) -> int:
        """Cost of everything but the backbone."""
        costs = getattr(self, kind)
        return sum(costs.values()) - costs["backbone"]


# -- dense cost ---------------------------------------------------------------------------------------------------


class Forward(nn.Module):
    """One forward of a whole model on fixed sizes, without what depends on values (proposals, suppression)."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap a classifier or a detector."""
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> None:
        """Run every layer on ``image`` (1, 3, H, W), and the heads of regions on as many as a test takes."""
        model = self.model
        features = model.extract_feat(image)
        if not hasattr(model, "roi_head"):
            (model.bbox_head if hasattr(model, "bbox_head") else model.head)(features)
            return
        model.rpn_head(features)
        for kind, count in zip(("bbox", "mask"), regions(model)):
            extractor = getattr(model.roi_head, f"{kind}_roi_extractor")
            sides = extractor.roi_layers[0].output_size
            getattr(model.roi_head, f"{kind}_head")(image.new_zeros(count, extractor.out_channels, *sides))


def regions(model: nn.Module) -> tuple[int, int] | None:
    """How many regions the box head and the mask head see in a test; None: there are none."""
    if not hasattr(model, "roi_head"):
        return None
    return model.test_cfg.rpn.max_per_img, model.test_cfg.rcnn.max_per_img


def dense_cost(config: Config) -> Cost:
    """Cost of the dense model of a config, whose default scope is set, by child of the model (``backbone``, ...)."""
    model = MODELS.build(without_pretrained(config.model.model))
    # The count runs without data, so a large image costs nothing.
    image = torch.empty(1, 3, *image_size(config.model.input_size), device="meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    macs, params, positions = Counter(), Counter(), {}
    for name, count in layer_positions(Forward(model), image).items():
        part, _, inner = name.removeprefix("model.").partition(".")
        # What is no parameter stands for multiply-adds as they are.
        macs[part] += sizes.get(f"{part}.{inner}", 1) * count
        if part == "backbone":
            positions[inner] = count
    for name, size in sizes.items():
        params[name.partition(".")[0]] += size
    return Cost(macs, params, regions(model), positions)


# -- what is left -------------------------------------------------------------------------------------------------


def chex_goal(pruner: CHEX) -> Goal:
    """With equal shares the widths are known; else a budget of MACs or params, which the last update meets."""
    counts = pruner.rounded(uniform_keep(pruner.widths, pruner.uniform_sparsity()))
    macs, params = (pruner.cost.of(kind, counts) for kind in ("macs", "params"))
    if pruner.allocation == "uniform":
        return Goal(Span(macs, macs), Span(params, params))
    if pruner.target.kind == "channels":
        return Goal(None, None, f"{figure(macs)} MACs and {figure(params)} params, if every layer kept the same share")
    return budget(pruner, pruner.cost.dense(pruner.target.kind))


def budget(pruner: CHEX | StrucSpars | GConvPrune | Hinge, dense: int) -> Goal:
    """A budget of MACs leaves params open, and the other way round."""
    span = Span(int(pruner.target.budget(dense)))
    return Goal(span, None) if pruner.target.kind == "macs" else Goal(None, span)


def group_budget(pruner: StrucSpars | GConvPrune) -> Goal:
    """A budget; one of the weights that can be divided is one of the params, too: nothing else goes."""
    dense = pruner.cost.dense(pruner.target.kind)
    if pruner.target.kind != "weights":
        return budget(pruner, dense)
    left = int(pruner.target.budget(dense))
    note = f"{figure(left)} of the {figure(dense)} weights of {len(pruner.layers)} convolutions stay at most"
    return Goal(None, Span(pruner.cost.dense("params") - dense + left), note)


def gconv_goal(pruner: GConvPrune) -> Goal:
    """Given groups fix everything; searched ones meet a budget."""
    if pruner.target is not None:
        return group_budget(pruner)
    macs, params = (pruner.cost.of(kind, pruner.chosen) for kind in ("macs", "params"))
    divided = sum(groups > 1 for groups in pruner.chosen)
    return Goal(Span(macs, macs), Span(params, params), f"{divided} convolutions are divided")


def hinge_goal(pruner: Hinge) -> Goal:
    """The threshold at the end of the search meets the budget."""
    return budget(pruner, pruner.dense_cost[pruner.target.kind])


def onexn_goal(pruner: OneByN, cost: Cost) -> Goal:
    """The rate fixes the blocks that go; padded blocks are smaller, and weights decide how many of those go.

    Raises:
        ValueError: for options that this does not count.
    """
    if pruner.rates or pruner.criterion != "l1":
        raise ValueError(
            f"rates={pruner.rates} and criterion={pruner.criterion!r} are not counted; give a rate and 'l1'"
        )
    gone = {"macs": [0, 0], "params": [0, 0]}
    for layer in pruner.layers:
        outputs, inputs, *kernel = layer.shape
        _, count = block_counts(outputs, inputs, pruner.n, pruner.rate, pruner.tail)
        full, rest = (outputs // pruner.n) * inputs, outputs % pruner.n
        small = inputs if rest and pruner.tail == "pad" else 0
        area = math.prod(kernel)
        most = min(count, full) * pruner.n + max(count - full, 0) * rest
        least = min(count, small) * rest + max(count - small, 0) * pruner.n
        for index, weights in enumerate((most * area, least * area)):
            gone["params"][index] += weights
            gone["macs"][index] += weights * cost.positions[f"{layer.name}.weight"]
    dense = {kind: getattr(cost, kind)["backbone"] for kind in gone}
    spans = {kind: Span(dense[kind] - least, dense[kind] - most) for kind, (most, least) in gone.items()}
    return Goal(**spans, note=f"{len(pruner.layers)} layers lose blocks")


def goal_of(pruner: Pruner, cost: Cost) -> Goal:
    """What a pruner will leave; see the functions above."""
    rules: dict[type, Callable[[Any], Goal]] = {
        CHEX: chex_goal,
        StrucSpars: group_budget,
        GConvPrune: gconv_goal,
        Hinge: hinge_goal,
        OneByN: lambda pruner: onexn_goal(pruner, cost),
    }
    return rules[type(pruner)](pruner)


def figure(value: int) -> str:
    """A count in giga or mega."""
    return f"{value / 1e9:,.3f} G" if value >= 10**9 else f"{value / 1e6:,.3f} M"
