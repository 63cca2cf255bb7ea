"""The channel graph: which channels are tied to which.

``trace(module, example_inputs)`` runs the module once in shadow and returns a :class:`ChannelGraph`. Knows torch only.
"""

from prune_mm.graph.folding import count_gathers, fold
from prune_mm.graph.grouping import ConvLayer
from prune_mm.graph.groups import ChannelGraph, ChannelGroup, Shortcut
from prune_mm.graph.trace import trace

__all__ = ["ChannelGraph", "ChannelGroup", "ConvLayer", "Shortcut", "count_gathers", "fold", "trace"]
