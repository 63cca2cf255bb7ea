"""GConv Prune: a trained network's convolutions become grouped ones in one shot, and train on.

Zhao and Luk, Efficient Structured Pruning and Architecture Searching for Group Convolution, ICCV-W 2019,
arXiv 1811.09341.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from prune_mm.graph import ChannelGraph, ConvLayer
from prune_mm.pruners.base import Decision
from prune_mm.pruners.gconv_math import METHODS, find_groups, find_outputs, group_sort, kernel_norms_l2
from prune_mm.pruners.group_config import layer_of, match_groups_to_layers, mcpg, read_groups
from prune_mm.pruners.group_search import search_groups
from prune_mm.pruners.grouping import TARGETS, GroupPruner, joined, per_base
from prune_mm.pruners.options import check_choice, check_flag, check_integer
from prune_mm.pruners.target import Target
from prune_mm.registry import PRUNERS

__all__ = ["GConvPrune", "group_sort", "search_groups"]


@PRUNERS.register_module()
class GConvPrune(GroupPruner):
    """One shot: each layer's channels are sorted so that the diagonal blocks hold most of the kernels' norm.

    Decided from the weights as loaded, so load trained ones (``load_from``). Masks are set then and stay; training
    with them is the published fine-tuning. The number of groups comes from exactly one of ``groups``,
    ``channels_per_group`` and ``target``.

    Args:
        groups: one number for all layers; or a table from layer name to number; or the path of a JSON or Python
            config with one, such as ``tools/search_groups.py`` and the authors' code write.
        channels_per_group: as many groups as leave this many channels of the wider side in each (published as MCPG).
        target: budget of the scope, ``dict(params=0.5)``, ``dict(macs=0.5)`` or ``dict(weights=0.5)``: the numbers
            are searched when the weights are loaded; see :func:`~prune_mm.pruners.group_search.search_groups`.
        min_channels: least channels of a group, of the search; with very few, layers of little norm end in thin groups.
        max_groups: most groups of a layer, of the search.
        search_cost: what the search keeps low: as published ``mean``, the mean over layers of the lost share of each,
            which may sacrifice a few large ones; or ``total``, the lost share of the norm of all layers together, which
            divides layers of few kernels most.
        method: how channels are sorted: ``GRPS`` (the paper's group sort), ``SORT``, ``SAME`` (not at all),
            ``RANDOM``.
        sort_iters: iterations per group of ``GRPS`` (N_S).
        faithful: use the published result as it is, which may keep less than no sorting at all; by default the best
            of several sortings is used.
        indivisible: what to do with a layer whose channels one number of groups for all does not divide: ``error``
            or ``skip``.
        share_orders: see :class:`~prune_mm.pruners.grouping.GroupPruner`, as are the arguments after it.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """

    def __init__(
        self,
        groups: int | Mapping[str, int] | str | None = None,
        channels_per_group: int | None = None,
        target: dict | Target | None = None,
        min_channels: int = 1,
        max_groups: int = 64,
        search_cost: str = "mean",
        method: str = "GRPS",
        sort_iters: int = 10,
        faithful: bool = False,
        indivisible: str = "error",
        share_orders: bool = False,
        ignore: Sequence[str] = (),
        include_frozen: bool = False,
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__(share_orders, ignore, include_frozen, seed)
        given = {"groups": groups, "channels_per_group": channels_per_group, "target": target}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"give one of groups, channels_per_group and target, got {given}")
        check_choice("method", method, METHODS)
        check_choice("search_cost", search_cost, ("total", "mean"))
        check_choice("indivisible", indivisible, ("error", "skip"))
        check_integer("sort_iters", sort_iters, 0)
        check_integer("min_channels", min_channels, 1)
        check_integer("max_groups", max_groups, 1)
        check_flag("faithful", faithful)
        if isinstance(groups, int):
            check_integer("groups", groups, 2)
        if channels_per_group is not None:
            check_integer("channels_per_group", channels_per_group, 1)
        self.source = groups
        self.channels_per_group = channels_per_group
        self.target = None if target is None else Target.parse(target, TARGETS)
        self.min_channels, self.max_groups, self.search_cost = min_channels, max_groups, search_cost
        self.method, self.sort_iters, self.faithful, self.indivisible = method, sort_iters, faithful, indivisible

    def prepare(
        self, module: nn.Module, graph: ChannelGraph, shapes: dict[str, tuple[int, ...]], positions: dict[str, int]
    ) -> None:
        """Select layers, and the numbers of groups where they are given."""
        super().prepare(module, graph, shapes, positions)
        self.register_buffer("kept", torch.ones((), dtype=torch.float64))
        if self.target is not None:
            self.target.check(self.cost.dense(self.target.kind))
            self._check_reach()
            return
        self.chosen = self._given_groups()
        if all(groups == 1 for groups in self.chosen):
            raise ValueError(f"{self._source()} leaves every layer dense")

    def _source(self) -> str:
        if self.channels_per_group is not None:
            return f"channels_per_group={self.channels_per_group}"
        return f"groups={self.source!r}" if not isinstance(self.source, Mapping) else "groups"

    def _given_groups(self) -> list[int]:
        """Groups per layer from what the user gave.

        Raises:
            ValueError: naming the layer, when it is unknown, stays dense, or cannot be divided so.
        """
        if self.channels_per_group is not None:
            return [mcpg(layer.rows, layer.columns, self.channels_per_group) for layer in self.layers]
        if isinstance(self.source, int):
            return [self._uniform(layer, self.source) for layer in self.layers]
        sizes = {layer.name: (layer.rows, layer.columns) for layer in self.layers}
        entries = {}
        for key, entry in read_groups(self.source).items():
            name = layer_of(key, dict.fromkeys([*sizes, *self.left_dense]))
            if name in sizes:
                entries[key] = entry
            elif entry.groups > 1:
                raise ValueError(f"groups: '{name}' cannot be divided into groups: {self.left_dense[name]}")
        found = match_groups_to_layers(entries, sizes)
        return [found[layer.name] for layer in self.layers]

    def _uniform(self, layer: ConvLayer, groups: int) -> int:
        if layer.rows % groups == 0 and layer.columns % groups == 0:
            return groups
        if self.indivisible == "skip":
            self.left_dense[layer.name] = f"{layer.rows} outputs and {layer.columns} inputs not divisible by {groups}"
            return 1
        raise ValueError(
            f"groups={groups} does not divide the {layer.rows} outputs and {layer.columns} inputs of '{layer.name}'; "
            f"give a table of groups per layer, ignore=['{layer.name}'], or indivisible='skip'"
        )

    # -- search -----------------------------------------------------------------------------------------------

    def _check_reach(self) -> None:
        """Raise ValueError when the most groups everywhere are not enough."""
        kind = self.target.kind
        most = [
            max(g for g in layer.choices() if g <= self.max_groups and self._wide_enough(layer, g))
            for layer in self.layers
        ]
        least, dense = self.cost.of(kind, most), self.cost.dense(kind)
        if least > self.target.budget(dense):
            raise ValueError(
                f"target {self.target} is out of reach: with min_channels={self.min_channels} and "
                f"max_groups={self.max_groups} the scope cannot be smaller than {least / dense:.1%} of its "
                f"{self.target.noun}"
            )

    def _wide_enough(self, layer: ConvLayer, groups: int) -> bool:
        return groups == 1 or min(layer.rows, layer.columns) // groups >= self.min_channels

    def _searched_groups(self, module: nn.Module) -> list[int]:
        """Numbers of groups within the budget that keep the most."""
        kind, names = self.target.kind, [layer.name for layer in self.layers]
        dense, parts = self.cost.dense(kind), self.cost.parts(kind)
        # Any cost that a weight contributes per element serves as multiply-adds at so many positions.
        weights = {layer.name: self.weight(module, layer).detach().cpu() for layer in self.layers}
        found = search_groups(
            weights,
            None,
            self.min_channels,
            max_macs=int(self.target.budget(dense)),
            fixed_macs=dense - sum(parts),
            positions={name: part // weights[name].numel() for name, part in zip(names, parts)},
            bases={layer.name: layer.base for layer in self.layers},
            max_groups=self.max_groups,
            allow_depthwise=True,
            relative=self.search_cost == "mean",
        )
        return [found[name] for name in names]

    # -- life -------------------------------------------------------------------------------------------------

    def start(self, module: nn.Module) -> Decision:
        """Sort the channels of every layer."""
        groups = self.chosen if self.target is None else self._searched_groups(module)
        decision: Decision = {"groups": torch.tensor(groups)}
        chosen = {layer.name: number for layer, number in zip(self.layers, groups)}
        kept = total = 0.0
        for layer, number in zip(self.layers, groups):
            scores = kernel_norms_l2(self.weight(module, layer)).cpu()
            maker = self._makers.get(layer.name)
            # Blocks of a multiple of as many groups lie one behind the other, too.
            if maker is not None and chosen[maker] % number == 0:
                found = [find_outputs(scores, number, decision[f"out:{maker}"])]
            else:
                found = [
                    find_groups(part, number, self.method, self.sort_iters, best=not self.faithful, seed=self.seed)
                    for part in per_base(layer, scores)
                ]
            decision[f"out:{layer.name}"] = joined([part.out_perm for part in found])
            decision[f"in:{layer.name}"] = joined([part.in_perm for part in found])
            kept += sum(part.kept for part in found)
            total += float(scores.sum())
        decision["kept"] = torch.tensor(kept / total if total else 1.0, dtype=torch.float64)
        return decision

    def commit(self, module: nn.Module, decision: Decision, step: int) -> None:
        """Set groups and masks."""
        self.take_over(decision)
        self.kept.copy_(decision["kept"])
        self.masked.fill_(True)
        self.mask(module)

    def status(self) -> dict[str, float]:
        """Shares of MACs and parameters that are left, and of the kernels' L2 norms at the start."""
        return super().status() | {"kept_norm": float(self.kept)}
