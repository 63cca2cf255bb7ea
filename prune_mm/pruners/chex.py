"""CHEX: channel exploration, repeated pruning and regrowing while a network trains.

Hou et al., CHEX: CHannel EXploration for CNN Model Compression, CVPR 2022, arXiv 2203.15794.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prune_mm.allocation import global_gamma_keep, uniform_keep
from prune_mm.criteria import WEIGHT_CRITERIA, l1_scores
from prune_mm.graph import ChannelGraph
from prune_mm.pruners.base import ChannelPruner, Decision, TensorBank
from prune_mm.pruners.chex_math import (
    rank_channels,
    regrow_residuals,
    regrow_share,
    sample_regrow,
    uniform_regrow,
    uniform_regrow_count,
)
from prune_mm.pruners.options import check_choice, check_flag, check_integer, check_positive, check_share
from prune_mm.pruners.target import Target
from prune_mm.pruners.uniform import top_mask
from prune_mm.pruners.units import Unit
from prune_mm.registry import PRUNERS
from prune_mm.structures.slots import along_axis, get_tensor

__all__ = ["CHEX", "regrow_residuals", "regrow_share"]


@PRUNERS.register_module()
class CHEX(ChannelPruner):
    """Prune and regrow channels every ``interval`` steps until ``end``, then keep the masks.

    An update ranks the channels of each layer, keeps as many as the target allows, restores the most recently used
    values of all dead channels, and regrows some of those that were not kept; the regrown share decays with a cosine
    to 0 at ``end``, where the target is met exactly.

    Args:
        target: budget of the scope. With ``channels=`` the published rule runs as it is (S = 1 - share); with
            ``macs=`` or ``params=`` the channel sparsity that meets the budget is found at every update.
        initial_regrow: regrown share of all channels at the start (delta_0).
        interval: steps between updates (delta_T).
        end: step of the last update (T_max), before which exploration is over; default: 0.75 of the training.
        by_epoch: whether ``interval`` and ``end`` count epochs or iterations.
        criterion: ``css`` (leverage scores), ``l1``, ``laplacian``, or ``si`` (spatial information of feature
            maps, collected from ``si_batches`` training batches at each update).
        allocation: how many channels each layer keeps: ``gamma`` (one threshold on the norm scales of all layers;
            a layer without a norm keeps the uniform share) or ``uniform``.
        regrow_allocation: how many channels each layer regrows: ``gamma`` or ``uniform``.
        dead_gamma: scale a dead channel has in the regrow allocation: ``zero`` as published (a layer then never
            grows beyond its present width), or ``last``, the most recently used one (a layer may grow).
        regrow: which channels come back: ``importance`` (sampled by what the kept ones cannot express) or
            ``uniform``.
        temperature: of the importance sampling.
        si_batches: training batches the ``si`` criterion looks at.
        min_channels: see :class:`~prune_mm.pruners.base.ChannelPruner`, as are the arguments after it.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """

    def __init__(
        self,
        target: dict | Target,
        initial_regrow: float = 0.3,
        interval: int = 2,
        end: int | None = None,
        by_epoch: bool = True,
        criterion: str = "css",
        allocation: str = "gamma",
        regrow_allocation: str = "gamma",
        dead_gamma: str = "zero",
        regrow: str = "importance",
        temperature: float = 1.0,
        si_batches: int = 100,
        min_channels: int = 1,
        round_to: int = 8,
        prune_shortcuts: bool = True,
        prune_stem: bool = False,
        prune_coupled: bool = False,
        ignore: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__(
            target, min_channels, round_to, prune_shortcuts, prune_stem, prune_coupled, ignore, seed
        )  # fmt: skip
        check_choice("criterion", criterion, (*WEIGHT_CRITERIA, "si"))
        check_choice("allocation", allocation, ("gamma", "uniform"))
        check_choice("regrow_allocation", regrow_allocation, ("gamma", "uniform"))
        check_choice("dead_gamma", dead_gamma, ("zero", "last"))
        check_choice("regrow", regrow, ("importance", "uniform"))
        check_integer("interval", interval, 1)
        check_integer("si_batches", si_batches, 1)
        check_share("initial_regrow", initial_regrow)
        check_positive("temperature", temperature)
        check_flag("by_epoch", by_epoch)
        if end is not None:
            check_integer("end", end, 1)
        self.initial_regrow, self.interval, self.end, self.by_epoch = initial_regrow, interval, end, by_epoch
        self.criterion, self.allocation, self.regrow_allocation = criterion, allocation, regrow_allocation
        self.dead_gamma, self.regrow, self.temperature = dead_gamma, regrow, temperature
        self.feature_batches = si_batches if criterion == "si" else 0
        self.recent = TensorBank()

    # -- life -------------------------------------------------------------------------------------------------

    def prepare(
        self, module: nn.Module, graph: ChannelGraph, shapes: dict[str, tuple[int, ...]], positions: dict[str, int]
    ) -> None:
        """Select units, and register masks and the most recently used values."""
        super().prepare(module, graph, shapes, positions)
        self._remember(module)

    def set_schedule(self, epochs: int | None, iterations: int) -> None:
        """Check ``end`` against the length of the training, or derive it."""
        unit = "epochs" if self.by_epoch else "iterations"
        length = epochs if self.by_epoch else iterations
        if length is None:
            raise ValueError("the training counts iterations: set by_epoch=False, and interval and end in iterations")
        if self.end is None:
            self.end = max(int(0.75 * length), 1)
        if self.end >= length:
            raise ValueError(
                f"end={self.end} (T_max) must be below the training length of {length} {unit}, "
                f"so that the final network trains"
            )
        if self.interval > self.end:
            raise ValueError(f"interval={self.interval} must not exceed end={self.end} {unit}")

    def start(self, module: nn.Module) -> Decision:
        """L1-ranked uniform masks at the target sparsity less the initial regrow share."""
        sparsity = max(self.uniform_sparsity() - self.initial_regrow, 0.0)
        counts = uniform_keep(self.widths, sparsity)
        counts = [max(count, min(self.min_channels, width)) for count, width in zip(counts, self.widths)]
        return {unit.name: top_mask(l1_scores(unit.rows(module)), keep) for unit, keep in zip(self.units, counts)}

    def due(self, step: int) -> bool:
        """Every ``interval`` steps from the first on, and exactly at ``end``."""
        return 1 <= step <= self.end and (step % self.interval == 0 or step == self.end)

    def settled(self) -> bool:
        """Whether exploration is over."""
        return self.end is not None and int(self.last_update) >= self.end

    @torch.no_grad()
    def decide(self, module: nn.Module, step: int, features: dict[str, Tensor] | None = None) -> Decision:
        """Keep the best channels of each layer and regrow some of the others."""
        generator = torch.Generator().manual_seed(hash_seed(self.seed, int(self.updates)))
        sparsity, keeps = self._kept_counts(module)
        grown = self._regrow_counts(module, keeps, sparsity, regrow_share(step, self.end, self.initial_regrow))
        restored = self._restored(module)
        decision = {}
        for unit, keep, count in zip(self.units, keeps, grown):
            scores = self._scores(unit, module, keep, features)
            order = rank_channels(scores).cpu()
            kept, pool = order[:keep], order[keep:]
            mask = torch.zeros(unit.channels, dtype=torch.bool)
            mask[kept] = True
            if count > 0:
                mask[pool[self._regrown(unit.rows(restored), kept, pool, count, generator)]] = True
            decision[unit.name] = mask
        return decision

    @torch.no_grad()
    def commit(self, module: nn.Module, decision: Decision, step: int) -> None:
        """Restore dead channels, remember all values, then mask."""
        for name, tensor in self._restored(module).items():
            get_tensor(module, name).copy_(tensor)
        self._remember(module)
        self.set_masks(decision)
        self.mask(module)

    # -- how many ---------------------------------------------------------------------------------------------

    def _kept_counts(self, module: nn.Module) -> tuple[float, list[int]]:
        """Channel sparsity S and the channels each unit keeps."""
        gammas = [unit.gamma(module) for unit in self.units]

        def counts_at(sparsity: float) -> list[int]:
            if self.allocation == "uniform":
                return uniform_keep(self.widths, sparsity)
            return self._by_gamma(gammas, sparsity)

        if self.target.kind == "channels" and isinstance(self.target.value, float):
            sparsity = 1.0 - self.target.value
            return sparsity, self.rounded(counts_at(sparsity))
        return self.fit(counts_at)

    def _regrow_counts(self, module: nn.Module, keeps: list[int], sparsity: float, share: float) -> list[int]:
        """Channels each unit regrows."""
        if share <= 0.0:
            return [0] * len(keeps)
        if self.regrow_allocation == "uniform":
            return [uniform_regrow_count(width, keep, share) for width, keep in zip(self.widths, keeps)]
        source = self._restored(module) if self.dead_gamma == "last" else None
        totals = self._by_gamma([unit.gamma(module, source) for unit in self.units], max(sparsity - share, 0.0))
        return [max(total - keep, 0) for total, keep in zip(totals, keeps)]

    def _by_gamma(self, gammas: list[Tensor | None], sparsity: float) -> list[int]:
        """Global threshold over the units that have a norm, the same share for those that have none."""
        counts = uniform_keep(self.widths, sparsity)
        ranked = [index for index, gamma in enumerate(gammas) if gamma is not None]
        for index, keep in zip(ranked, global_gamma_keep([gammas[index] for index in ranked], sparsity)):
            counts[index] = keep
        return counts

    # -- which ------------------------------------------------------------------------------------------------

    def _scores(self, unit: Unit, module: nn.Module, keep: int, features: dict[str, Tensor] | None) -> Tensor:
        """Scores of the masked weights; dead channels rank last."""
        if self.criterion == "si":
            assert features is not None, "the engine collects features for criterion='si'"
            return unit.per_channel(features[unit.name])
        return WEIGHT_CRITERIA[self.criterion](unit.rows(module), keep)

    def _regrown(self, rows: Tensor, kept: Tensor, pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Indices into ``pool`` of the channels that come back."""
        if self.regrow == "uniform":
            return uniform_regrow(len(pool), count, generator)
        residuals = regrow_residuals(rows, kept.to(rows.device), pool.to(rows.device))
        return sample_regrow(residuals, count, generator, self.temperature).cpu()

    # -- most recently used values ----------------------------------------------------------------------------

    def _remember(self, module: nn.Module) -> None:
        for name in {slot.tensor: None for unit in self.units for slot in unit.slots}:
            self.recent.put(name, get_tensor(module, name))

    def _restored(self, module: nn.Module) -> dict[str, Tensor]:
        """All tensors with slots, dead channels holding their most recently used values."""
        tensors: dict[str, Tensor] = {}
        for unit in self.units:
            keep = self.masks[unit.name].cpu()
            for slot in unit.slots:
                tensor = tensors.get(slot.tensor)
                tensor = get_tensor(module, slot.tensor).detach() if tensor is None else tensor
                alive = along_axis(slot.kept(keep).to(tensor.device), slot.axis, tensor.ndim)
                tensors[slot.tensor] = torch.where(alive, tensor, self.recent[slot.tensor].to(tensor))
        return tensors


def hash_seed(seed: int, number: int) -> int:
    """A seed for update ``number`` that no other (seed, number) shares in practice."""
    return (seed * 1_000_003 + number * 7_919 + 12_345) % (2**63)
