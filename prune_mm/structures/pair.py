"""Convolutions as pairs, k x k then 1x1: the training form.

The pair hangs on the convolution it stands for, so its name keeps its meaning: ``conv1.weight`` makes the intermediate
channels, ``conv1.pair.weight`` mixes them into the outputs, and the bias, which is added behind the pair, is
``conv1.pair.bias``. ``pair`` is an ordinary 1x1 convolution; the channel graph of a network with pairs has a group
``conv1`` of intermediate channels and a group ``conv1.pair`` of outputs, and a state dict of the dense network loads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pair_matrix(weight: Tensor) -> Tensor:
    """The sparsity-inducing matrix A of a 1x1 kernel: ``(n, r, 1, 1)`` to ``(r, n)``, a view whose writes reach it.

    Row i belongs to intermediate channel i, column j to output j.

    Raises:
        ValueError: when the kernel is larger than 1x1.
    """
    if math.prod(weight.shape[2:]) != 1:
        raise ValueError(f"a kernel of shape {tuple(weight.shape)} is no matrix")
    while weight.ndim > 2:
        weight = weight.select(-1, 0)
    return weight.T


def merged_kernel(weight: Tensor, matrix: Tensor) -> Tensor:
    """The one kernel that W ``(r, c, k, ...)`` and A ``(r, n)`` amount to, ``(n, c, k, ...)``; computed in float64."""
    kernel = matrix.detach().double().T @ weight.detach().double().flatten(1)
    return kernel.to(weight.dtype).view(-1, *weight.shape[1:])


def dense_kernel(conv: nn.Module) -> Tensor:
    """Kernel of a layer, ``(n, c, k, ...)``; that of a pair is merged."""
    return merged_kernel(conv.weight, pair_matrix(conv.pair.weight)) if is_paired(conv) else conv.weight.detach()


def exact_pair(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A pair that computes what ``kernel`` does, made without arithmetic.

    Args:
        kernel: ``(n, c, k, ...)``, with d = c * k * ... elements a filter.
        rank: n (W is the kernel and A the identity) or d (W is the identity and A the kernel).

    Returns:
        W ``(rank, c, k, ...)`` and A ``(rank, n)``.

    Raises:
        ValueError: for another rank.
    """
    outputs, taps = kernel.shape[0], kernel[0].numel()
    if rank == outputs:
        return kernel.clone(), torch.eye(rank, dtype=kernel.dtype, device=kernel.device)
    if rank == taps:
        unit = torch.eye(rank, dtype=kernel.dtype, device=kernel.device)
        return unit.view(rank, *kernel.shape[1:]), kernel.flatten(1).T.clone()
    raise ValueError(f"{outputs} filters of {taps} weights make a pair of rank {outputs} or {taps}, not {rank}")


def is_paired(module: nn.Module) -> bool:
    """Whether a module is a convolution with a pair."""
    return isinstance(module, CONVS) and isinstance(module._modules.get("pair"), CONVS)


def why_no_pair(module: nn.Module) -> str | None:
    """Why a module cannot become a pair, or None when it can."""
    base = next((cls for cls in CONVS if isinstance(module, cls)), None)
    if base is None:
        return f"it is a {type(module).__name__}, not a convolution"
    if module.groups > 1:
        return f"it has {module.groups} groups, and a full matrix behind it would mix them"
    if type(module).forward is not base.forward or "weight" not in module._parameters:
        return "it computes its weight or its output in a way of its own"
    return "it is a pair already" if is_paired(module) else None


@torch.no_grad()
def attach_pair(conv: nn.Module, rank: int | None = None) -> nn.Module:
    """Give a convolution the training form, in place, without changing what it computes; see :func:`exact_pair`.

    Attach before an optimizer, DDP or an averaged copy is made of the network. A state dict of the dense network can
    be loaded afterwards and is split the same way; :func:`set_pair` then sets another split. Whatever initialises
    weights in between is made good by :func:`reset_unloaded_pair`.

    Args:
        conv: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` without groups.
        rank: intermediate channels, n or d; None: the smaller one.

    Returns:
        The 1x1 convolution ``conv.pair``.

    Raises:
        ValueError: saying why it cannot become a pair.
    """
    reason = why_no_pair(conv)
    if reason is not None:
        raise ValueError(f"no pair can be attached: {reason}")
    weight, bias = conv.weight, conv.bias
    outputs = weight.shape[0]
    filters, matrix = exact_pair(weight.detach(), min(outputs, weight[0].numel()) if rank is None else rank)
    cls = next(cls for cls in CONVS if isinstance(conv, cls))
    # On the meta device nothing is drawn from a random generator.
    pair = cls(filters.shape[0], outputs, 1, bias=False, device="meta", dtype=weight.dtype)
    pair.weight = nn.Parameter(matrix.T.reshape(outputs, -1, *[1] * (weight.ndim - 2)), weight.requires_grad)
    pair.bias = bias
    pair.training = conv.training
    conv.bias = None
    conv.out_channels = filters.shape[0]
    if filters.shape != weight.shape:
        conv.weight = nn.Parameter(filters, weight.requires_grad)
    conv.add_module("pair", pair)
    # Before whatever scatters or gathers behind the convolution already.
    conv.register_forward_hook(MixOutputs(), prepend=True)
    conv.register_load_state_dict_pre_hook(SplitDense())
    return pair


@torch.no_grad()
def merge_pair_(conv: nn.Module) -> None:
    """The reverse of :func:`attach_pair`: one convolution with the merged kernel, in place."""
    kernel, pair = dense_kernel(conv), conv.pair
    conv.weight = nn.Parameter(kernel, conv.weight.requires_grad)
    conv.out_channels = kernel.shape[0]
    del conv.pair
    conv.bias = pair.bias
    for hooks, cls in ((conv._forward_hooks, MixOutputs), (conv._load_state_dict_pre_hooks, SplitDense)):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), cls)]:
            del hooks[key]


@torch.no_grad()
def set_pair(conv: nn.Module, weight: Tensor, matrix: Tensor) -> None:
    """Set W ``(r, c, k, ...)`` and A ``(r, n)`` of a pair, keeping its parameters (optimizers hold them).

    Raises:
        ValueError: when they are of other sizes.
    """
    own = pair_matrix(conv.pair.weight)
    if weight.shape != conv.weight.shape or matrix.shape != own.shape:
        found, expected = ((*a.shape, *b.shape) for a, b in ((weight, matrix), (conv.weight, own)))
        raise ValueError(f"W and A have sizes {found}, the pair has {expected}")
    conv.weight.copy_(weight)
    own.copy_(matrix)


@torch.no_grad()
def reset_unloaded_pair(conv: nn.Module) -> None:
    """Undo what weight initialisation did to A: no weights were loaded, so W alone is the kernel, where sizes allow.

    Initialisers of whole networks (``init_cfg`` of OpenMMLab) take ``pair`` for a convolution like any other.
    """
    hooks = (getattr(hook, "hook", hook) for hook in conv._load_state_dict_pre_hooks.values())
    loaded = any(hook.loaded for hook in hooks if isinstance(hook, SplitDense))
    matrix = pair_matrix(conv.pair.weight)
    if not loaded and matrix.shape[0] == matrix.shape[1]:
        matrix.copy_(torch.eye(len(matrix)))


class MixOutputs:
    """Forward hook that runs the 1x1 convolution behind the k x k one; a hook keeps names and class of the latter."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """``(N, r, ...)`` to ``(N, n, ...)``."""
        return module.pair(output)


class SplitDense:
    """Hook that splits the kernel of the dense network when its state dict is loaded into a pair."""

    def __init__(self) -> None:
        """Nothing was loaded yet."""
        self.loaded = False

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Replace the dense tensors of ``state``, which is the loader's own copy."""
        kernel, key = state.get(f"{prefix}weight"), f"{prefix}pair.weight"
        if kernel is None:
            return
        self.loaded = True
        rank, mixed = module.weight.shape[0], module.pair.weight
        fits = kernel.ndim == mixed.ndim and kernel.shape == (mixed.shape[0], *module.weight.shape[1:])
        if key in state or not fits or rank not in (kernel.shape[0], kernel[0].numel()):
            return
        filters, matrix = exact_pair(kernel, rank)
        state[f"{prefix}weight"], state[key] = filters, matrix.T.reshape(mixed.shape)
        if f"{prefix}bias" in state:
            state[f"{prefix}pair.bias"] = state.pop(f"{prefix}bias")


def dense_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes the tensors of a network with uncut pairs have without them, as in a dense checkpoint."""
    dense = {name: tuple(shape) for name, shape in shapes.items()}
    for name in shapes:
        owner = name.removesuffix("pair.weight")
        if owner == name or f"{owner}weight" not in dense:
            continue
        dense[f"{owner}weight"] = (dense.pop(name)[0], *dense[f"{owner}weight"][1:])
        if f"{owner}pair.bias" in dense:
            dense[f"{owner}bias"] = dense.pop(f"{owner}pair.bias")
    return dense


def merging_is_cheaper(outputs: int, rank: int, inputs: int, taps: int) -> bool:
    """Whether one convolution has at most the weights, and so the MACs, of a pair; both run at the same positions.

    Args:
        outputs: n, outputs that stay.
        rank: r, intermediate channels that stay.
        inputs: c, inputs that stay.
        taps: elements of the k x k kernel.
    """
    return outputs * inputs * taps <= rank * (inputs * taps + outputs)
