"""What removed outputs still emit: a constant that one channel can carry on for all of them."""

from __future__ import annotations

from collections.abc import Iterable

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

    Batch norms give the channel that carries its constant as their shift, with a scale of zero: what it emits does not
    change, and it stays a constant while the network trains on. With its scale, the gradient of its kernel, which is
    zero, would be multiplied by the inverse root of a variance of nothing: the first step would throw it far away, and
    what the network has learnt with it.

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
    readers, norms = _readers(module, unit), _batch_norms(module, unit)
    seen = _inputs_of(module, inputs, [slot.module for slot in (*readers, *norms)])
    for slot in readers:
        if slot.module not in seen:
            continue
        reader, removed = module.get_submodule(slot.module), ~slot.kept(keep)
        values = seen[slot.module].movedim(-1 if isinstance(reader, nn.Linear) else 1, 0).flatten(1).double().cpu()
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
    for slot in norms:
        if slot.module in seen:
            at = (torch.tensor(slot.channels) == carrier).to(seen[slot.module].device)
            _emit_by_shift(module.get_submodule(slot.module), seen[slot.module], at)
    kept = keep.clone()
    kept[carrier] = True
    return kept


def _emit_by_shift(norm: nn.modules.batchnorm._BatchNorm, seen: Tensor, at: Tensor) -> None:
    """Give some channels, which are constant, their constant as the shift and no scale, in place."""
    found = seen.double().movedim(1, 0).flatten(1).mean(dim=1)
    normalised = (found - norm.running_mean.double()) / torch.sqrt(norm.running_var.double() + norm.eps)
    norm.bias[at] += (norm.weight.double() * normalised)[at].to(norm.bias.dtype)
    norm.weight[at] = 0.0


def _loudness(slot: Slot, constant: Tensor, channels: int) -> Tensor:
    """How much of each channel a reader gets, ``(channels,)``, as a share of what it gets most of."""
    values = constant.abs() / constant.abs().max()
    own = torch.tensor(slot.channels)
    return values.new_zeros(channels).scatter_reduce_(0, own.clamp(min=0), torch.where(own < 0, 0.0, values), "amax")


def _loudest(slot: Slot, constant: Tensor, channel: int) -> int:
    """Where a reader gets most of a channel: behind a flattened map it reads each at several places."""
    own = torch.tensor(slot.channels) == channel
    return int(torch.where(own, constant.abs(), -1.0).argmax())


def carried_by(module: nn.Module, unit: HingeUnit) -> list[str]:
    """Names of what :func:`carry_constants` writes: kernels that read a unit's channels, their biases, and norms."""
    kernels = [slot.tensor for slot in _readers(module, unit)]
    present = dict(module.named_parameters())
    owners = [name.removesuffix("weight") for name in kernels]
    biases = [name for owner in owners for name in (f"{owner}bias", f"{owner}pair.bias") if name in present]
    norms = [slot.module for slot in _batch_norms(module, unit)]
    return kernels + biases + [f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]


def _readers(module: nn.Module, unit: HingeUnit) -> list[Slot]:
    """Slots of convolutions and linear layers that read the channels of a unit, when no other layers do."""
    slots = [slot for slot in unit.slots if slot.role == "in"]
    modules = [module.get_submodule(slot.module) for slot in slots if slot.axis == 1]
    plain = all(
        isinstance(reader, nn.Linear) or (isinstance(reader, nn.modules.conv._ConvNd) and reader.groups == 1)
        for reader in modules
    )
    return slots if plain and len(modules) == len(slots) else []


def _batch_norms(module: nn.Module, unit: HingeUnit) -> list[Slot]:
    """Slots of the scales of batch norms behind the channels of a unit."""
    slots = [slot for slot in unit.slots if slot.role == "scale"]
    kinds = {slot: module.get_submodule(slot.module) for slot in slots}
    norm = nn.modules.batchnorm._BatchNorm
    return [slot for slot in slots if isinstance(kinds[slot], norm) and kinds[slot].running_mean is not None]


def _inputs_of(module: nn.Module, inputs: tuple, names: Iterable[str]) -> dict[str, Tensor]:
    """What modules inside get when the module runs once in eval mode; those it does not use are missing."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].detach().clone()})
        )
        for name in names
    ]
    device = next(module.parameters()).device
    try:
        with in_eval_mode(module):
            module(*(x.to(device) if isinstance(x, Tensor) else x for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return seen
