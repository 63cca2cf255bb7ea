"""What a model costs: multiply-adds, parameters, bytes, milliseconds, and tables that compare two of them."""

from prune_mm.analysis.complexity import Complexity, layer_positions, measure_complexity
from prune_mm.analysis.latency import Latency, compare_latency
from prune_mm.analysis.table import comparison_table, to_markdown

__all__ = [
    "Complexity",
    "Latency",
    "compare_latency",
    "comparison_table",
    "layer_positions",
    "measure_complexity",
    "to_markdown",
]
