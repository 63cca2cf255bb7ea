"""Hinge: group sparsity on a matrix behind each convolution, between filter pruning and decomposition.

Li et al., Group Sparsity: The Hinge Between Filter Pruning and Decomposition for Network Compression, CVPR 2020,
arXiv 2003.08935.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune_mm.graph import ChannelGraph
from prune_mm.pruners.base import ChannelPruner, Decision, epoch_length
from prune_mm.pruners.hinge_constants import carried_by, carry_constants, needs_carrier
from prune_mm.pruners.hinge_math import (
    INIT_METHODS,
    REGULARIZERS,
    annealed,
    balance_factor,
    group_norms,
    init_pair,
    penalty,
    prox_groups_,
    prox_scale,
    select_groups,
    top_groups,
)
from prune_mm.pruners.hinge_rates import MatrixRates
from prune_mm.pruners.hinge_search import best_threshold, published_threshold
from prune_mm.pruners.hinge_units import HingeCost, HingeUnit, find_pairs, find_units
from prune_mm.pruners.options import check_choice, check_flag, check_integer, check_positive, check_share
from prune_mm.pruners.target import Target
from prune_mm.registry import PRUNERS
from prune_mm.structures import ConvPair, Structure
from prune_mm.structures.pair import dense_kernel, dense_shapes, reset_unloaded_pair, set_pair
from prune_mm.structures.plan import count_macs
from prune_mm.structures.slots import get_tensor

__all__ = ["Hinge", "init_pair", "prox_scale", "select_groups"]

PLACEMENTS = ("auto", "rows", "both")


def _check_annealing(options: dict) -> None:
    if not isinstance(options, dict) or set(options) != {"factor", "high", "low"}:
        raise ValueError(f"annealing={options!r} must be a dict(factor=, high=, low=)")
    for name, value in options.items():
        check_positive(f"annealing {name}", value)
    if options["low"] >= options["high"]:
        raise ValueError(f"annealing: low={options['low']!r} must be below high={options['high']!r}")


@PRUNERS.register_module()
class Hinge(ChannelPruner):
    """Shrink rows and columns of a matrix A behind each convolution by proximal gradient, then drop the small ones.

    Rows of A are intermediate channels: without some, the convolution becomes a pair (k x k, then 1x1). Columns are
    outputs: without some, filters are pruned. After each epoch the cost of the would-be compact network is computed;
    when it is within ``stop_limit`` of the target, a threshold that meets the target is searched, what is below it is
    masked, and the training ends. Export that, and fine-tune the compact model.

    The matrices want a larger learning rate than the weights; as published, a hundred times it::

        optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.pair.weight': dict(lr_mult=100)}))

    Args:
        target: budget of the scope, ``dict(macs=0.5)`` or ``dict(params=0.5)``.
        placement: where A is. ``auto``: behind k x k convolutions: columns where the outputs stay inside a block, rows
            where they do not (basic blocks, wide ResNets); existing 1x1 convolutions play A where a block has them
            (bottlenecks: outputs of conv1, inputs of conv3), and cardinality groups go as a whole (ResNeXt).
            ``rows``: pairs everywhere, rows only (the published ``svd`` variants). ``both``: pairs everywhere, rows
            and, inside blocks, columns (VGG).
        pair_pointwise: also attach pairs to 1x1 convolutions (DenseNet's transitions).
        regularizer: ``l1``, ``l1-2``, ``l1d2``, ``logsum`` or ``l0``.
        strength: lambda, the regularisation factor.
        init_method: how a kernel is split into W and A: ``svd2``, ``svd``, ``p-identity``, ``p-random``, ``t-random``,
            ``p-disturbance-u`` or ``p-disturbance-n``.
        threshold: norm below which a group counts as gone while the cost is watched (theta).
        min_share: share of the groups of each matrix that always stays.
        stop_limit: how far above the target the watched cost may be when the search ends.
        same_ratio: keep the same share of the groups of a block's second matrix as of its first.
        layer_balancing: weigh the strength of each matrix with its mean group norm at the start.
        relative_threshold: count thresholds, the one watched and the one found, in mean group norms at the start of
            each matrix. Published is one absolute number for all layers; where their norms differ, it empties
            layers of small norms down to ``min_share`` and leaves others whole.
        lr_adjust: keep both matrices of a block shrinking at one pace: ``p1`` or ``p2`` as published, or None. Without
            matrices of both kinds there is nothing to adjust.
        annealing: ``dict(factor=2, high=10, low=5)``: divide the strength by ``factor`` once the first matrices'
            penalty, averaged over them, is at or below ``high``, twice at or below ``low``; None: not.
        q: power of the penalty that is annealed by.
        prox_interval: steps between proximal steps.
        epoch_iters: iterations that count as an epoch in a training that counts none.
        carry_constants: what removed outputs still emit through norm and activation goes on to reach the next layers,
            by one channel per group that emits for all of them. False: it is dropped.
        published_search: find the final threshold with the published steps, which may miss the target.
        ignore: regular expressions of layer names that stay as they are.
        include_frozen: also change layers whose weights do not train.
        seed: seed of random initialisations.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """

    by_epoch = False
    decides_after = True
    needs_training = True

    def __init__(
        self,
        target: dict | Target,
        placement: str = "auto",
        pair_pointwise: bool = False,
        regularizer: str = "l1",
        strength: float = 2e-4,
        init_method: str = "svd2",
        threshold: float = 5e-3,
        min_share: float = 0.2,
        stop_limit: float = 0.1,
        same_ratio: bool = False,
        layer_balancing: bool = False,
        relative_threshold: bool = False,
        lr_adjust: str | None = "p1",
        annealing: dict | None = None,
        q: float = 1.0,
        prox_interval: int = 1,
        epoch_iters: int | None = None,
        carry_constants: bool = True,
        published_search: bool = False,
        ignore: Sequence[str] = (),
        include_frozen: bool = False,
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__(Target.parse(target, ("macs", "params")), round_to=1, ignore=ignore, seed=seed)
        check_choice("placement", placement, PLACEMENTS)
        check_choice("regularizer", regularizer, REGULARIZERS)
        check_choice("init_method", init_method, INIT_METHODS)
        if lr_adjust is not None:
            check_choice("lr_adjust", lr_adjust, ("p1", "p2"))
        for name, flag in (
            ("pair_pointwise", pair_pointwise),
            ("same_ratio", same_ratio),
            ("layer_balancing", layer_balancing),
            ("relative_threshold", relative_threshold),
            ("carry_constants", carry_constants),
            ("published_search", published_search),
            ("include_frozen", include_frozen),
        ):
            check_flag(name, flag)
        for name, value in (("strength", strength), ("threshold", threshold), ("q", q)):
            check_positive(name, value)
        check_share("min_share", min_share)
        check_share("stop_limit", stop_limit)
        check_integer("prox_interval", prox_interval, 1)
        if epoch_iters is not None:
            check_integer("epoch_iters", epoch_iters, 1)
        if annealing is not None:
            _check_annealing(annealing)
        self.placement, self.pair_pointwise = placement, pair_pointwise
        self.regularizer, self.lambda_, self.init_method = regularizer, float(strength), init_method
        self.threshold, self.min_share, self.stop_limit = float(threshold), min_share, stop_limit
        self.same_ratio, self.layer_balancing, self.lr_adjust = same_ratio, layer_balancing, lr_adjust
        self.relative_threshold = relative_threshold
        self.annealing, self.q, self.prox_interval, self.epoch_iters = annealing, float(q), prox_interval, epoch_iters
        self.carry, self.published_search = carry_constants, published_search
        self.ignore, self.include_frozen = tuple(ignore), include_frozen
        self.pairs: dict[str, ConvPair] = {}
        self.left_dense: dict[str, str] = {}
        self._length: int | None = None
        self.merges = True
        for name, value in (("concluded", torch.tensor(False)), ("steps", torch.tensor(0))):
            self.register_buffer(name, value)
        # 0: there has been no ratio yet.
        self.register_buffer("ratio", torch.zeros((), dtype=torch.float64))
        self.register_buffer("watched", torch.ones((), dtype=torch.float64))
        self.register_buffer("found_threshold", torch.zeros((), dtype=torch.float64))

    # -- build ------------------------------------------------------------------------------------------------

    def attach(self, module: nn.Module, graph: ChannelGraph) -> list[Structure]:
        """Pairs where the placement wants them."""
        rows_everywhere = self.placement != "auto"
        self.pairs, self.left_dense = find_pairs(
            module, graph, rows_everywhere, self.pair_pointwise, self.init_method, self.ignore, self.include_frozen
        )
        return list(self.pairs.values())

    def prepare(
        self, module: nn.Module, graph: ChannelGraph, shapes: dict[str, tuple[int, ...]], positions: dict[str, int]
    ) -> None:
        """Choose matrices and group axes, and check that the target can be met.

        Args:
            module: the scope, with pairs attached.
            graph: of that.
            shapes: of that.
            positions: of that.
        """
        self.units = find_units(
            module, graph, self.pairs, self.placement, self.ignore, self.include_frozen, self.left_dense
        )
        self._inputs = graph.inputs
        self.rates = MatrixRates(self.units, self.lr_adjust)
        self.cost = HingeCost(shapes, positions, self.units, self.pairs, self.merges)
        dense = dense_shapes(shapes)
        numbers = {name: positions.get(name, 0) for name in dense}
        self.dense_cost = {
            "macs": count_macs(dense, numbers),
            "params": self.cost.params_of(dense),
        }
        self.target.check(self.dense_cost[self.target.kind])
        self._carried = [self.carry and needs_carrier(module, unit) for unit in self.units]
        for unit in self.units:
            self.masks.put(unit.name, torch.ones(unit.channels, dtype=torch.bool))
        self.register_buffer("balance", torch.ones(len(self.units), dtype=torch.float64))
        least = self._share([max(int(unit.channels * self.min_share + 1e-9), 1) for unit in self.units])
        wanted = self._wanted()
        if least > wanted:
            raise ValueError(
                f"target {self.target} is out of reach: with min_share={self.min_share} the scope still has "
                f"{least:.1%} of its {self.target.noun}"
            )

    def precede(self) -> None:
        """Weights of a merged pair are no weights of the pair, so pairs stay pairs when other methods follow."""
        self.merges = False

    def set_schedule(self, epochs: int | None, iterations: int) -> None:
        """Learn when epochs end."""
        self._length, self._total = epoch_length(epochs, iterations, self.epoch_iters), iterations

    def check_optimizer(self, module: nn.Module, optimizer: Optimizer) -> None:
        """The learning rates of the matrices must be their own when they are adjusted."""
        self.rates.check(module, optimizer)

    # -- life -------------------------------------------------------------------------------------------------

    def start(self, module: nn.Module) -> Decision:
        """Split every kernel, as loaded, into W and A; and the factors of layer balancing."""
        decision: Decision = {}
        for index, (name, pair) in enumerate(self.pairs.items()):
            conv = module.get_submodule(name)
            reset_unloaded_pair(conv)
            normalize = "row" if self._is_second(name) else "col"
            weight, matrix = init_pair(dense_kernel(conv), self.init_method, self.seed + index, normalize=normalize)
            decision[f"W:{name}"], decision[f"A:{name}"] = weight, matrix
            assert matrix.shape[0] == pair.rank
        return decision

    def _is_second(self, name: str) -> bool:
        return any(unit.which == 2 and unit.matrices[0][0].startswith(f"{name}.") for unit in self.units)

    def due(self, step: int) -> bool:
        """After each epoch, until the search has ended."""
        if bool(self.concluded) or step <= 0 or self._length is None:
            return False
        return step % self._length == 0 or step == self._total

    def decide(self, module: nn.Module, step: int, features: dict[str, Tensor] | None = None) -> Decision:
        """Look at the cost; near the target, or at the end of the training, decide what goes."""
        share = self._share_at(module, self.threshold)
        near = share - self._wanted() <= self.stop_limit
        watched = {"watched": torch.tensor(share, dtype=torch.float64)}
        return watched | (self._final(module) if near or step == self._total else {})

    def commit(self, module: nn.Module, decision: Decision, step: int) -> None:
        """Take over a split, or the final decision."""
        for name in self.pairs:
            if f"W:{name}" in decision:
                set_pair(module.get_submodule(name), decision[f"W:{name}"], decision[f"A:{name}"])
        if not bool(self.started) and (self.layer_balancing or self.relative_threshold):
            factors = [balance_factor(self._norms(module, unit)) for unit in self.units]
            self.balance.copy_(torch.tensor(factors, dtype=torch.float64))
        if "watched" in decision:
            self.watched.copy_(decision["watched"])
        if "threshold" in decision:
            self.found_threshold.copy_(decision["threshold"])
            for name, tensor in decision.items():
                if name.startswith("K:"):
                    get_tensor(module, name.removeprefix("K:")).data.copy_(tensor)
            for unit in self.units:
                for part in unit.parts(module):
                    part[~decision[f"V:{unit.name}"].to(part.device)] = 0.0
            self.set_masks(decision)
            self.concluded.fill_(True)
            self.mask(module)

    def _silence(self, module: nn.Module, decision: Decision) -> None:
        """Zero the groups that go, and let what they still emit reach the layers behind, in place.

        Adds the kernels and norms that carry it to the decision: what is emitted depends on running statistics, and
        those of rank 0 are meant.
        """
        for unit in self.units:
            keep = decision[unit.name]
            if bool(keep.all()):
                continue
            for part in unit.parts(module):
                part[~keep.to(part.device)] = 0.0
            if self.carry and unit.prunes_outputs:
                decision[unit.name] = carry_constants(module, self._inputs, unit, keep)
        for unit in self.units:
            if self.carry and unit.prunes_outputs and not bool(decision[unit.name].all()):
                for name in carried_by(module, unit):
                    decision[f"K:{name}"] = get_tensor(module, name).detach().clone()

    @torch.no_grad()
    def settle(self, average: nn.Module, decision: Decision) -> None:
        """In an averaged copy, too, the groups that go are silent, and what they emit goes on by the same channels."""
        if "threshold" not in decision:
            return
        for unit in self.units:
            keep = decision[f"V:{unit.name}"].cpu()
            for part in unit.parts(average):
                part[~keep.to(part.device)] = 0.0
            if self.carry and unit.prunes_outputs and not bool(keep.all()):
                carriers = (decision[unit.name].cpu() & ~keep).nonzero().flatten().tolist()
                carry_constants(average, self._inputs, unit, keep, carriers[0] if carriers else None)

    @torch.no_grad()
    def before_step(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Adjust learning rates to the gradients of both kinds of matrices."""
        if not bool(self.concluded) and optimizer is not None and self.rates.adjusts:
            self.ratio.fill_(self.rates.scale(module, optimizer, float(self.ratio) or None))

    @torch.no_grad()
    def after_step(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """The proximal step; once the search has ended, masks."""
        if bool(self.concluded):
            self.mask(module)
            return
        self.steps += 1
        if optimizer is not None and int(self.steps) % self.prox_interval == 0:
            self._proximal_step(module, self.rates.proximal(module, optimizer))
        if optimizer is not None:
            self.rates.restore(optimizer)

    def _proximal_step(self, module: nn.Module, rate: float) -> None:
        strength = self._strength(module)
        factors = self.balance.tolist() if self.layer_balancing else [1.0] * len(self.units)
        for unit, factor in zip(self.units, factors):
            prox_groups_(unit.parts(module), strength * rate * factor, self.regularizer)

    def _strength(self, module: nn.Module) -> float:
        if self.annealing is None:
            return self.lambda_
        return annealed(self.lambda_, self._penalty(module, 1), **self.annealing)

    def _penalty(self, module: nn.Module, which: int) -> float:
        """Mean over the first (second) matrices of their penalty; rows count where rows and columns are groups."""
        units = {unit.matrices[0][0]: unit for unit in reversed(self.units) if unit.which == which}
        found = [penalty(self._norms(module, unit), self.q) for unit in units.values()]
        return sum(found) / max(len(found), 1)

    def conclude(self, module: nn.Module) -> bool:
        """Decide what goes now, when the search has not ended."""
        if bool(self.concluded):
            return False
        self.commit(module, self._final(module), 0)
        return True

    def settled(self) -> bool:
        """Whether the search has ended."""
        return bool(self.concluded)

    def wants_stop(self) -> bool:
        """The search trains no further than it must; what follows is the fine-tuning of the compact model."""
        return bool(self.concluded)

    # -- what goes --------------------------------------------------------------------------------------------

    def _norms(self, module: nn.Module, unit: HingeUnit) -> Tensor:
        return group_norms(unit.parts(module)).cpu()

    def _compared(self, module: nn.Module) -> list[Tensor]:
        """Norms of the groups of each unit as thresholds are compared with."""
        factors = self.balance.tolist() if self.relative_threshold else [1.0] * len(self.units)
        return [self._norms(module, unit) / (factor or 1.0) for unit, factor in zip(self.units, factors)]

    def _kept(self, norms: Sequence[Tensor], threshold: float) -> list[Tensor]:
        """Groups of each unit that survive a threshold; the second of a block may follow its first."""
        kept: list[Tensor] = []
        for unit, v in zip(self.units, norms):
            leader = unit.follows
            if self.same_ratio and leader is not None:
                share = kept[leader].numel() / self.units[leader].channels
                kept.append(top_groups(v, max(round(share * v.numel()), 1)))
            else:
                kept.append(select_groups(v, threshold, self.min_share))
        return kept

    def _share(self, counts: Sequence[int]) -> float:
        """Cost with so many groups in each unit, and its carriers, as a share of the dense scope."""
        full = [
            min(count + 1, unit.channels) if carried and count < unit.channels else count
            for count, unit, carried in zip(counts, self.units, self._carried)
        ]
        return self.cost.of(self.target.kind, full) / self.dense_cost[self.target.kind]

    def _share_at(self, module: nn.Module, threshold: float) -> float:
        norms = self._compared(module)
        return self._share([kept.numel() for kept in self._kept(norms, threshold)])

    def _wanted(self) -> float:
        dense = self.dense_cost[self.target.kind]
        return self.target.budget(dense) / dense

    def _final(self, module: nn.Module) -> Decision:
        """Masks of the smallest threshold that meets the target."""
        norms = self._compared(module)

        def share_at(threshold: float) -> float:
            return self._share([kept.numel() for kept in self._kept(norms, threshold)])

        if self.published_search:
            found = published_threshold(share_at, self._wanted(), self.threshold)
        else:
            found = best_threshold(norms, share_at, self._wanted())
        decision: Decision = {"threshold": torch.tensor(found.threshold, dtype=torch.float64)}
        for unit, kept in zip(self.units, self._kept(norms, found.threshold)):
            decision[unit.name] = torch.zeros(unit.channels, dtype=torch.bool).index_fill_(0, kept, True)
            decision[f"V:{unit.name}"] = decision[unit.name]
        self._silence(copy.deepcopy(module), decision)
        return decision

    def structures(self) -> list[Structure]:
        """Pairs that lose rows or are merged, and slices of outputs."""
        masks = {unit.name: self.masks[unit.name].cpu() for unit in self.units}
        counts = [int(masks[unit.name].sum()) for unit in self.units]
        found: list[Structure] = self.cost.pair_structures(counts, masks) if bool(self.concluded) else []
        return found + [
            unit.structure(masks[unit.name])
            for unit in self.units
            if not unit.is_rows and not bool(masks[unit.name].all())
        ]

    def status(self) -> dict[str, float]:
        """Shares of MACs and parameters of the dense scope that the decision leaves; nothing goes before the end."""
        counts = self.counts()
        if not bool(self.concluded):
            return {"macs": 1.0, "params": 1.0}
        return {kind: self.cost.of(kind, counts) / max(self.dense_cost[kind], 1) for kind in ("macs", "params")}

    def figures(self) -> dict[str, float]:
        """Share of the dense cost that the watched threshold leaves, running ratio of gradients, final threshold."""
        found = {"watched_cost": float(self.watched)}
        found |= {"gradient_ratio": float(self.ratio)} if self.rates.adjusts else {}
        return found | ({"threshold": float(self.found_threshold)} if bool(self.concluded) else {})
