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
def carry_constants(module: nn.Module, inputs: tuple, unit: HingeUnit, keep: Tensor) -> Tensor:
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

    Returns:
        ``keep``, with the channel that carries; unchanged when nothing is emitted, or not a constant.
    """
    removed = ~keep
    emitted: list[tuple[nn.Module, Tensor]] = []
    for slot, seen in _seen_by_readers(module, inputs, unit):
        reader = module.get_submodule(slot.module)
        values = seen.movedim(-1 if isinstance(reader, nn.Linear) else 1, 0).flatten(1).double()
        constant = values.mean(dim=1)
        spread = (values.amax(dim=1) - values.amin(dim=1))[removed.to(values.device)]
        if bool((spread > _CONSTANT * (1.0 + constant.abs().max())).any()):
            return keep
        emitted.append((reader, torch.where(removed.to(values.device), constant, 0.0)))
    loud = [(reader, constant) for reader, constant in emitted if bool(constant.any())]
    if not loud:
        return keep
    if all(takes_constant(reader) for reader, _ in loud):
        for reader, constant in loud:
            fold_constant(reader, constant, removed)
        return keep
    # One channel carries for every reader: they may stand behind different activations.
    carrier = int(torch.stack([constant.abs() / constant.abs().max() for _, constant in loud]).amin(dim=0).argmax())
    if any(float(constant[carrier]) == 0.0 for _, constant in loud):
        return keep
    for reader, constant in loud:
        carry_constant(reader, constant, removed, carrier)
    kept = keep.clone()
    kept[carrier] = True
    return kept


def readers_of(module: nn.Module, unit: HingeUnit) -> list[str]:
    """Names of the kernels that read the channels of a unit, and of their biases."""
    kernels = [slot.tensor for slot in _readers(module, unit)]
    present = dict(module.named_parameters())
    owners = [name.removesuffix("weight") for name in kernels]
    return kernels + [name for owner in owners for name in (f"{owner}bias", f"{owner}pair.bias") if name in present]


def _readers(module: nn.Module, unit: HingeUnit) -> list[Slot]:
    """Slots of convolutions and linear layers that read exactly the channels of a unit, in their order."""
    slots = [slot for slot in unit.slots if slot.role == "in"]
    whole = [slot for slot in slots if slot.channels == tuple(range(unit.channels)) and slot.axis == 1]
    modules = [module.get_submodule(slot.module) for slot in whole]
    plain = all(
        isinstance(reader, nn.Linear) or (isinstance(reader, nn.modules.conv._ConvNd) and reader.groups == 1)
        for reader in modules
    )
    return whole if plain and len(whole) == len(slots) else []


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
