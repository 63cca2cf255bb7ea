"""1xN: blocks of N consecutive filters at one input channel stay or go together.

Lin et al., 1xN Pattern for Pruning Convolutional Neural Networks, TPAMI 2022, arXiv 2105.14713.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune_mm.graph import ChannelGraph, ChannelGroup
from prune_mm.graph.blocks import BlockLayer, find_block_layers
from prune_mm.pruners.base import Decision, Pruner, TensorBank
from prune_mm.pruners.onexn_math import (
    MASK_CRITERIA,
    Tail,
    block_mask,
    block_share,
    cubic_rate,
    filter_order,
)
from prune_mm.pruners.options import check_choice, check_flag, check_integer, check_matches, check_patterns
from prune_mm.registry import PRUNERS
from prune_mm.structures import BlockSparse, ChannelOrder, Structure
from prune_mm.structures.slots import get_tensor

__all__ = ["OneByN", "block_mask"]


@PRUNERS.register_module()
class OneByN(Pruner):
    """Mask the blocks with the smallest L1 norm, the same share in every layer, and train on with the masks.

    Decided from the weights as loaded, so load trained ones (``load_from``). As published, the stem, depthwise
    convolutions and the classifier stay dense.

    Args:
        n: filters of a block (N).
        rate: share of the blocks of a layer that goes.
        rates: other rates for some layers: regular expression of layer names to rate; the first that matches counts.
        kernels: ``pointwise`` (1x1 convolutions and linear layers: MobileNets) or ``all`` (k x k ones as well: ResNet).
        rearrange: sort the filters of each layer by norm, so that the filters of a block are alike, and re-order the
            network accordingly in the compact form. Layers whose outputs meet a residual add, a gate or the end of the
            scope stay in order.
        criterion: ``l1``; or a baseline: ``random`` blocks, ``kernel`` (N = 1), ``weight`` (single weights; no smaller
            where kernels are larger than 1x1), ``filter`` (whole filters).
        tail: where N does not divide the filters: ``dense`` (the last ones stay), ``pad`` (a smaller block) or
            ``error``.
        schedule: ``one_shot``, or ``gradual``: the rate grows to its value by a cubic from ``begin`` to ``end``, in
            updates every ``interval`` steps.
        begin: step of the first update of a gradual schedule.
        end: step of its last update.
        interval: steps between updates.
        by_epoch: whether these count epochs or iterations.
        ignore: regular expressions of layer names that stay dense.
        include_frozen: also prune layers whose weights do not train.
        seed: of the ``random`` criterion.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """

    must_be_last = True

    def __init__(
        self,
        n: int = 16,
        rate: float = 0.5,
        rates: Mapping[str, float] | None = None,
        kernels: str = "pointwise",
        rearrange: bool = False,
        criterion: str = "l1",
        tail: str = "dense",
        schedule: str = "one_shot",
        begin: int = 0,
        end: int | None = None,
        interval: int = 1,
        by_epoch: bool = True,
        ignore: Sequence[str] = (),
        include_frozen: bool = False,
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__()
        check_integer("n", n, 1)
        _check_rate("rate", rate)
        rates = dict(rates or {})
        check_patterns("rates", list(rates))
        for pattern, value in rates.items():
            _check_rate(f"rates[{pattern!r}]", value)
        check_choice("kernels", kernels, ("pointwise", "all"))
        check_choice("criterion", criterion, MASK_CRITERIA)
        check_choice("tail", tail, get_args(Tail))
        check_choice("schedule", schedule, ("one_shot", "gradual"))
        for name, flag in (("rearrange", rearrange), ("by_epoch", by_epoch), ("include_frozen", include_frozen)):
            check_flag(name, flag)
        check_integer("begin", begin, 0)
        check_integer("interval", interval, 1)
        check_integer("seed", seed, 0)
        check_patterns("ignore", ignore)
        if schedule == "gradual" and (end is None or end <= begin):
            raise ValueError(f"schedule='gradual' needs an end after begin={begin}, got end={end!r}")
        if schedule == "one_shot" and end is not None:
            raise ValueError(f"end={end!r} belongs to schedule='gradual'")
        if rearrange and criterion != "l1":
            raise ValueError(f"rearrange=True goes with criterion='l1', not with {criterion!r}")
        # The baselines' blocks are single kernels.
        self.n = n if criterion in ("l1", "random") else 1
        self.rate, self.rates, self.kernels = rate, rates, kernels
        self.rearrange, self.criterion, self.tail = rearrange, criterion, tail
        self.schedule, self.begin, self.end, self.interval, self.by_epoch = schedule, begin, end, interval, by_epoch
        self.ignore, self.include_frozen, self.seed = tuple(ignore), include_frozen, seed
        self.masks, self.perms = TensorBank(), TensorBank()
        self.layers: list[BlockLayer] = []
        self.left_dense: dict[str, str] = {}
        self._orders: dict[str, ChannelGroup] = {}
        self._device: torch.device | None = None

    # -- build ------------------------------------------------------------------------------------------------

    def prepare(
        self, module: nn.Module, graph: ChannelGraph, shapes: dict[str, tuple[int, ...]], positions: dict[str, int]
    ) -> None:
        """Select layers, and register dense masks."""
        found, self.left_dense = find_block_layers(module, graph.inputs, graph)
        names = [*self.left_dense, *(layer.name for layer in found)]
        for option, patterns in (("ignore", self.ignore), ("rates", self.rates)):
            check_matches(option, patterns, names)
        self.layers = [layer for layer in found if self._takes(layer)]
        if not self.layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.left_dense.items())[:8])
            raise ValueError(f"no layer can be made block-sparse: {reasons or 'there is none'}")
        for layer in self.layers:
            if self.tail == "error" and layer.shape[0] % self.n:
                raise ValueError(
                    f"n={self.n} does not divide the {layer.shape[0]} filters of '{layer.name}'; use tail='dense' or "
                    f"'pad', or ignore=['{layer.name}']"
                )
            self.masks.put(layer.name, torch.ones(layer.shape, dtype=torch.bool))
            self.perms.put(layer.name, torch.arange(layer.shape[0]))
        self._orders = self._orderable(graph) if self.rearrange else {}
        numel = {name: math.prod(shape) for name, shape in shapes.items()}
        self._places = {layer.name: positions.get(f"{layer.name}.weight", 0) for layer in self.layers}
        macs = sum(numel[name] * times for name, times in positions.items() if name in numel)
        self._dense = {"macs": macs, "params": sum(numel.values())}

    def _takes(self, layer: BlockLayer) -> bool:
        """Whether a layer is pruned; else why not is noted."""
        reason = None
        if layer.stem:
            reason = "reads the input of the scope"
        elif any(re.match(pattern, layer.name) for pattern in self.ignore):
            reason = "ignored"
        elif self.kernels == "pointwise" and not layer.is_pointwise:
            reason = "its kernels are larger than 1x1 (kernels='all' would prune it)"
        elif not layer.trains and not self.include_frozen:
            reason = "its weight does not train (include_frozen=True would prune it)"
        elif self._rate_of(layer) == 0.0:
            reason = "its rate is 0"
        if reason is not None:
            self.left_dense[layer.name] = reason
        return reason is None

    def _rate_of(self, layer: BlockLayer) -> float:
        return next((rate for pattern, rate in self.rates.items() if re.match(pattern, layer.name)), self.rate)

    def _orderable(self, graph: ChannelGraph) -> dict[str, ChannelGroup]:
        """Per layer the group of its outputs, where it alone makes them and they may be in any order."""
        found = {}
        for group in graph.orderable:
            depthwise = {slot.module for slot in group.slots if slot.role == "depthwise"}
            makers = [slot for slot in group.slots if slot.role == "out" and slot.module not in depthwise]
            whole = makers and makers[0].channels == tuple(range(group.channels))
            if len(makers) == 1 and whole and set(group.producers) <= {makers[0].module, *depthwise}:
                found[makers[0].module] = group
        return found

    @property
    def target(self) -> str:
        """What stays, for people."""
        pieces = {"kernel": "kernels", "weight": "weights", "filter": "filters"}
        return f"{1.0 - self.rate:.0%} of {pieces.get(self.criterion, f'{self.n} x 1 blocks')}"

    @property
    def regroups(self) -> bool:
        """Re-ordering must be tried when the graph is made."""
        return self.rearrange

    def set_schedule(self, epochs: int | None, iterations: int) -> None:
        """Check a gradual schedule against the length of the training."""
        if self.schedule == "one_shot":
            return
        length = epochs if self.by_epoch else iterations
        if length is None:
            raise ValueError("the training counts iterations: set by_epoch=False, and begin, end, interval likewise")
        if self.end >= length:
            unit = "epochs" if self.by_epoch else "iterations"
            raise ValueError(f"end={self.end} must be below the training length of {length} {unit}")

    # -- life -------------------------------------------------------------------------------------------------

    def start(self, module: nn.Module) -> Decision:
        """The masks, or for a gradual schedule none yet; and the order of the filters."""
        first = 1.0 if self.schedule == "one_shot" else 0.0
        return self._masks_at(module, first, fresh=True)

    def due(self, step: int) -> bool:
        """In a gradual schedule every ``interval`` steps from ``begin`` on, and at ``end``; later if that was missed.

        (A pruner of a list starts when the one before it has settled.)
        """
        if self.schedule == "one_shot" or step < self.begin:
            return False
        if step >= self.end:
            return int(self.last_update) < self.end
        return (step - self.begin) % self.interval == 0

    def decide(self, module: nn.Module, step: int, features: dict[str, Tensor] | None = None) -> Decision:
        """The masks of a gradual schedule at a step."""
        return self._masks_at(module, cubic_rate(step, self.begin, self.end, 1.0), fresh=False)

    def _masks_at(self, module: nn.Module, share: float, fresh: bool) -> Decision:
        """Masks at a share of each layer's rate; what is zero already stays so, in the order decided first."""
        decision: Decision = {}
        for index, layer in enumerate(self.layers):
            weight = self._weight(module, layer).detach()
            order = self.perms[layer.name].to(weight.device)
            if fresh and layer.name in self._orders:
                order = filter_order(weight)
            rate = self._rate_of(layer) * share
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            found = MASK_CRITERIA[self.criterion](weight[order], self.n, rate, False, self.tail, generator)
            mask = torch.empty_like(found.mask)
            mask[order] = found.mask
            decision[f"mask:{layer.name}"], decision[f"perm:{layer.name}"] = mask, order
        return decision

    def commit(self, module: nn.Module, decision: Decision, step: int) -> None:
        """Take over masks and orders."""
        for layer in self.layers:
            for kind, bank in (("mask", self.masks), ("perm", self.perms)):
                bank.put(layer.name, decision[f"{kind}:{layer.name}"].to(bank[layer.name].device))
        self.mask(module)

    def after_step(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Mask again what the optimizer moved."""
        self.mask(module)

    @torch.no_grad()
    def mask(self, module: nn.Module) -> None:
        """Zero the blocks that went."""
        for layer in self.layers:
            weight = self._weight(module, layer)
            weight.mul_(self.masks[layer.name].to(weight.device))

    def settled(self) -> bool:
        """Whether the rate has its final value."""
        return bool(self.started) and (self.schedule == "one_shot" or int(self.last_update) >= self.end)

    def _weight(self, module: nn.Module, layer: BlockLayer) -> Tensor:
        return get_tensor(module, f"{layer.name}.weight")

    # -- result -----------------------------------------------------------------------------------------------

    def structures(self) -> list[Structure]:
        """New orders of filters, and the blocks of each layer that lost some."""
        found: list[Structure] = []
        for layer in self.layers:
            perm = self.perms[layer.name].cpu()
            group = self._orders.get(layer.name)
            if group is not None and not torch.equal(perm, torch.arange(perm.numel())):
                found.append(ChannelOrder(group.name, tuple(perm.tolist()), group.slots))
        for layer in self.layers:
            kernels = self._kernels(layer).cpu()
            if not bool(kernels.all()):
                found.append(BlockSparse.from_mask(layer.name, self.n, kernels, self.perms[layer.name].cpu()))
        return found

    def _kernels(self, layer: BlockLayer) -> Tensor:
        """Boolean (O, I): kernels that stay because any weight of them does."""
        mask = self.masks[layer.name]
        return mask.flatten(2).any(2) if mask.ndim > 2 else mask

    def status(self) -> dict[str, float]:
        """Shares of MACs and parameters of the compact form, and of blocks that are not empty in pruned layers."""
        gone = {layer.name: int((~self._kernels(layer)).sum()) * math.prod(layer.shape[2:]) for layer in self.layers}
        macs = self._dense["macs"] - sum(count * self._places[name] for name, count in gone.items())
        blocks = [
            (block_share(self.masks[layer.name], self.n, self.perms[layer.name]), math.prod(layer.shape[:2]))
            for layer in self.layers
        ]
        return {
            "macs": macs / max(self._dense["macs"], 1),
            "params": 1.0 - sum(gone.values()) / max(self._dense["params"], 1),
            "blocks": sum(share * size for share, size in blocks) / max(sum(size for _, size in blocks), 1),
        }


def _check_rate(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r} must be a share in [0, 1]")
