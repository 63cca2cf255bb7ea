"""Cutting tensors of a live module, and keeping its attributes true to their new shapes."""

from __future__ import annotations

import numpy as np
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


class GatherInputs:
    """Forward pre-hook that puts input channels into the order a grouped convolution reads them in."""

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        """``(N, C, ...)`` to the same shape."""
        # An unbatched input has its channels first.
        axis = args[0].ndim - (module.weight.ndim - 1)
        return (_gather(args[0], axis, module.gather_in), *args[1:])


class GatherOutputs:
    """Forward hook that puts the outputs of a grouped convolution back into order."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """``(N, C, ...)`` to the same shape."""
        return _gather(output, output.ndim - (module.weight.ndim - 1), module.gather_out)


def _gather(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """``x.index_select(axis, index)``."""
    plain = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch.compiler.is_compiling()
    if axis == 0 or plain or not (x.is_cpu and x.is_contiguous()):
        return x.index_select(axis, index)
    # On CPU, PyTorch selects along the first axis about twice as fast as along the second, and in parallel.
    batch, channels = x.shape[:2]
    rows = (torch.arange(0, batch * channels, channels).unsqueeze(1) + index).flatten()
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, (batch, channels))


def gather_around(conv: nn.Module, before: np.ndarray | None, behind: np.ndarray | None) -> None:
    """Gather inputs and outputs of a convolution by index; None: not.

    Hooks, like :class:`ScatterChannels`. On a layer that gathers already the new gathers are the inner ones.
    """
    for name, index in (("gather_in", before), ("gather_out", behind)):
        if index is None:
            continue
        new = torch.from_numpy(index).to(conv.weight.device)
        old = getattr(conv, name, None)
        if old is not None:
            setattr(conv, name, old[new] if name == "gather_in" else new[old])
            continue
        conv.register_buffer(name, new, persistent=False)
        if name == "gather_in":
            conv.register_forward_pre_hook(GatherInputs())
        else:
            # Before whatever scatters or gathers behind it already.
            conv.register_forward_hook(GatherOutputs(), prepend=True)
