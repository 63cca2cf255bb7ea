"""What each operator does to the shadows: one small function a rule, one table from operator to rule.

An operator without a rule freezes the channels it reads, and its name is the reason in the graph. Nothing is guessed.
"""

from prune_mm.graph.rules import layers, movement, norms, pointwise, reductions
from prune_mm.graph.rules.table import RULES, apply_rule

__all__ = ["RULES", "apply_rule", "layers", "movement", "norms", "pointwise", "reductions"]
