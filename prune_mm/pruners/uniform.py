"""Uniform magnitude pruning: the baseline every method is compared with."""

from __future__ import annotations

import torch
from torch import nn

from prune_mm.allocation import uniform_keep
from prune_mm.criteria import l1_scores
from prune_mm.pruners.base import ChannelPruner, Decision
from prune_mm.pruners.chex_math import rank_channels
from prune_mm.registry import PRUNERS


@PRUNERS.register_module()
class UniformL1(ChannelPruner):
    """One shot: every layer keeps the same share of channels, those with the largest L1 norm.

    Masks are set when the weights are loaded and stay. Source: Li et al., Pruning Filters for Efficient ConvNets,
    ICLR 2017. Arguments are those of :class:`~prune_mm.pruners.base.ChannelPruner`.
    """

    def start(self, module: nn.Module) -> Decision:
        """Rank every unit by the L1 norm of its rows."""
        counts = self.rounded(uniform_keep(self.widths, self.uniform_sparsity()))
        return {unit.name: top_mask(l1_scores(unit.rows(module)), keep) for unit, keep in zip(self.units, counts)}

    def commit(self, module: nn.Module, decision: Decision, step: int) -> None:
        """Set the masks."""
        self.set_masks(decision)
        self.mask(module)


def top_mask(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Boolean mask of the ``keep`` largest scores (ties: lower index first)."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[rank_channels(scores).cpu()[:keep]] = True
    return mask
