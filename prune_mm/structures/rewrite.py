"""Cutting tensors of a live module, and keeping its attributes true to their new shapes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_mm.structures.group_norm import CompactGroupNorm
from prune_mm.structures.slots import get_tensor, set_tensor


def check_cut(root: nn.Module, name: str, kept: dict[int, Tensor]) -> None:
    """Make sure that a parameter or buffer has the sizes a cut expects; see :func:`cut_tensor`.

    Raises:
        ValueError: naming the tensor, when it is missing or of another size.
    """
    try:
        tensor = get_tensor(root, name)
    except AttributeError as error:
        raise ValueError(f"the network has no tensor '{name}'") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"'{name}' is not a tensor of the network")
    for axis, keep in kept.items():
        if not 0 <= axis < tensor.ndim or tensor.shape[axis] != keep.numel():
            shape = tuple(tensor.shape)
            raise ValueError(f"'{name}' has shape {shape}, the plan expects {keep.numel()} along axis {axis}")


def cut_tensor(root: nn.Module, name: str, kept: dict[int, Tensor]) -> None:
    """Cut a parameter or buffer, and make the sizes its module knows agree with it.

    Args:
        root: the network.
        name: dotted name of the tensor.
        kept: per axis a boolean vector of what stays.

    Raises:
        ValueError: naming the tensor, when it is missing or of another size.
    """
    check_cut(root, name, kept)
    kept = {axis: keep for axis, keep in kept.items() if not bool(keep.all())}
    if not kept:
        return
    owner_name, _, attribute = name.rpartition(".")
    owner = root.get_submodule(owner_name)
    if isinstance(owner, nn.GroupNorm) and attribute == "weight":
        owner = _replace(root, owner, CompactGroupNorm.from_group_norm(owner))
    tensor = get_tensor(root, name).detach()
    for axis, keep in kept.items():
        index = torch.nonzero(keep).flatten().to(tensor.device)
        tensor = tensor.index_select(axis, index)
        if isinstance(owner, CompactGroupNorm) and attribute == "weight":
            owner.keep(index)
    set_tensor(root, name, tensor)
    if attribute == "weight":
        _refresh(owner)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` is registered: shared modules have several names."""
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
    return new


def _refresh(module: nn.Module) -> None:
    """Make the size attributes of a layer agree with its weight."""
    weight = module.weight
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
    elif weight.ndim >= 3 and hasattr(module, "out_channels"):
        _refresh_conv(module)


def _refresh_conv(conv: nn.Module) -> None:
    rows, columns = conv.weight.shape[:2]
    groups = getattr(conv, "groups", 1)
    if groups > 1 and conv.in_channels == groups:
        # Depthwise: the groups are the channels. A multiplier says how many outputs each has.
        per_group = conv.out_channels // conv.in_channels
        conv.groups = rows if getattr(conv, "transposed", False) else rows // per_group
        conv.in_channels, conv.out_channels = conv.groups, conv.groups * per_group
    elif getattr(conv, "transposed", False):
        conv.in_channels, conv.out_channels = rows, columns * groups
    else:
        conv.in_channels, conv.out_channels = columns * groups, rows


class ScatterChannels:
    """Forward hook that writes the computed channels into zeros of the full width.

    A hook, not a module around a module, so that parameter names stay those of the dense network.
    """

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """``(N, kept, ...)`` to ``(N, width, ...)``."""
        shape = (output.shape[0], module.scatter_width, *output.shape[2:])
        return output.new_zeros(shape).index_copy_(1, module.scatter_index, output)


def scatter_behind(root: nn.Module, name: str, positions: Tensor, width: int) -> None:
    """Restore the full ``width`` behind the module ``name``: its i-th output is channel ``positions[i]``."""
    module = root.get_submodule(name)
    weight = next(module.parameters())
    module.register_buffer("scatter_index", positions.to(weight.device), persistent=False)
    module.scatter_width = width
    module.register_forward_hook(ScatterChannels())
