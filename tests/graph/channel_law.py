"""The one law, checked from outside: masked(x) == compact(x) for random decisions on a randomised network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from prune_mm.graph import ChannelGraph
from prune_mm.structures import ChannelSlice, Plan, ShortcutSlice, Structure

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors a module returns."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        return [t for value in outputs.values() for t in tensors(value)]
    if isinstance(outputs, (list, tuple)):
        return [t for value in outputs for t in tensors(value)]
    return tensors(vars(outputs)) if hasattr(outputs, "__dict__") else []


@torch.no_grad()
def randomised(module: nn.Module, seed: int) -> nn.Module:
    """A copy in eval mode in which no zero-initialised parameter hides a mistake."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        child.training = False
        names = ("weight", "bias", "running_mean", "running_var") if isinstance(child, NORMS) else ("gamma", "bias")
        for name in names:
            tensor = getattr(child, name, None)
            if isinstance(tensor, Tensor):
                low = -0.3 if name in ("bias", "running_mean") else 0.5
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return module


def random_mask(count: int, generator: torch.Generator) -> Tensor:
    """At least one channel stays; sometimes only one, sometimes all."""
    kind = float(torch.rand((), generator=generator))
    share = 0.0 if kind < 0.15 else 1.0 if kind < 0.3 else float(torch.rand((), generator=generator))
    mask = torch.rand(count, generator=generator) < share
    mask[int(torch.randint(count, (), generator=generator))] = True
    return mask


def random_stage(graph: ChannelGraph, seed: int, groups: bool = True, shortcuts: bool = True) -> tuple[Structure, ...]:
    """Random decisions about every prunable group and every shortcut."""
    generator = torch.Generator().manual_seed(seed)
    stage: list[Structure] = []
    for group in graph.prunable if groups else []:
        stage.append(ChannelSlice.from_mask(group.name, random_mask(group.channels, generator), group.slots))
    for cut in graph.shortcuts if shortcuts else []:
        mask = random_mask(cut.channels, generator)
        stage.append(ShortcutSlice.from_shortcut(cut.layer, mask, cut.slots, cut.end))
    return tuple(stage)


@torch.no_grad()
def assert_law(module: nn.Module, stage: tuple[Structure, ...], inputs: tuple, seed: int = 0) -> nn.Module:
    """Masked and compact forms agree, through JSON and in the shapes that were foretold; returns the compact form."""
    plan = Plan("", (stage,))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    subject = randomised(module, seed)
    plan.apply_masks(subject)
    expected = tensors(subject(*inputs))
    again.compact(subject)
    found = tensors(subject(*inputs))
    assert [t.shape for t in found] == [t.shape for t in expected]
    for want, got in zip(expected, found):
        assert torch.isfinite(want).all()
        scale = float(want.abs().max()) + 1e-12
        assert float((want - got).abs().max()) <= 2e-5 * scale
    foretold = plan.shapes({name: tuple(p.shape) for name, p in module.named_parameters()})
    assert foretold == {name: tuple(p.shape) for name, p in subject.named_parameters()}
    return subject


def assert_law_on_random_decisions(module: nn.Module, graph: ChannelGraph, inputs: tuple, seeds: int = 2) -> None:
    """Groups alone, shortcuts alone, both together."""
    for seed in range(seeds):
        assert_law(module, random_stage(graph, seed, shortcuts=False), inputs, seed)
        if graph.shortcuts:
            assert_law(module, random_stage(graph, seed, groups=False), inputs, seed)
            assert_law(module, random_stage(graph, seed), inputs, seed)


def assert_every_layer_is_accounted_for(module: nn.Module, graph: ChannelGraph) -> None:
    """Every convolution and linear layer is in a group, or listed with a reason; never both missing."""
    inside = {slot.module for group in graph.groups for slot in group.slots}
    for name, child in module.named_modules():
        if isinstance(getattr(child, "weight", None), nn.Parameter) and child.weight.ndim >= 2:
            assert name in inside or graph.unprunable.get(name), name
    assert not inside & set(graph.unprunable)
    assert all(group.frozen is None or len(group.frozen) > 5 for group in graph.groups)
