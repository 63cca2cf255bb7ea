"""Search of group counts: how many groups each layer gets, so that the network fits a budget and keeps the most.

Every layer has a few possible counts, each with its parameters, its multiply-adds and its cost, the share of kernel
norm that is lost. Costs add up over layers and do not depend on each other, so the search is a multiple-choice
knapsack problem. The published search (MAX_COST) climbs from the smallest network; here it gives the first answer,
which an exact method then improves.

Source: Zhao and Luk, "Efficient Structured Pruning and Architecture Searching for Group Convolution"
(arXiv 1811.09341), section 3.3, and the behaviour of its published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from prune_mm.pruners.gconv_math import find_groups, kernel_norms_l2
from prune_mm.pruners.knapsack import solve_knapsack
from prune_mm.pruners.options import check_choice, check_flag, check_integer
from prune_mm.pruners.target import Target

STRATEGIES = ("OPTIMAL", "MAX_COST")

Layers: TypeAlias = Mapping[str, "Tensor | np.ndarray"] | Iterable[tuple[str, "Tensor | np.ndarray"]]
Budget: TypeAlias = float | int | str


@dataclass(frozen=True)
class LayerChoices:
    """What one layer can become.

    Attributes:
        name: of the layer.
        shape: of its weight, (F, C, ...).
        positions: output positions of one forward; None when they were not given.
        norm: sum S of its kernel norms.
        counts: possible group counts, ascending, from 1.
        kept: the part K of the norm that each count keeps.
        costs: of each count; 0 for one group.
    """

    name: str
    shape: tuple[int, ...]
    positions: int | None
    norm: float
    counts: tuple[int, ...]
    kept: tuple[float, ...]
    costs: tuple[float, ...]

    @property
    def params(self) -> tuple[int, ...]:
        """Weights left by each count."""
        return tuple(math.prod(self.shape) // count for count in self.counts)

    @property
    def macs(self) -> tuple[int, ...]:
        """Multiply-adds left by each count; zeros without positions."""
        return tuple(size * (self.positions or 0) for size in self.params)


@dataclass(frozen=True)
class SearchStep:
    """A state that MAX_COST went through.

    Attributes:
        layer: whose count was lowered; None for the first state.
        before: its count before, 0 for the first state.
        after: its count now, 0 for the first state.
        cost: total cost of the state.
        params: parameters of the network.
        macs: multiply-adds of the network; None without positions.
    """

    layer: str | None
    before: int
    after: int
    cost: float
    params: int
    macs: int | None


@dataclass(frozen=True)
class GroupSearch:
    """What a search found, and on what grounds.

    Attributes:
        groups: the group count of every layer, in the order given.
        cost: total cost of that state.
        kept_ratio: its kept norm over the norm of all layers.
        params: parameters of the network in that state.
        macs: multiply-adds; None without positions.
        dense_params: parameters of the dense network.
        dense_macs: multiply-adds; None without positions.
        proven: whether no state within the budget is cheaper.
        trace: the states of MAX_COST.
        layers: what every layer could have become.
    """

    groups: dict[str, int]
    cost: float
    kept_ratio: float
    params: int
    macs: int | None
    dense_params: int
    dense_macs: int | None
    proven: bool
    trace: tuple[SearchStep, ...]
    layers: tuple[LayerChoices, ...]


def search_groups(
    layers: Layers, max_params: Budget | None, min_channels: int, fixed_params: int = 0, **options: Any
) -> dict[str, int]:
    """The group count of every layer that :func:`run_group_search` finds, which documents all arguments.

    Args:
        layers: weight (F, C, ...) by layer name, or pairs of the two.
        max_params: most parameters of the whole network, a number or a share in (0, 1]; None with ``max_macs=``.
        min_channels: fewest channels of a group, inputs and outputs alike.
        fixed_params: parameters of the network outside the weights of ``layers``.
        options: keyword arguments of :func:`run_group_search`.

    Returns:
        Group counts by layer name, in the order given.

    Raises:
        ValueError: naming what is wrong with an argument, or the smallest network when the budget is below it.
    """
    return run_group_search(layers, max_params, min_channels, fixed_params, **options).groups


def run_group_search(
    layers: Layers,
    max_params: Budget | None = None,
    min_channels: int = 1,
    fixed_params: int = 0,
    *,
    max_macs: Budget | None = None,
    fixed_macs: int = 0,
    positions: Mapping[str, int] | None = None,
    bases: Mapping[str, int] | None = None,
    max_groups: int = 64,
    allow_depthwise: bool = False,
    relative: bool = True,
    published: bool = False,
    strategy: str | None = None,
    sort_iters: int = 10,
    progress: Callable[[int, int], Any] | None = None,
) -> GroupSearch:
    """Choose group counts that keep the most kernel norm within a budget of parameters, multiply-adds, or both.

    Args:
        layers: weight (F, C, ...) by layer name, or pairs of the two.
        max_params: most parameters of the whole network: a number, text such as ``'1.44M'``, or a float in (0, 1] for
            a share of the dense network. None: any.
        min_channels: fewest channels of a group, inputs and outputs alike; 0 and 1 mean no limit.
        fixed_params: parameters of the network outside the weights of ``layers``: norms, biases, other layers.
        max_macs: most multiply-adds, likewise; needs ``positions``.
        fixed_macs: multiply-adds of the network outside ``layers``.
        positions: output positions of each layer in one forward.
        bases: groups that layers have already (absent: 1). Such a layer has a weight (F, C / base, ...), each of its
            groups is divided by itself, and all counts here are of the parts of one of them.
        max_groups: most groups of a layer.
        allow_depthwise: whether a layer may become depthwise (as many groups as inputs and outputs).
        relative: cost is the mean over layers of the lost share of each one's norm; otherwise the lost share of the
            norm of all layers together, in which layers with much norm weigh more.
        published: exactly the published search: costs of the published solver, divided once more by ||S||_F, and the
            first state *over* the budget.
        strategy: ``MAX_COST`` (all layers start at their largest count; whichever loses least cost by it goes back one
            count, while the budget holds) or ``OPTIMAL`` (its result, improved until no cheaper state within the
            budget is left). None: ``OPTIMAL``, or ``MAX_COST`` when ``published``.
        sort_iters: of :func:`~prune_mm.pruners.gconv_math.find_groups`.
        progress: called with the number of layers whose costs are known, and of all layers.

    Returns:
        The best state within the budget, its costs, and how it was found.

    Raises:
        ValueError: naming what is wrong with an argument, or the smallest network when the budget is below it.
    """
    strategy = strategy or ("MAX_COST" if published else "OPTIMAL")
    check_choice("strategy", strategy, STRATEGIES)
    if published and strategy != "MAX_COST":
        raise ValueError("published=True repeats the published search, which has strategy='MAX_COST' only")
    check_flag("relative", relative)
    check_integer("fixed_params", fixed_params, 0)
    check_integer("fixed_macs", fixed_macs, 0)
    if max_params is None and max_macs is None:
        raise ValueError("a budget is needed: max_params, max_macs or both")
    if max_macs is not None and positions is None:
        raise ValueError(f"max_macs={max_macs!r} needs positions, the output positions of every layer")
    tables = []
    pairs = _named_weights(layers)
    for name, weight in pairs.items():
        base = (bases or {}).get(name, 1)
        check_integer(f"bases['{name}']", base, 1)
        if weight.shape[0] % base:
            raise ValueError(f"bases['{name}']={base} does not divide its {weight.shape[0]} outputs")
        counts = candidate_groups(weight.shape[0] // base, weight.shape[1], min_channels, max_groups, allow_depthwise)
        places = None if positions is None else _positions_of(name, positions)
        tables.append(_layer_choices(name, weight, base, places, counts, relative, published, sort_iters))
        if progress is not None:
            progress(len(tables), len(pairs))
    problem = _Problem(tables, fixed_params, fixed_macs, max_params, max_macs, positions is not None, relative)
    return problem.solve(published, strategy)


def candidate_groups(
    out_channels: int, in_channels: int, min_channels: int = 1, max_groups: int = 64, allow_depthwise: bool = False
) -> list[int]:
    """Group counts a layer may have: the common divisors of its channels, within limits.

    Args:
        out_channels: F.
        in_channels: C.
        min_channels: fewest channels of a group, on either side.
        max_groups: most groups.
        allow_depthwise: whether G = F = C may be.

    Returns:
        Counts in ascending order; 1 is always among them.

    Raises:
        ValueError: naming what is wrong with an argument.

    Source: the published search.
    """
    check_integer("out_channels", out_channels, 1)
    check_integer("in_channels", in_channels, 1)
    check_integer("min_channels", min_channels, 0)
    check_integer("max_groups", max_groups, 1)
    check_flag("allow_depthwise", allow_depthwise)
    common, least = math.gcd(out_channels, in_channels), min(out_channels, in_channels)
    counts = [count for count in range(1, min(common, max_groups) + 1) if common % count == 0]
    if counts[-1] == out_channels == in_channels and not allow_depthwise:
        counts.pop()
    return [count for count in counts if least // count >= min_channels or count == 1] or [1]


def _named_weights(layers: Layers) -> dict[str, Tensor]:
    pairs = list(layers.items() if isinstance(layers, Mapping) else layers)
    found: dict[str, Tensor] = {}
    for name, weight in pairs:
        if name in found:
            raise ValueError(f"layer '{name}' is given twice")
        tensor = weight.detach() if isinstance(weight, Tensor) else torch.from_numpy(np.asarray(weight))
        if tensor.ndim < 2 or tensor.numel() == 0:
            raise ValueError(
                f"the weight of '{name}' has shape {tuple(tensor.shape)}; it must be (outputs, inputs, ...)"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the weight of '{name}' holds NaN or infinite values")
        found[name] = tensor
    if not found:
        raise ValueError("there are no layers to search group counts for")
    return found


def _positions_of(name: str, positions: Mapping[str, int]) -> int:
    if name not in positions:
        raise ValueError(f"positions lack the layer '{name}'")
    check_integer(f"positions['{name}']", positions[name], 0)
    return int(positions[name])


def _layer_choices(
    name: str,
    weight: Tensor,
    base: int,
    positions: int | None,
    counts: Sequence[int],
    relative: bool,
    published: bool,
    sort_iters: int,
) -> LayerChoices:
    """Solve the layer for every count."""
    scores = kernel_norms_l2(weight)
    norm, frobenius = float(scores.sum()), float(torch.linalg.vector_norm(scores))
    kept, costs = [], []
    for count in counts:
        parts = scores.chunk(base) if count > 1 else ()
        found = sum(find_groups(part, count, sort_iters=sort_iters, best=not published).kept for part in parts)
        lost = max(norm - found, 0.0) if count > 1 else 0.0
        kept.append(norm - lost)
        if published and norm:
            # The solver divides by the Frobenius norm of S, and the relative mode by its sum as well.
            lost /= frobenius
        costs.append(lost / norm if relative and norm else lost)
    return LayerChoices(name, tuple(weight.shape), positions, norm, tuple(counts), tuple(kept), tuple(costs))


class _Problem:
    """Layers, what each choice costs and takes, and what may be taken."""

    def __init__(
        self,
        layers: list[LayerChoices],
        fixed_params: int,
        fixed_macs: int,
        max_params: Budget | None,
        max_macs: Budget | None,
        has_positions: bool,
        relative: bool,
    ) -> None:
        self.layers, self.has_positions = layers, has_positions
        norm = sum(layer.norm for layer in layers)
        self.scale = 1.0 / len(layers) if relative else (1.0 / norm if norm else 0.0)
        self.fixed = np.array([fixed_params, fixed_macs], dtype=np.int64)
        self.sizes = [np.array([layer.params, layer.macs], dtype=np.int64).T for layer in layers]
        self.dense = self.total([0] * len(layers))
        self.smallest = [len(layer.counts) - 1 for layer in layers]
        self.limits = [
            (axis, parse_budget(name, given, int(self.dense[axis])))
            for axis, (name, given) in enumerate((("max_params", max_params), ("max_macs", max_macs)))
            if given is not None
        ]
        for axis, limit in self.limits:
            least = int(self.total(self.smallest)[axis])
            if limit < least:
                name, noun = (("max_params", "parameters"), ("max_macs", "MACs"))[axis]
                raise ValueError(
                    f"{name}={limit:,} is too restrictive: with every layer at its largest group count the network "
                    f"still has {least:,} {noun}; allow at least that, smaller groups (min_channels) or more of them"
                )

    def total(self, state: Sequence[int]) -> np.ndarray:
        """Parameters and multiply-adds of the network, int64 (2,); a state is an index into every layer's counts."""
        return self.fixed + sum(size[index] for size, index in zip(self.sizes, state))

    def cost(self, state: Sequence[int]) -> float:
        """Total cost."""
        return self.scale * math.fsum(layer.costs[index] for layer, index in zip(self.layers, state))

    def fits(self, state: Sequence[int]) -> bool:
        """Whether the state is within every budget."""
        total = self.total(state)
        return all(total[axis] <= limit for axis, limit in self.limits)

    def climb(self) -> list[list[int]]:
        """MAX_COST: the states from the smallest network to the first over the budget, or to the dense one."""
        state = list(self.smallest)
        states = [list(state)]
        while self.fits(state) and any(state):
            # Lowering the count that reduces the cost least leaves the maximum cost; of equals the first.
            gains = [layer.costs[k] - layer.costs[k - 1] if k else math.inf for layer, k in zip(self.layers, state)]
            state[gains.index(min(gains))] -= 1
            states.append(list(state))
        return states

    def solve(self, published: bool, strategy: str) -> GroupSearch:
        """Climb, and improve."""
        states = self.climb()
        within = [state for state in states if self.fits(state)][-1]
        best, proven = (states[-1] if published else within), not any(within)
        if strategy == "OPTIMAL" and not proven:
            axes = [axis for axis, _ in self.limits]
            capacity = np.array([limit - self.fixed[axis] for axis, limit in self.limits], dtype=np.int64)
            costs = [self.scale * np.array(layer.costs) for layer in self.layers]
            best, proven = solve_knapsack(costs, [size[:, axes] for size in self.sizes], capacity, within)
        params, macs = self.total(best).tolist()
        norm = sum(layer.norm for layer in self.layers)
        kept = math.fsum(layer.kept[index] for layer, index in zip(self.layers, best))
        return GroupSearch(
            groups={layer.name: layer.counts[index] for layer, index in zip(self.layers, best)},
            cost=self.cost(best),
            kept_ratio=kept / norm if norm else 1.0,
            params=params,
            macs=macs if self.has_positions else None,
            dense_params=int(self.dense[0]),
            dense_macs=int(self.dense[1]) if self.has_positions else None,
            proven=proven,
            trace=self._trace(states),
            layers=tuple(self.layers),
        )

    def _trace(self, states: list[list[int]]) -> tuple[SearchStep, ...]:
        steps, previous = [], None
        for state in states:
            layer, before, after = None, 0, 0
            if previous is not None:
                changed = next(i for i, (a, b) in enumerate(zip(previous, state)) if a != b)
                counts = self.layers[changed].counts
                layer, before, after = self.layers[changed].name, counts[previous[changed]], counts[state[changed]]
            params, macs = self.total(state).tolist()
            steps.append(
                SearchStep(layer, before, after, self.cost(state), params, macs if self.has_positions else None)
            )
            previous = state
        return tuple(steps)


def parse_budget(name: str, given: Budget, dense: int) -> int:
    """A budget as a whole number, in the unit of ``dense``.

    Args:
        name: of the option, for messages.
        given: a number, text such as ``'12M'``, or a float in (0, 1] for a share of ``dense``.
        dense: of the dense network.

    Raises:
        ValueError: naming the option, its value and what would be right.
    """
    if isinstance(given, Real) and not isinstance(given, (int, bool)) and 1.0 < given < math.inf:
        given = math.floor(given)
    try:
        target = Target.parse({"params": int(given) if isinstance(given, np.integer) else given})
    except ValueError as error:
        raise ValueError(str(error).replace("target params", name)) from None
    return target.value if isinstance(target.value, int) else math.floor(target.budget(dense))
