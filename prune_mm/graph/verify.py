"""Trust, but run it: cut a copy at random, and freeze the groups whose cut form computes something else."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from prune_mm.graph.groups import ChannelGraph, ChannelGroup
from prune_mm.graph.shadow import tensors_in
from prune_mm.structures.channel_slice import ChannelSlice
from prune_mm.structures.plan import compact_stage

#: Relative to the largest output; float32 round-off of deep nets is below 1e-5, a wrong cut is above 1e-2.
TOLERANCE = 1e-4


def freeze_what_fails(module: nn.Module, inputs: tuple, graph: ChannelGraph, seed: int = 0) -> None:
    """Freeze the groups of ``graph`` that cannot be cut exactly, with the reason.

    First everything is cut at once. Only when that fails are groups tried one by one: those that pass an operator
    with sizes first, since code that hard-codes a width does so there.
    """
    subject = _randomised_copy(module, seed)
    generator = torch.Generator().manual_seed(seed)
    if not graph.prunable or _failure(subject, inputs, graph.prunable, generator) is None:
        return
    for group in [g for g in graph.prunable if g.name in graph.fragile]:
        _freeze_if_failing(subject, inputs, graph, group, generator)
    if _failure(subject, inputs, graph.prunable, generator) is None:
        return
    for group in graph.prunable:
        _freeze_if_failing(subject, inputs, graph, group, generator)
    good: list[ChannelGroup] = []
    for group in graph.prunable:
        if _failure(subject, inputs, [*good, group], generator) is None:
            good.append(group)
        else:
            graph.freeze(group.name, "cannot be cut together with other groups")


def _freeze_if_failing(
    subject: nn.Module, inputs: tuple, graph: ChannelGraph, group: ChannelGroup, generator: torch.Generator
) -> None:
    # A hard-coded width can fit one random cut by luck, hardly two.
    for _ in range(2):
        failure = _failure(subject, inputs, [group], generator)
        if failure is not None:
            passed = graph.fragile.get(group.name)
            graph.freeze(group.name, f"the code fixes its width ({f'{passed}; ' if passed else ''}{failure})")
            return


def _failure(subject: nn.Module, inputs: tuple, groups: list[ChannelGroup], generator: torch.Generator) -> str | None:
    """Cut ``groups`` at random in a copy; None when masked and compact agree, else what went wrong."""
    slices = []
    for group in groups:
        keep = torch.rand(group.channels, generator=generator) < 0.6
        keep[int(torch.randint(group.channels, (1,), generator=generator))] = True
        if bool(keep.all()):
            keep[int(torch.randint(group.channels, (1,), generator=generator))] = False
        slices.append(ChannelSlice.from_mask(group.name, keep, group.slots))
    masked = copy.deepcopy(subject)
    for piece in slices:
        piece.apply_mask(masked)
    expected = _run(masked, inputs)
    try:
        compact_stage(masked, slices)
        found = _run(masked, inputs)
    except Exception as error:  # whatever the network's own code raises when its widths do not fit
        return f"cutting it raises {type(error).__name__}"
    if [t.shape for t in expected] != [t.shape for t in found]:
        return "cutting it changes the shape of the output"
    if not all(_close(a, b) for a, b in zip(expected, found)):
        return "cutting it changes the output"
    return None


def _close(expected: Tensor, found: Tensor) -> bool:
    if not expected.dtype.is_floating_point:
        return bool((expected == found).all())
    scale = float(expected.abs().max()) + 1e-12
    return bool(torch.isfinite(found).all()) and float((expected - found).abs().max()) <= TOLERANCE * scale


@torch.no_grad()
def _run(module: nn.Module, inputs: tuple) -> list[Tensor]:
    outputs: Any = module(*inputs)
    tree = outputs if isinstance(outputs, (Tensor, tuple, list, dict)) else vars(outputs)
    return tensors_in(tree)


@torch.no_grad()
def _randomised_copy(module: nn.Module, seed: int) -> nn.Module:
    """A copy in eval mode whose affine parameters and statistics hide nothing (zero-initialised gammas would)."""
    subject = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    for child in subject.modules():
        child.training = False
        if isinstance(child, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(child, name, None)
                if tensor is not None:
                    low = -0.3 if name in ("bias", "running_mean") else 0.5
                    tensor.copy_(low + torch.rand(tensor.shape, generator=generator).to(tensor))
    return subject
