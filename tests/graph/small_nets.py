"""Networks of a few layers and a forward function, traced and checked against the law."""

import torch
from channel_law import assert_every_layer_is_accounted_for, assert_law_on_random_decisions
from torch import nn

from prune_mm.graph import trace

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers by name and a forward function."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def conv(rows, columns, kernel=3, **kwargs):
    return nn.Conv2d(columns, rows, kernel, padding=kernel // 2, **kwargs)


def traced(forward, x=X, **layers):
    """Trace, check that every layer is accounted for and that the law holds, return the graph."""
    torch.manual_seed(0)
    net = Net(forward, **layers)
    graph = trace(net, x)
    assert_every_layer_is_accounted_for(net, graph)
    assert_law_on_random_decisions(net, graph, (torch.randn(2, *x.shape[1:]),))
    return graph


def names(graph):
    return [group.name for group in graph.prunable]
