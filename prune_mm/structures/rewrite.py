"""Cutting tensors of a live module, and keeping its attributes true to their new shapes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_mm.structures.group_norm import CompactGroupNorm
from prune_mm.structures.slots import get_tensor, set_tensor


def cut_tensor(root: nn.Module, name: str, axis: int, kept: Tensor) -> None:
    """Keep only the indices ``kept`` (boolean) of one axis of a parameter or buffer, and refresh its module.

    Raises:
        ValueError: naming the tensor, when it is missing or of another size.
    """
    try:
        tensor = get_tensor(root, name)
    except AttributeError as error:
        raise ValueError(f"the network has no tensor '{name}'") from error
    if not isinstance(tensor, Tensor) or axis >= tensor.ndim or tensor.shape[axis] != kept.numel():
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
        raise ValueError(f"'{name}' has shape {shape}, the plan expects {kept.numel()} along axis {axis}")
    if bool(kept.all()):
        return
    index = torch.nonzero(kept).flatten().to(tensor.device)
    owner_name, _, attribute = name.rpartition(".")
    owner = root.get_submodule(owner_name)
    if isinstance(owner, nn.GroupNorm) and attribute == "weight":
        owner = CompactGroupNorm.from_group_norm(owner)
        _replace(root, owner_name, owner)
    if isinstance(owner, CompactGroupNorm) and attribute == "weight":
        owner.keep(index)
    set_tensor(root, name, tensor.detach().index_select(axis, index))
    if attribute == "weight":
        _refresh(owner, axis)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def _refresh(module: nn.Module, axis: int) -> None:
    """Make the size attributes of a layer agree with its weight."""
    weight = module.weight
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
    elif weight.ndim >= 3 and hasattr(module, "out_channels"):
        _refresh_conv(module, axis)


def _refresh_conv(conv: nn.Module, axis: int) -> None:
    weight, groups = conv.weight, conv.groups
    transposed = bool(getattr(conv, "transposed", False))
    rows, columns = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
    if groups > 1 and conv.in_channels == groups:
        per_group = conv.out_channels // conv.in_channels
        conv.groups = (weight.shape[0] if transposed else rows) // per_group
        conv.in_channels, conv.out_channels = conv.groups, conv.groups * per_group
    elif transposed:
        conv.in_channels, conv.out_channels = columns, rows * groups
    else:
        conv.in_channels, conv.out_channels = columns * groups, rows


class ScatterChannels:
    """Forward hook that writes the computed channels into zeros of the full width.

    A hook, not a module around a module, so that parameter names stay those of the dense network.
    """

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """``(N, kept, ...)`` to ``(N, width, ...)``."""
        shape = (output.shape[0], module.scatter_width, *output.shape[2:])
        return output.new_zeros(shape).index_copy(1, module.scatter_index, output)


def scatter_behind(root: nn.Module, name: str, keep: Tensor, width: int) -> None:
    """Restore the full ``width`` behind the module ``name``: channel ``keep[i]`` is its i-th output.

    Raises:
        ValueError: when the module is missing or already scattered.
    """
    try:
        module = root.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the network has no module '{name}'") from error
    if hasattr(module, "scatter_index"):
        raise ValueError(f"the output of '{name}' is already scattered")
    weight = next(module.parameters())
    module.register_buffer("scatter_index", keep.to(weight.device), persistent=False)
    module.scatter_width = width
    module.register_forward_hook(ScatterChannels())
