"""Several methods one after the other: each decides about the compact form that the ones before it leave."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune_mm.graph import ChannelGraph, trace
from prune_mm.pruners.base import Decision, Pruner, TensorBank
from prune_mm.structures import Structure
from prune_mm.structures.plan import compact_stage
from prune_mm.structures.slots import get_tensor, set_tensor

#: A bank of tensors writes the dots of names as slashes; the slashes of names are written so.
_SLASH = "|"


class PrunerSequence(Pruner):
    """Pruners that apply in order; built from ``pruner=[dict(type='CHEX', ...), dict(type='GConvPrune', ...)]``.

    A pruner starts when the one before it has settled (its last decision is taken). It then sees the compact form of
    the network so far, as if that had been exported, so its budget is a share of that; its masks are mapped back to
    the dense network, which goes on training. The plan of the result has a stage for each.

    Only the first may add parameters or gradients; the others decide from weights.

    Args:
        pruners: the methods, at least one.

    Raises:
        ValueError: when a later pruner is one that must be first, or an earlier one must be last.
    """

    by_epoch = False
    decides_after = True

    def __init__(self, pruners: Sequence[Pruner]) -> None:
        """See the class."""
        super().__init__()
        for pruner in pruners[1:]:
            if pruner.needs_training:
                raise ValueError(f"{type(pruner).__name__} steers the training; it can only be the first of a list")
        for pruner in pruners[:-1]:
            if pruner.must_be_last:
                raise ValueError(
                    f"{type(pruner).__name__} leaves layers no other method can prune; it must be the last of a list"
                )
        if len(pruners) > 1:
            pruners[0].precede()
        self.first = pruners[0]
        # What the others are about exists only once the first has settled, so they are no children; their state is.
        self._later = tuple(pruners[1:])
        self.saved = TensorBank()
        self.register_buffer("active", torch.tensor(0))
        self._alive = 0
        self._length: int | None = None
        self._lifted: dict[str, Tensor] | None = None

    @property
    def members(self) -> tuple[Pruner, ...]:
        """All pruners in order."""
        return (self.first, *self._later)

    @property
    def regroups(self) -> bool:
        """See :class:`Pruner`."""
        return self.first.regroups

    @property
    def feature_batches(self) -> int:
        """See :class:`Pruner`."""
        return self.first.feature_batches if int(self.active) == 0 else 0

    @property
    def units(self) -> list:
        """Units of the first, whose features the engine may collect."""
        return self.first.units

    @property
    def label(self) -> str:
        """All names."""
        return " + ".join(pruner.label for pruner in self.members)

    @property
    def target(self) -> str:
        """All targets in a sentence."""
        return ", then ".join(str(getattr(pruner, "target", None) or "the given groups") for pruner in self.members)

    # -- build ------------------------------------------------------------------------------------------------

    def attach(self, module: nn.Module, graph: ChannelGraph) -> list[Structure]:
        """See :class:`Pruner`."""
        return self.first.attach(module, graph)

    def prepare(
        self, module: nn.Module, graph: ChannelGraph, shapes: dict[str, tuple[int, ...]], positions: dict[str, int]
    ) -> None:
        """Prepare the first; the others are tried on the dense network, so that bad options are refused now."""
        self.first.prepare(module, graph, shapes, positions)
        self._inputs, self._positions = graph.inputs, positions
        for pruner in self._later:
            graph = trace(module, graph.inputs, grouping=True) if pruner.regroups and graph.convs is None else graph
            copy.deepcopy(pruner).prepare(module, graph, shapes, positions)

    def set_schedule(self, epochs: int | None, iterations: int) -> None:
        """See :class:`Pruner`."""
        self._length = iterations // epochs if epochs else None
        for pruner in self.members:
            pruner.set_schedule(epochs, iterations)

    # -- life -------------------------------------------------------------------------------------------------

    def parts(self, step: int | None) -> dict[str, float]:
        """Those of the first; the others decide once."""
        own = None if step is None else self._own_step(0, step)
        return self.first.parts(own) if int(self.active) == 0 and (step is None or own is not None) else {}

    def part(self, module: nn.Module, step: int | None, name: str) -> Decision:
        """See :class:`Pruner`."""
        return self.first.part(module, None if step is None else self._own_step(0, step), name)

    def give_parts(self, computed: dict[str, Decision]) -> None:
        """See :class:`Pruner`."""
        self.first.give_parts(computed)

    def start(self, module: nn.Module) -> Decision:
        """The first decision of the first."""
        return _named(0, self.first.start(module))

    def due(self, step: int) -> bool:
        """When the active pruner decides, or has settled and another one waits."""
        active = int(self.active)
        return self._own_step(active, step) is not None or (
            active < len(self._later) and self.members[active].settled()
        )

    def _own_step(self, index: int, step: int) -> int | None:
        """``step`` as the pruner counts, when it is due then."""
        pruner = self.members[index]
        if pruner.by_epoch:
            if self._length is None or step % self._length:
                return None
            step //= self._length
        return step if pruner.due(step) else None

    def decide(self, module: nn.Module, step: int, features: dict[str, Tensor] | None = None) -> Decision:
        """Let the active pruner decide, or the next one start."""
        active = int(self.active)
        own = self._own_step(active, step)
        if own is not None:
            return _named(active, self.members[active].decide(self._compact(module, active), own, features))
        following = copy.deepcopy(self)
        return _named(active + 1, following._enter(module, active + 1).start(self._compact(module, active + 1)))

    def commit(self, module: nn.Module, decision: Decision, step: int) -> None:
        """Let the pruner that decided take over."""
        index = int(next(iter(decision)).partition("/")[0])
        pruner = self.members[index] if index <= self._alive else self._enter(module, index)
        own = self._own_step(index, step)
        pruner.commit(
            module if index == 0 else self._compact(module, index),
            {name.partition("/")[2]: tensor for name, tensor in decision.items()},
            own or 0,
        )
        if bool(pruner.started):
            pruner.updates += 1
            pruner.last_update.fill_(own or 0)
        pruner.started.fill_(True)
        self.active.fill_(index)
        for position, member in enumerate(self._later[:index]):
            for name, tensor in member.named_buffers():
                self.saved.put(f"{position}.{name.replace('/', _SLASH)}", tensor)
        self._forget()
        self.mask(module)

    def settle(self, average: nn.Module, decision: Decision) -> None:
        """See :class:`Pruner`; later pruners only mask."""
        if next(iter(decision)).startswith("0/"):
            self.first.settle(average, {name.partition("/")[2]: tensor for name, tensor in decision.items()})

    def before_step(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """See :class:`Pruner`."""
        self.first.before_step(module, optimizer)

    def after_step(self, module: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Mask again what the optimizer moved."""
        self.first.after_step(module, optimizer)
        self._mask_lifted(module)

    def check_optimizer(self, module: nn.Module, optimizer: Optimizer) -> None:
        """See :class:`Pruner`."""
        self.first.check_optimizer(module, optimizer)

    def mask(self, module: nn.Module) -> None:
        """All masks."""
        self.first.mask(module)
        self._mask_lifted(module)

    def settled(self) -> bool:
        """Whether the last pruner has."""
        return int(self.active) == len(self._later) and self.members[-1].settled()

    def stages(self) -> list[list[Structure]]:
        """Stages of all pruners that have started."""
        return [stage for pruner in self.members[: int(self.active) + 1] for stage in pruner.stages()]

    def structures(self) -> list[Structure]:
        """Structures of the first; see :meth:`stages` for all."""
        return self.first.structures()

    def status(self) -> dict[str, float]:
        """Status of each pruner that has started, under its name."""
        return {
            f"{pruner.label}_{name}": value
            for pruner in self.members[: self._alive + 1]
            for name, value in pruner.status().items()
        }

    def figures(self) -> dict[str, float]:
        """Figures of the first."""
        return self.first.figures()

    def images(self, module: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
        """Pictures of the first."""
        return self.first.images(module)

    def conclude(self, module: nn.Module) -> bool:
        """Conclude the first; what then has not started is started."""
        changed = self.first.conclude(module)
        while int(self.active) < len(self._later):
            index = int(self.active) + 1
            self.commit(module, _named(index, self._enter(module, index).start(self._compact(module, index))), 0)
            changed = True
        return changed

    # -- later pruners ----------------------------------------------------------------------------------------

    def _compact(self, module: nn.Module, index: int) -> nn.Module:
        """The network a pruner sees: a compact copy of ``module`` by the stages before it."""
        if index == 0:
            return module
        subject = copy.deepcopy(module)
        for pruner in self.members[:index]:
            for stage in pruner.stages():
                compact_stage(subject, stage)
        return subject

    def _enter(self, module: nn.Module, index: int) -> Pruner:
        """Prepare a later pruner for the network it sees."""
        pruner, subject = self.members[index], self._compact(module, index)
        graph = trace(subject, self._inputs, grouping=pruner.regroups)
        shapes = {name: tuple(parameter.shape) for name, parameter in subject.named_parameters()}
        pruner.prepare(subject, graph, shapes, self._positions)
        self._alive = index
        return pruner

    def _revive(self, module: nn.Module) -> None:
        """Bring later pruners to the state that a checkpoint holds."""
        while self._alive < int(self.active):
            pruner = self._enter(module, self._alive + 1)
            prefix = f"{self._alive - 1}."
            state = {
                name.removeprefix(prefix).replace(_SLASH, "/"): tensor
                for name, tensor in self.saved.items()
                if name.startswith(prefix)
            }
            pruner.load_state_dict(state)

    @torch.no_grad()
    def _mask_lifted(self, module: nn.Module) -> None:
        if int(self.active) == 0:
            return
        self._revive(module)
        device = next(module.parameters()).device
        if self._lifted is None or any(mask.device != device for mask in self._lifted.values()):
            self._lifted = {name: mask.to(device) for name, mask in self._lift(module).items()}
        for name, mask in self._lifted.items():
            get_tensor(module, name).mul_(mask)

    def _lift(self, module: nn.Module) -> dict[str, Tensor]:
        """Masks of the later pruners, per tensor of the dense network.

        A copy whose weights are serial numbers goes through the stages; where a stage masks, the numbers tell which
        weights of the dense network those are.
        """
        subject = copy.deepcopy(module).double()
        names = [name for name, _ in subject.named_parameters()]
        first = 1
        spans = {}
        for name in names:
            parameter = get_tensor(subject, name)
            numbers = torch.arange(first, first + parameter.numel(), dtype=torch.float64)
            set_tensor(subject, name, numbers.view(parameter.shape))
            spans[name] = (first, parameter.shape)
            first += parameter.numel()
        alive = torch.ones(first, dtype=torch.bool)
        for index, pruner in enumerate(self.members[: int(self.active) + 1]):
            for stage in pruner.stages():
                if index:
                    alive[self._masked_by(stage, subject)] = False
                compact_stage(subject, stage)
        masks = {name: alive[start : start + shape.numel()].view(shape) for name, (start, shape) in spans.items()}
        return {name: mask for name, mask in masks.items() if not bool(mask.all())}

    @staticmethod
    def _masked_by(stage: list[Structure], subject: nn.Module) -> Tensor:
        """Serial numbers of the weights that a stage masks."""
        masked = copy.deepcopy(subject)
        for structure in stage:
            structure.apply_mask(masked)
        pairs = zip(subject.parameters(), masked.parameters())
        return torch.cat([before[(before > 0) & (after == 0)].detach().long() for before, after in pairs])

    def _forget(self) -> None:
        self._lifted = None

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        for key, tensor in state_dict.items():
            if key.startswith(f"{prefix}saved."):
                self.saved.put(key.removeprefix(f"{prefix}saved.").replace("/", "."), tensor)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._alive = 0

    def load_state_from(self, other: PrunerSequence) -> None:
        """See :class:`Pruner`."""
        for name, tensor in other.saved.items():
            self.saved.put(name, tensor)
        super().load_state_from(other)
        self._alive = 0


def _named(index: int, decision: Decision) -> Decision:
    return {f"{index}/{name}": tensor for name, tensor in decision.items()}
