"""Channels that carry what removed ones emit: they stay constants while the network trains on."""

from __future__ import annotations

import copy

import pytest
import torch
from graph.channel_law import randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_mm.analysis.complexity import layer_positions
from prune_mm.graph import trace
from prune_mm.pruners import Hinge
from prune_mm.pruners.hinge_constants import carried_by, carry_constants
from prune_mm.structures.plan import compact_stage

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Inner(nn.Module):
    """A convolution whose outputs stay inside, behind a norm, and are read under zero padding."""

    def __init__(self, width, bias):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, width, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x):
        return self.b(self.norm(self.a(self.stem(x).relu())).relu())


def prepared(width, bias, seed):
    """A network with its matrices, and the unit of the inner channels."""
    module = randomised(Inner(width, bias), seed)
    pruner = Hinge({"macs": 1.0}, min_share=0.01)
    graph = trace(module, IMAGE[:1])
    compact_stage(module, pruner.attach(module, graph))
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    pruner.prepare(module, trace(module, IMAGE[:1]), shapes, layer_positions(module, IMAGE[:1]))
    pruner.set_schedule(4, 20)
    pruner.commit(module, pruner.start(module), 0)
    return module, next(unit for unit in pruner.units if unit.prunes_outputs)


@torch.no_grad()
def silenced(module, unit, keep):
    """The network with the groups at zero, and what carries for them; what it computed before."""
    for part in unit.parts(module):
        part[~keep] = 0.0
    expected = module(IMAGE)
    return expected, carry_constants(module, (IMAGE[:1],), unit, keep)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(3, 7), st.booleans(), st.integers(0, 1000), st.data())
def test_the_function_stays_and_the_norm_holds_the_constant(width, bias, seed, data):
    module, unit = prepared(width, bias, seed)
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=width, max_size=width).filter(any)))
    expected, kept = silenced(module, unit, keep)
    with torch.no_grad():
        difference = float((module(IMAGE) - expected).abs().max())
    assert difference < 1e-4 * float(expected.abs().max())
    carriers = (kept & ~keep).nonzero().flatten().tolist()
    assert len(carriers) <= 1
    for carrier in carriers:
        assert float(module.norm.weight[carrier].detach()) == 0.0
    assert bool((module.norm.weight[keep] != 0).all())


@pytest.mark.parametrize("bias", [False, True])
def test_a_large_step_leaves_the_constant_a_constant(bias):
    module, unit = prepared(6, bias, 3)
    keep = torch.tensor([True, False, True, True, False, False])
    _, kept = silenced(module, unit, keep)
    carrier = int((kept & ~keep).nonzero())
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(IMAGE).square().mean().backward()
    optimizer.step()
    assert not bool(module.a.pair.weight[carrier].any()), "the kernel of the carrier did not move"
    module.eval()
    seen = []
    module.b.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, carrier]))
    with torch.no_grad():
        module(IMAGE)
    assert float(seen[0].max() - seen[0].min()) == 0.0


def test_all_that_is_written_is_named():
    module, unit = prepared(5, False, 7)
    keep = torch.tensor([True, False, True, False, True])
    for part in unit.parts(module):
        part.data[~keep] = 0.0
    silent = copy.deepcopy(module.state_dict())
    carry_constants(module, (IMAGE[:1],), unit, keep)
    written = {name for name, value in module.state_dict().items() if not torch.equal(value, silent[name])}
    assert {"b.weight", "norm.weight", "norm.bias"} == written <= set(carried_by(module, unit))
