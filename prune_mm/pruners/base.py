"""The life of a pruner."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune_mm.allocation import fit_to_budget, round_channels, uniform_keep
from prune_mm.graph import ChannelGraph
from prune_mm.pruners.options import check_flag, check_integer, check_patterns
from prune_mm.pruners.target import Target
from prune_mm.pruners.units import CostModel, Unit, select_units
from prune_mm.structures import Structure
from prune_mm.structures.slots import MASKED_ROLES, along_axis, get_tensor

#: One flat tensor per decision, so that the engine can broadcast and digest it without knowing the method.
Decision = dict[str, Tensor]


class Pruner(nn.Module):
    """Decides what to prune, and when; holds its decisions as persistent buffers.

    The engine calls, in this order: :meth:`prepare` when the model is built; :meth:`set_schedule` when the length of
    the training is known; :meth:`start` once weights are loaded, unless the run is resumed; :meth:`before_step` and
    :meth:`after_step` around each real optimizer step; whenever :meth:`due` says so, :meth:`decide` on rank 0 and
    :meth:`commit` of what it returned on every rank; :meth:`finish` at the end.

    A pruner never holds the network: the module in its scope is handed to it each time.
    """

    #: Whether :meth:`decide` wants feature maps (``features``) of this many training batches; 0: none.
    feature_batches: int = 0
    #: Whether the steps that :meth:`due` counts are epochs or iterations.
    by_epoch: bool = True
    #: Whether :meth:`due` is asked after each iteration, with the number of iterations done, rather than before each
    #: step: for decisions that end an epoch or the training, and belong into its checkpoint.
    decides_after: bool = False
    #: Whether the graph must know which convolutions can be divided into groups.
    regroups: bool = False
    #: Whether the method adds parameters or gradients, so that it must be the first of several.
    needs_training: bool = False
    #: Whether no other method can prune the layers it has pruned, so that it must be the last of several.
    must_be_last: bool = False

    def __init__(self) -> None:
        """State every pruner has."""
        super().__init__()
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("last_update", torch.tensor(-1))

    @property
    def label(self) -> str:
        """Name of the method, for people."""
        return type(self).__name__

    def precede(self) -> None:
        """Told before anything else that other methods follow in a list, so that the compact form must be made by
        leaving out and moving weights only: their masks are mapped back to weights that train.
        """

    def attach(self, module: nn.Module, graph: ChannelGraph) -> list[Structure]:
        """Structures that give ``module`` what the method trains besides its weights; called before :meth:`prepare`.

        The caller applies them and traces the module again.
        """
        return []

    @abstractmethod
    def prepare(
        self, module: nn.Module, graph: ChannelGraph, shapes: dict[str, tuple[int, ...]], positions: dict[str, int]
    ) -> None:
        """Choose what to decide about, and register the buffers for it.

        Raises:
            ValueError: when nothing is prunable or the target is out of reach.
        """

    def set_schedule(self, epochs: int | None, iterations: int) -> None:
        """Learn the length of the training.

        Raises:
            ValueError: when the schedule does not fit into it.
        """

    def parts(self, step: int | None) -> dict[str, float]:
        """Parts of the decision before ``step`` (None: of the first) that ranks may compute side by side: name to
        relative duration. Empty when a decision is one piece.
        """
        return {}

    def part(self, module: nn.Module, step: int | None, name: str) -> Decision:
        """What :meth:`decide` (or :meth:`start`) would compute for one part."""
        raise NotImplementedError

    def give_parts(self, computed: dict[str, Decision]) -> None:
        """Hand over parts that the next decision need not compute; an empty table takes them back."""

    @abstractmethod
    def start(self, module: nn.Module) -> Decision:
        """The first decision, from the weights as loaded."""

    def due(self, step: int) -> bool:
        """Whether an update is due before ``step`` (an epoch or an iteration, 0-based; see ``by_epoch``)."""
        return False

    def decide(self, module: nn.Module, step: int, features: dict[str, Tensor] | None = None) -> Decision:
        """The decision of the update before ``step``; a function of state, weights, seed and update."""
        raise NotImplementedError

    @abstractmethod
    def commit(self, module: nn.Module, decision: Decision, step: int) -> None:
        """Take over a decision: state and weights."""

    def settle(self, average: nn.Module, decision: Decision) -> None:
        """Give an averaged copy of the scope what a decision changed beyond masks."""

    def before_step(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Called before each real optimizer step, after gradients are unscaled and clipped."""

    @abstractmethod
    def after_step(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Called after each real optimizer step."""

    def check_optimizer(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Make sure before training that the optimizer is one the method can work with.

        Raises:
            ValueError: saying what the config needs.
        """

    def wants_stop(self) -> bool:
        """Whether the training should end after this epoch."""
        return False

    def finish(self, module: nn.Module) -> None:
        """Called once when the training has ended."""

    @abstractmethod
    def mask(self, module: nn.Module) -> None:
        """Give ``module`` (the scope, or an averaged copy of it) the masked form."""

    @abstractmethod
    def structures(self) -> list[Structure]:
        """The present decision, as structures of one stage."""

    def stages(self) -> list[list[Structure]]:
        """The present decision, as stages of a plan for the network with what was attached."""
        return [self.structures()]

    def settled(self) -> bool:
        """Whether the last decision is taken."""
        return bool(self.started)

    @abstractmethod
    def status(self) -> dict[str, float]:
        """Shares for the log and for people: name to a number in 0..1."""

    def figures(self) -> dict[str, float]:
        """Further figures for the log: name to number."""
        return {}

    def images(self, module: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
        """Pictures of the state for the visualizer: name and ``(height, width, 3)`` uint8."""
        yield from ()

    def conclude(self, module: nn.Module) -> bool:
        """Make a decision final whose search has not ended, for an export; whether there was need to."""
        return False

    def load_state_from(self, other: Pruner) -> None:
        """Copy the state of another pruner of the same network (an averaged model's copy follows its source)."""
        for mine, theirs in zip(self.buffers(), other.buffers()):
            mine.copy_(theirs)
        self._forget()

    def _forget(self) -> None:
        """Drop whatever was derived from the state."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # A dense checkpoint has none of our keys, and that is fine: the pruner starts afresh.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget()


def epoch_length(epochs: int | None, iterations: int, epoch_iters: int | None) -> int:
    """Iterations of an epoch, for methods that decide after each.

    Args:
        epochs: of the training; None when it counts iterations only.
        iterations: of the training.
        epoch_iters: what counts as an epoch in a training that counts none.

    Raises:
        ValueError: when ``epoch_iters`` is missing, or superfluous.
    """
    if epochs is None:
        if epoch_iters is None:
            raise ValueError("a training that counts iterations needs epoch_iters, the iterations of an epoch")
        return epoch_iters
    if epoch_iters is not None:
        raise ValueError(f"epoch_iters={epoch_iters} is for a training that counts iterations; drop it")
    return iterations // max(epochs, 1)


class TensorBank(nn.Module):
    """Tensors by dotted name, as persistent buffers (whose names may not hold dots)."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Store or overwrite."""
        key = name.replace(".", "/")
        if key in self._buffers:
            self._buffers[key].copy_(tensor)
        else:
            self.register_buffer(key, tensor.detach().clone())

    def __getitem__(self, name: str) -> Tensor:
        """The tensor ``name``."""
        return self._buffers[name.replace(".", "/")]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors."""
        for key, tensor in self._buffers.items():
            yield key.replace("/", "."), tensor

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


class ChannelPruner(Pruner):
    """A pruner whose decisions are boolean masks over units of channels.

    Args:
        target: budget of the scope, e.g. ``dict(macs=0.5)``; see :class:`~prune_mm.pruners.target.Target`.
        min_channels: smallest width any layer may get.
        round_to: widths become multiples of this (hardware likes 8); 1: exact published counts.
        prune_shortcuts: also zero rows of shortcut projections, which cost few MACs, and through which all goes that a
            stage takes over from the one before.
        prune_stem: also prune layers that read the input of the scope (of a backbone: the image).
        prune_coupled: also prune channels that residual adds tie across blocks.
        ignore: regular expressions of layer names that stay dense.
        seed: seed of every random choice.

    Raises:
        ValueError: naming the argument and what would be right.
    """

    def __init__(
        self,
        target: dict | Target,
        min_channels: int = 1,
        round_to: int = 8,
        prune_shortcuts: bool = False,
        prune_stem: bool = False,
        prune_coupled: bool = False,
        ignore: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__()
        self.target = Target.parse(target)
        check_integer("min_channels", min_channels, 1)
        check_integer("round_to", round_to, 1)
        check_integer("seed", seed, 0)
        check_patterns("ignore", ignore)
        for name, flag in (("shortcuts", prune_shortcuts), ("stem", prune_stem), ("coupled", prune_coupled)):
            check_flag(f"prune_{name}", flag)
        self.min_channels, self.round_to, self.seed = min_channels, round_to, seed
        self._select = {"shortcuts": prune_shortcuts, "stem": prune_stem, "coupled": prune_coupled, "ignore": ignore}
        self.masks = TensorBank()
        self.units: list[Unit] = []
        self._vectors: list[tuple[str, Tensor]] | None = None

    def prepare(
        self, module: nn.Module, graph: ChannelGraph, shapes: dict[str, tuple[int, ...]], positions: dict[str, int]
    ) -> None:
        """Select units, register masks, and check that the target can be met."""
        self.units = select_units(graph, **self._select)
        self.cost = CostModel(shapes, positions, self.units)
        self.target.check(self.cost.dense(self.target.kind))
        for unit in self.units:
            self.masks.put(unit.name, torch.ones(unit.channels, dtype=torch.bool))
        self.uniform_sparsity()

    # -- counts -----------------------------------------------------------------------------------------------

    @property
    def widths(self) -> list[int]:
        """Dense number of channels per unit."""
        return [unit.channels for unit in self.units]

    def rounded(self, counts: Iterable[int]) -> list[int]:
        """Counts that respect ``round_to`` (of a layer's width) and ``min_channels``."""
        result = []
        for count, unit in zip(counts, self.units):
            least = min(self.min_channels, unit.channels)
            divisor = self.round_to // math.gcd(self.round_to, unit.copies)
            result.append(round_channels(max(count, least), unit.channels, divisor, least))
        return result

    def fit(self, counts_at: Any) -> tuple[float, list[int]]:
        """Smallest channel sparsity whose rounded counts meet the target, and those counts.

        Args:
            counts_at: kept counts at a channel sparsity in [0, 1).

        Raises:
            ValueError: when the target is out of reach, with what can be reached.
        """
        kind, dense = self.target.kind, self.cost.dense(self.target.kind)

        def at(sparsity: float) -> list[int]:
            return self.widths if sparsity == 0.0 else self.rounded(counts_at(sparsity))

        try:
            return fit_to_budget(lambda counts: self.cost.of(kind, counts), at, self.target.budget(dense))
        except ValueError as error:
            least = self.cost.of(kind, self.rounded([0] * len(self.units))) / dense
            raise ValueError(
                f"target {self.target} is out of reach: with min_channels={self.min_channels} and "
                f"round_to={self.round_to} the scope cannot be smaller than {least:.1%} of its {self.target.noun}"
            ) from error

    def uniform_sparsity(self) -> float:
        """Channel sparsity at which pruning every unit by the same share meets the target."""
        if self.target.kind == "channels" and isinstance(self.target.value, float):
            return 1.0 - self.target.value
        return self.fit(lambda sparsity: uniform_keep(self.widths, sparsity))[0]

    # -- masks ------------------------------------------------------------------------------------------------

    def counts(self) -> list[int]:
        """Live channels per unit."""
        return [int(self.masks[unit.name].sum()) for unit in self.units]

    def set_masks(self, decision: Decision) -> None:
        """Take over the masks of a decision."""
        for unit in self.units:
            self.masks.put(unit.name, decision[unit.name].to(self.masks[unit.name].device))
        self._forget()

    def after_step(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Mask again what the optimizer moved."""
        self.mask(module)

    @torch.no_grad()
    def mask(self, module: nn.Module) -> None:
        """Zero every slot of dead channels."""
        device = next(module.parameters()).device
        if self._vectors is None or (self._vectors and self._vectors[0][1].device != device):
            self._vectors = list(self._mask_vectors(module, device))
        for name, vector in self._vectors:
            get_tensor(module, name).mul_(vector)

    def _mask_vectors(self, module: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        for unit in self.units:
            keep = self.masks[unit.name].cpu()
            for slot in unit.slots:
                if slot.role in MASKED_ROLES and not bool(keep.all()):
                    tensor = get_tensor(module, slot.tensor)
                    yield slot.tensor, along_axis(slot.kept(keep).to(device, tensor.dtype), slot.axis, tensor.ndim)

    def _forget(self) -> None:
        self._vectors = None

    def structures(self) -> list[Structure]:
        """One slice per unit that lost channels."""
        pairs = [(unit, self.masks[unit.name].cpu()) for unit in self.units]
        return [unit.structure(mask) for unit, mask in pairs if not bool(mask.all())]

    def status(self) -> dict[str, float]:
        """Shares of channels and MACs that live now."""
        counts = self.counts()
        return {
            "live_channels": sum(counts) / self.cost.dense_channels,
            "macs": self.cost.macs(counts) / max(self.cost.dense_macs, 1),
        }
