"""StrucSpars: convolutions become grouped ones while a network trains, and learn how to shuffle their channels.

Zhang et al., Structured Sparsification with Joint Optimization of Group Convolution and Channel Shuffle, UAI 2021,
arXiv 2002.08127.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune_mm.graph import ChannelGraph, ConvLayer
from prune_mm.pruners.assignment import alternate_emd, solve_outputs, solve_permutations
from prune_mm.pruners.base import Decision, epoch_length
from prune_mm.pruners.grouping import TARGETS, GroupPruner, joined, parts_of, per_base
from prune_mm.pruners.options import check_flag, check_integer, check_positive, check_share
from prune_mm.pruners.strucspars_images import norm_image
from prune_mm.pruners.strucspars_math import (
    active_coefficient,
    bisect_threshold,
    cost_matrix,
    depth,
    find_threshold,
    group_level,
    kernel_norms,
    level_of_masses,
    next_coefficient,
    regularizer,
    tier_masses,
)
from prune_mm.pruners.target import Target
from prune_mm.registry import PRUNERS

#: Share of the wanted saving below which a search that has ended is said to have failed.
_LEAST_FOUND = 0.5

__all__ = ["StrucSpars", "cost_matrix", "find_threshold", "group_level", "solve_permutations"]


@PRUNERS.register_module()
class StrucSpars(GroupPruner):
    """Sort the channels of each convolution towards diagonal blocks, and push what lies outside to zero.

    While the network trains, a structured L1 term is added to the gradients of kernels outside the blocks; from time
    to time the channels are sorted again, each layer's level (2^(level - 1) groups) is read off, and the strength of
    the term is adjusted so that the target is met at the end. After the last iteration one threshold for all layers is
    found that meets the target, and the kernels outside the groups are masked. Export that, and fine-tune the compact
    model. As published, train with a constant learning rate and without weight decay.

    Args:
        target: budget of the scope, ``dict(macs=0.5)`` or ``dict(params=0.5)``; or, as published,
            ``dict(weights=0.65)``: the share of the groupable weights that stays (1 - prune-percent).
        warmup: epochs before the term sets in.
        delta: step of the coefficient of the term, and its first value (delta-lambda).
        threshold: share of a layer's norm that a level may lose while the network trains (sparse-thres, p).
        power: how much weaker the term is from tier to tier (decay factor).
        initial_rounds: at most so many alternations of the assignment at the start,
        rounds: at the end of each epoch,
        interval: every so many iterations (None: only after epochs)
        interval_rounds: at most so many.
        epoch_iters: iterations that count as an epoch in a training that counts none.
        max_groups: most groups a layer may get; None: as many as its channels allow.
        faithful: levels and assignments exactly as the published code computes them (it never uses the deepest level,
            and alternates with POT's exact transport).
        share_orders: see :class:`~prune_mm.pruners.grouping.GroupPruner`, as are the arguments after it.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """

    by_epoch = False
    decides_after = True
    needs_training = True

    def __init__(
        self,
        target: dict | Target,
        warmup: int = 5,
        delta: float = 2e-6,
        threshold: float = 0.1,
        power: float = 0.5,
        initial_rounds: int = 50,
        rounds: int = 20,
        interval: int | None = 500,
        interval_rounds: int = 5,
        epoch_iters: int | None = None,
        max_groups: int | None = None,
        faithful: bool = False,
        share_orders: bool = False,
        ignore: Sequence[str] = (),
        include_frozen: bool = False,
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__(share_orders, ignore, include_frozen, seed)
        self.target = Target.parse(target, TARGETS)
        check_integer("warmup", warmup, 0)
        check_positive("delta", delta)
        check_share("threshold", threshold)
        check_positive("power", power)
        if power > 1.0:
            raise ValueError(f"power={power!r} must be in (0, 1]")
        for name, value in (
            ("initial_rounds", initial_rounds),
            ("rounds", rounds),
            ("interval_rounds", interval_rounds),
        ):
            check_integer(name, value, 1)
        for name, value in (("interval", interval), ("epoch_iters", epoch_iters), ("max_groups", max_groups)):
            if value is not None:
                check_integer(name, value, 1)
        check_flag("faithful", faithful)
        self.warmup, self.delta, self.threshold, self.power = warmup, float(delta), float(threshold), float(power)
        self.initial_rounds, self.rounds = initial_rounds, rounds
        self.interval, self.interval_rounds = interval, interval_rounds
        self.epoch_iters, self.max_groups, self.faithful = epoch_iters, max_groups, faithful
        self.epochs = self.total = 0
        self._strengths: dict[str, Tensor] = {}
        self._given: dict[str, Decision] = {}

    def prepare(
        self, module: nn.Module, graph: ChannelGraph, shapes: dict[str, tuple[int, ...]], positions: dict[str, int]
    ) -> None:
        """Select layers whose channels can be halved, and register levels and the state of the controller."""
        super().prepare(module, graph, shapes, positions)
        self.deepest = [self._deepest(layer) for layer in self.layers]
        for layer, deepest in zip(self.layers, self.deepest):
            if deepest == 1:
                self.left_dense[layer.name] = f"{layer.rows} outputs and {layer.columns} inputs cannot both be halved"
        self.register_buffer("levels", torch.ones(len(self.layers), dtype=torch.int64))
        self.register_buffer("epochs_done", torch.tensor(0))
        self.register_buffer("coefficient", torch.tensor(self.delta, dtype=torch.float64))
        self.register_buffer("last_sparsity", torch.zeros((), dtype=torch.float64))
        self.register_buffer("final_threshold", torch.full((), -1.0, dtype=torch.float64))
        self._check_reach()

    def _deepest(self, layer: ConvLayer) -> int:
        halvings = depth(layer.rows, layer.columns)
        levels = max(halvings, 1) if self.faithful else halvings + 1
        return levels if self.max_groups is None else min(levels, self.max_groups.bit_length())

    def _check_reach(self) -> None:
        kind = self.target.kind
        dense = self.cost.dense(kind)
        self.target.check(dense)
        least = self.cost.of(kind, [2 ** (level - 1) for level in self.deepest])
        if least > self.target.budget(dense):
            raise ValueError(
                f"target {self.target} is out of reach: with as many groups as its channels"
                f"{'' if self.max_groups is None else f' and max_groups={self.max_groups}'} allow, the scope still has "
                f"{least / dense:.1%} of its {self.target.noun}"
            )

    def set_schedule(self, epochs: int | None, iterations: int) -> None:
        """Learn the length of the training."""
        given = self.epoch_iters or (self.interval if epochs is None else None)
        length = epoch_length(epochs, iterations, given)
        epochs = epochs or max(iterations // length, 1)
        if epochs <= self.warmup:
            raise ValueError(f"warmup={self.warmup} must end before the training, which has {epochs} epochs")
        self.epochs, self.total, self._length = epochs, iterations, length

    # -- life -------------------------------------------------------------------------------------------------

    def parts(self, step: int | None) -> dict[str, float]:
        """Layers are sorted one by one, but for those that take the order of another."""
        free = [layer for layer in self.layers if layer.name not in self._makers]
        return {layer.name: float(layer.base * layer.rows * layer.columns) for layer in free}

    def part(self, module: nn.Module, step: int | None, name: str) -> Decision:
        """Permutations of one layer."""
        layer = next(layer for layer in self.layers if layer.name == name)
        return self._sorted_layer(module, layer, self._rounds_at(step))

    def give_parts(self, computed: dict[str, Decision]) -> None:
        """Permutations that other ranks have found."""
        self._given = dict(computed)

    def _rounds_at(self, step: int | None) -> int:
        if step is None:
            return self.initial_rounds
        return self.rounds if self._ends_epoch(step) else self.interval_rounds

    def start(self, module: nn.Module) -> Decision:
        """Sort the channels for the first time."""
        return self._sorted(module, self._rounds_at(None)) | self._controller()

    def due(self, step: int) -> bool:
        """Every ``interval`` iterations, and after each epoch."""
        between = self.interval is not None and step % self.interval == 0
        return step > 0 and not bool(self.masked) and (between or self._ends_epoch(step))

    def _ends_epoch(self, step: int) -> bool:
        return step == self.total or (step % self._length == 0 and step // self._length < self.epochs)

    def decide(self, module: nn.Module, step: int, features: dict[str, Tensor] | None = None) -> Decision:
        """Sort again; after an epoch also read off the levels, and adjust the coefficient; at the end conclude."""
        decision = self._sorted(module, self._rounds_at(step))
        if not self._ends_epoch(step):
            return decision | self._controller()
        masses = self._masses(module, decision)
        levels = self._levels(masses, self.threshold)
        sparsity = self._sparsity(levels)
        epoch = int(self.epochs_done)
        coefficient = next_coefficient(
            float(self.coefficient),
            sparsity,
            float(self.last_sparsity),
            self._wanted(),
            min(epoch, self.epochs - 1),
            self.epochs,
            self.warmup,
            self.delta,
        )
        decision |= self._controller(levels, epoch + 1, coefficient, sparsity)
        if step != self.total:
            return decision
        self._warn_of_a_late_cut(sparsity)
        return self._final(decision, masses)

    def commit(self, module: nn.Module, decision: Decision, step: int) -> None:
        """Take over permutations, levels and the controller; mask when the decision is final."""
        self.take_over(decision)
        for name in ("levels", "epochs_done", "coefficient", "last_sparsity", "final_threshold", "masked"):
            getattr(self, name).copy_(decision[name])
        self.mask(module)

    @torch.no_grad()
    def before_step(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Add the structured L1 to the gradients, which are unscaled by now."""
        strength = self.strength()
        if strength == 0.0:
            return
        for index, layer in enumerate(self.layers):
            weight = self.weight(module, layer)
            if weight.grad is not None and self.deepest[index] > 1:
                weight.grad.add_(weight.sign() * self._regularizer(index, weight), alpha=strength)

    def settled(self) -> bool:
        """Whether the search has ended."""
        return bool(self.masked)

    def strength(self) -> float:
        """Coefficient of the term that is in force now."""
        if bool(self.masked) or not bool(self.started):
            return 0.0
        return active_coefficient(float(self.coefficient), int(self.epochs_done), self.warmup)

    def conclude(self, module: nn.Module) -> bool:
        """Find the final threshold now, when the search has not ended."""
        if bool(self.masked):
            return False
        present = dict(self.perms.items()) | self._controller()
        self.commit(module, self._final(present, self._masses(module, present)), 0)
        return True

    # -- parts ------------------------------------------------------------------------------------------------

    def _sorted(self, module: nn.Module, rounds: int) -> Decision:
        """Permutations of every layer, from the present ones on."""
        decision: Decision = {}
        for layer in self.layers:
            maker = self._makers.get(layer.name)
            if maker is None:
                decision |= self._given.get(layer.name) or self._sorted_layer(module, layer, rounds)
                continue
            # Levels halve one order again and again, so blocks of every level lie one behind the other in it.
            norms, order = kernel_norms(self.weight(module, layer)).cpu(), decision[f"out:{maker}"]
            tied = solve_outputs(norms, order, self.power, self.perms[f"out:{layer.name}"].cpu())
            decision[f"out:{layer.name}"], decision[f"in:{layer.name}"] = tied.out_perm, order
        return decision

    def _sorted_layer(self, module: nn.Module, layer: ConvLayer, rounds: int) -> Decision:
        """Permutations of one layer."""
        solve = alternate_emd if self.faithful else solve_permutations
        norms = kernel_norms(self.weight(module, layer)).cpu()
        starts = zip(*(parts_of(self.perms[f"{side}:{layer.name}"].cpu(), layer.base) for side in ("out", "in")))
        found = [solve(part, self.power, rounds, start=s) for part, s in zip(per_base(layer, norms), starts)]
        sides = {"out": [part.out_perm for part in found], "in": [part.in_perm for part in found]}
        return {f"{side}:{layer.name}": joined(perms) for side, perms in sides.items()}

    def _ordered(self, module: nn.Module, layer: ConvLayer, perms: Decision) -> list[Tensor]:
        """Ordered kernel norms, one matrix per group the layer has."""
        norms = kernel_norms(self.weight(module, layer)).cpu()
        rows, columns = (parts_of(perms[f"{side}:{layer.name}"].cpu(), layer.base) for side in ("out", "in"))
        return [part[p][:, q] for part, p, q in zip(per_base(layer, norms), rows, columns)]

    def _masses(self, module: nn.Module, perms: Decision) -> list[np.ndarray]:
        """Norms per tier of every layer, over all groups it has."""
        return [sum(tier_masses(part) for part in self._ordered(module, layer, perms)) for layer in self.layers]

    def _levels(self, masses: Sequence[np.ndarray], threshold: float) -> list[int]:
        found = (max(level_of_masses(m, threshold, self.faithful), 1) for m in masses)
        return [min(level, deepest) for level, deepest in zip(found, self.deepest)]

    def _sparsity(self, levels: Sequence[int]) -> float:
        """Share of the budgeted cost that groups of these levels save."""
        kind = self.target.kind
        return 1.0 - self.cost.of(kind, [2 ** (level - 1) for level in levels]) / self.cost.dense(kind)

    def _wanted(self) -> float:
        dense = self.cost.dense(self.target.kind)
        return 1.0 - self.target.budget(dense) / dense

    def _controller(
        self,
        levels: Sequence[int] | None = None,
        epochs_done: int | None = None,
        coefficient: float | None = None,
        sparsity: float | None = None,
    ) -> Decision:
        """State of the controller as part of a decision; None: as it is."""
        chosen = self.levels.cpu() if levels is None else torch.tensor(levels)
        return {
            "levels": chosen,
            "groups": 2 ** (chosen - 1),
            "epochs_done": self.epochs_done.cpu() if epochs_done is None else torch.tensor(epochs_done),
            "coefficient": _float(self.coefficient if coefficient is None else coefficient),
            "last_sparsity": _float(self.last_sparsity if sparsity is None else sparsity),
            "final_threshold": _float(self.final_threshold),
            "masked": self.masked.cpu(),
        }

    def _final(self, decision: Decision, masses: Sequence[np.ndarray]) -> Decision:
        """The decision with the levels of one threshold for all layers that meets the target, and masks."""
        threshold = bisect_threshold(lambda t: self._sparsity(self._levels(masses, t)), self._wanted())
        levels = torch.tensor(self._levels(masses, threshold))
        final = {"levels": levels, "groups": 2 ** (levels - 1), "final_threshold": _float(threshold)}
        return decision | final | {"masked": torch.tensor(True)}

    def _warn_of_a_late_cut(self, sparsity: float) -> None:
        """Say so when the search itself has saved little: the threshold then removes weights that never shrank."""
        if sparsity < _LEAST_FOUND * self._wanted():
            warnings.warn(
                f"StrucSpars: the search ended with {sparsity:.0%} of the {self.target.kind} saved, of "
                f"{self._wanted():.0%} that are wanted; the rest is cut at once, from weights that have not shrunk. "
                f"Raise delta={self.delta:g}, or search for more epochs than {self.epochs}.",
                stacklevel=2,
            )

    def _pushed(self, index: int) -> int:
        """How many tiers of a layer the term covers: those its level removes and the next, if it may go there."""
        level = int(self.levels[index])
        return level if self.faithful else min(level, self.deepest[index] - 1)

    def _regularizer(self, index: int, weight: Tensor) -> Tensor:
        """Strength of the term on each kernel, ``(outputs, inputs / base, 1, ...)``."""
        layer = self.layers[index]
        found = self._strengths.get(layer.name)
        if found is None or found.device != weight.device:
            level = self._pushed(index)
            rows, columns = (parts_of(self.perms[f"{side}:{layer.name}"].cpu(), layer.base) for side in ("out", "in"))
            found = torch.cat([regularizer(p, q, level, self.power) for p, q in zip(rows, columns)]).to(weight)
            found = found.view(*found.shape, *[1] * (weight.ndim - 2))
            self._strengths[layer.name] = found
        return found

    def _forget(self) -> None:
        super()._forget()
        self._strengths = {}

    # -- what people see --------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """Coefficient in force, sparsity the controller saw, mean number of groups, final threshold once found."""
        found = {
            "coefficient": self.strength(),
            "sparsity": float(self.last_sparsity),
            "mean_groups": float(self.groups.double().mean()),
        }
        return found | ({"final_threshold": float(self.final_threshold)} if bool(self.masked) else {})

    def images(self, module: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
        """Per layer the ordered norms beside the regulariser (the first group of a grouped layer)."""
        perms = dict(self.perms.items())
        for index, layer in enumerate(self.layers):
            ordered = self._ordered(module, layer, perms)[0].numpy()
            strengths = cost_matrix(layer.rows, layer.columns, self._pushed(index), self.power)
            yield layer.name, norm_image(ordered, strengths.numpy())


def _float(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).cpu().clone()
