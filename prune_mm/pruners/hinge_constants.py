"""What removed outputs still emit: a constant that one channel can carry on for all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_mm.graph.trace import in_eval_mode
from prune_mm.pruners.hinge_units import HingeUnit
from prune_mm.structures import Slot
from prune_mm.structures.emitted import carry_constant, fold_constant, takes_constant

#: A channel is constant when its values differ by less, relative to the largest.
_CONSTANT = 1e-4


def needs_carrier(module: nn.Module, unit: HingeUnit) -> bool:
    """Whether removed groups of a unit may emit something that convolutions behind them read."""
    readers = [module.get_submodule(slot.module) for slot in _readers(module, unit)]
    return unit.prunes_outputs and bool(readers) and not all(map(takes_constant, readers))


@torch.no_grad()
def carry_constants(
    module: nn.Module, inputs: tuple, unit: HingeUnit, keep: Tensor, carrier: int | None = None
) -> Tensor:
    """Let biases, or one removed channel, stand for what the others emit: the network computes what it did. In place.

    The convolution that makes the channels gives zero for the removed ones by now; norm and activation turn that into
    a constant. What each reader makes of all those constants is put into its kernels of one channel, which stays.
    Exact also under zero padding, where no bias would be; where every reader has a bias and pads nothing, the biases
    take it, and no channel stays.

    Args:
        module: the scope.
        inputs: positional arguments of one call.
        unit: whose channels go.
        keep: boolean ``(channels,)``: which stay.
        carrier: the channel that carries; None: the one that every reader gets most of.

    Returns:
        ``keep``, with the channel that carries; unchanged when nothing is emitted, or not a constant.
    """
    emitted: list[tuple[Slot, nn.Module, Tensor, Tensor]] = []
    for slot, seen in _seen_by_readers(module, inputs, unit):
        reader, removed = module.get_submodule(slot.module), ~slot.kept(keep)
        values = seen.movedim(-1 if isinstance(reader, nn.Linear) else 1, 0).flatten(1).double().cpu()
        constant = values.mean(dim=1)
        spread = (values.amax(dim=1) - values.amin(dim=1))[removed]
        if bool((spread > _CONSTANT * (1.0 + constant.abs().max())).any()):
            return keep
        emitted.append((slot, reader, torch.where(removed, constant, 0.0), removed))
    loud = [entry for entry in emitted if bool(entry[2].any())]
    if not loud:
        return keep
    if all(takes_constant(reader) for _, reader, _, _ in loud):
        for _, reader, constant, removed in loud:
            fold_constant(reader, constant, removed)
        return keep
    if carrier is None:
        # One channel carries for every reader: they may stand behind different norms and activations.
        shares = [_loudness(slot, constant, unit.channels) for slot, _, constant, _ in loud]
        carrier = int(torch.stack(shares).amin(dim=0).argmax())
    columns = [_loudest(slot, constant, carrier) for slot, _, constant, _ in loud]
    if any(float(constant[column]) == 0.0 for (_, _, constant, _), column in zip(loud, columns)):
        return keep
    for (_, reader, constant, removed), column in zip(loud, columns):
        carry_constant(reader, constant, removed, column)
    kept = keep.clone()
    kept[carrier] = True
    return kept


def _loudness(slot: Slot, constant: Tensor, channels: int) -> Tensor:
    """How much of each channel a reader gets, ``(channels,)``, as a share of what it gets most of."""
    values = constant.abs() / constant.abs().max()
    own = torch.tensor(slot.channels)
    return values.new_zeros(channels).scatter_reduce_(0, own.clamp(min=0), torch.where(own < 0, 0.0, values), "amax")


def _loudest(slot: Slot, constant: Tensor, channel: int) -> int:
    """Where a reader gets most of a channel: behind a flattened map it reads each at several places."""
    own = torch.tensor(slot.channels) == channel
    return int(torch.where(own, constant.abs(), -1.0).argmax())


def readers_of(module: nn.Module, unit: HingeUnit) -> list[str]:
    """Names of the kernels that read the channels of a unit, and of their biases."""
    kernels = [slot.tensor for slot in _readers(module, unit)]
    present = dict(module.named_parameters())
    owners = [name.removesuffix("weight") for name in kernels]
    return kernels + [name for owner in owners for name in (f"{owner}bias", f"{owner}pair.bias") if name in present]


def _readers(module: nn.Module, unit: HingeUnit) -> list[Slot]:
    """Slots of convolutions and linear layers that read the channels of a unit, when no other layers do."""
    slots = [slot for slot in unit.slots if slot.role == "in"]
    modules = [module.get_submodule(slot.module) for slot in slots if slot.axis == 1]
    plain = all(
        isinstance(reader, nn.Linear) or (isinstance(reader, nn.modules.conv._ConvNd) and reader.groups == 1)
        for reader in modules
    )
    return slots if plain and len(modules) == len(slots) else []


def _seen_by_readers(module: nn.Module, inputs: tuple, unit: HingeUnit) -> list[tuple[Slot, Tensor]]:
    """What every reader gets when the module runs once in eval mode."""
    slots, seen, handles = _readers(module, unit), {}, []
    for slot in slots:
        handles.append(
            module.get_submodule(slot.module).register_forward_pre_hook(
                lambda _, args, name=slot.tensor: seen.update({name: args[0].detach().clone()})
            )
        )
    device = next(module.parameters()).device
    try:
        with in_eval_mode(module):
            module(*(x.to(device) if isinstance(x, Tensor) else x for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return [(slot, seen[slot.tensor]) for slot in slots if slot.tensor in seen]
