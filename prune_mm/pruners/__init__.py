"""Who decides what to prune, and when: one file a method."""

from prune_mm.pruners.base import ChannelPruner, Decision, Pruner
from prune_mm.pruners.chex import CHEX
from prune_mm.pruners.gconv import GConvPrune
from prune_mm.pruners.grouping import GroupPruner
from prune_mm.pruners.hinge import Hinge
from prune_mm.pruners.onexn import OneByN
from prune_mm.pruners.strucspars import StrucSpars
from prune_mm.pruners.target import Target
from prune_mm.pruners.uniform import RandomChannels, UniformL1

__all__ = [
    "CHEX",
    "ChannelPruner",
    "Decision",
    "GConvPrune",
    "GroupPruner",
    "Hinge",
    "OneByN",
    "Pruner",
    "RandomChannels",
    "StrucSpars",
    "Target",
    "UniformL1",
]
