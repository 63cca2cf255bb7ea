"""Uniform pruning: the baselines every method is compared with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prune_mm.allocation import uniform_keep
from prune_mm.criteria import l1_scores
from prune_mm.pruners.base import ChannelPruner, Decision
from prune_mm.pruners.chex_math import rank_channels
from prune_mm.registry import PRUNERS


class UniformPruner(ChannelPruner):
    """One shot: every layer keeps the same share of channels, those with the largest scores.

    Masks are set when the weights are loaded and stay. Arguments are those of
    :class:`~prune_mm.pruners.base.ChannelPruner`.
    """

    @abstractmethod
    def scores(self, module: nn.Module) -> Iterable[Tensor]:
        """Scores ``(channels,)`` of every unit, in the order of ``self.units``; the largest stay."""

    def start(self, module: nn.Module) -> Decision:
        """As many channels of each unit as the target allows."""
        counts = self.rounded(uniform_keep(self.widths, self.uniform_sparsity()))
        return {unit.name: top_mask(s, keep) for unit, s, keep in zip(self.units, self.scores(module), counts)}

    def commit(self, module: nn.Module, decision: Decision, step: int) -> None:
        """Set the masks."""
        self.set_masks(decision)
        self.mask(module)


@PRUNERS.register_module()
class UniformL1(UniformPruner):
    """One shot: every layer keeps the same share of channels, those with the largest L1 norm.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017. Arguments are those of
    :class:`~prune_mm.pruners.base.ChannelPruner`.
    """

    def scores(self, module: nn.Module) -> Iterable[Tensor]:
        """The L1 norm of each unit's rows."""
        return [l1_scores(unit.rows(module)) for unit in self.units]


@PRUNERS.register_module()
class RandomChannels(UniformPruner):
    """One shot: every layer keeps the same share of channels, drawn at random.

    As many as :class:`UniformL1` keeps. The draw is a function of ``seed`` alone: neither the weights nor what else
    the run draws matter. Arguments are those of :class:`~prune_mm.pruners.base.ChannelPruner`.
    """

    def scores(self, module: nn.Module) -> Iterable[Tensor]:
        """A random order of each unit's channels."""
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randperm(unit.channels, generator=generator) for unit in self.units]


def top_mask(scores: Tensor, keep: int) -> Tensor:
    """Boolean mask of the ``keep`` largest scores (ties: lower index first)."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[rank_channels(scores).cpu()[:keep]] = True
    return mask
