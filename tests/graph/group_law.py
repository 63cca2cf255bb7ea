"""The law for convolutions that are divided into groups: masked == compact == compact with folded permutations."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from graph.channel_law import randomised, tensors
from torch import Tensor, nn

from prune_mm.graph import ChannelGraph, ConvLayer, count_gathers, fold
from prune_mm.structures import ChannelOrder, GroupedConv, Plan, Structure

#: How a random partition is made: ``as_is`` needs no gather, ``turned`` has blocks in another order.
KINDS = ("random", "as_is", "turned")


def random_perm(count: int, groups: int, kind: str, generator: torch.Generator) -> Tensor:
    """Channels of one side in the order of their blocks."""
    if kind == "random":
        return torch.randperm(count, generator=generator)
    blocks = torch.arange(count).reshape(groups, -1)
    return (blocks if kind == "as_is" else blocks[torch.randperm(groups, generator=generator)]).flatten()


def random_conv(
    layer: ConvLayer, generator: torch.Generator, groups: int | None = None, kinds: Sequence[str] = ("random",)
) -> GroupedConv:
    """A random division of a layer, each group it has into ``groups`` (None: any number that is possible)."""
    choices = layer.choices()[1:]
    groups = groups or choices[int(torch.randint(len(choices), (), generator=generator))]
    perms = []
    for width in (layer.rows, layer.columns):
        kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
        parts = [base * width + random_perm(width, groups, kind, generator) for base in range(layer.base)]
        perms.append(torch.cat(parts))
    return GroupedConv.from_perms(layer.name, layer.base * groups, *perms, base=layer.base)


def random_convs(graph: ChannelGraph, seed: int, kinds: Sequence[str] = ("random",)) -> list[GroupedConv]:
    """Random divisions of all convolutions of a graph."""
    generator = torch.Generator().manual_seed(seed)
    return [random_conv(layer, generator, kinds=kinds) for layer in graph.convs]


@torch.no_grad()
def assert_group_law(
    module: nn.Module, graph: ChannelGraph, convs: list[GroupedConv], inputs: tuple, seed: int = 0, rel: float = 2e-5
) -> tuple[nn.Module, list[Structure]]:
    """Masked, unfolded and folded agree, through JSON, in the foretold shapes; returns the folded form and stage."""
    plain, stage = Plan("", (tuple(convs),)), fold(convs, graph.orderable)
    folded = Plan("", (tuple(stage),))
    assert stage[len(stage) - len(convs) :] == convs
    assert count_gathers(stage) <= count_gathers(convs), "folding must not add gathers"
    frozen = {group.name for group in graph if group.frozen}
    assert not frozen & {structure.name for structure in stage if isinstance(structure, ChannelOrder)}
    subject = randomised(module, seed)
    dense = {name: tuple(p.shape) for name, p in subject.named_parameters()}
    reference = copy.deepcopy(subject)
    plain.apply_masks(reference)
    expected = tensors(reference(*inputs))
    assert all(bool(torch.isfinite(t).all()) for t in expected)
    for plan in (plain, folded):
        again = Plan.from_json(plan.to_json())
        assert again == plan
        compact = again.compact(copy.deepcopy(subject))
        found = tensors(compact(*inputs))
        assert [t.shape for t in found] == [t.shape for t in expected]
        for want, got in zip(expected, found):
            assert float((want - got).abs().max()) <= rel * (float(want.abs().max()) + 1e-12)
        assert plan.shapes(dense) == {name: tuple(p.shape) for name, p in compact.named_parameters()}
        if not gathers_of(subject):  # those of an earlier stage are merged with the new ones
            assert gathers_of(compact) == count_gathers(plan.stages[0])
    return compact, stage


def gathers_of(module: nn.Module) -> int:
    """Gathers that a live network makes."""
    return sum(hasattr(child, name) for child in module.modules() for name in ("gather_in", "gather_out"))
