"""What removed channels still emit through norm and activation, and how the layers that read them take it over."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prune_mm.structures.pair import CONVS, dense_kernel, is_paired


@torch.no_grad()
def fold_constant(consumer: nn.Module, constant: Tensor, removed: Tensor, norm: nn.Module | None = None) -> None:
    """Move what removed channels still emit into the layer that reads them, in place; then they may be cut.

    Exact for linear layers, for convolutions without padding and for padding that repeats the input. *Not* exact where
    a convolution pads with zeros: there the constant is missing in the padding, so what it adds depends on the
    position. Such layers are refused; either the shift of the norm is masked while the network is fine-tuned, or
    :func:`carry_constant` keeps one channel.

    Args:
        consumer: the convolution (a pair, too) or linear layer that reads the channels.
        constant: ``(n,)``, what each channel emits.
        removed: boolean ``(n,)``, channels to remove.
        norm: batch norm behind the consumer, whose mean takes the constant when the consumer has no bias (a new bias
            would be a new parameter).

    Raises:
        ValueError: when it would not be exact, or there is neither bias nor norm.
    """
    constant = _removed_only(consumer, constant, removed)
    if not bool(constant.any()):
        return
    if not _is_position_free(consumer):
        raise ValueError(
            f"a {type(consumer).__name__} that pads with zeros cannot take a constant exactly: mask the norm's shift "
            "of removed channels while fine-tuning, or keep one of them (carry_constant)"
        )
    response = dense_kernel(consumer).double().unsqueeze(-1).flatten(2).sum(2) @ constant
    bias = (consumer.pair if is_paired(consumer) else consumer).bias
    if bias is not None:
        bias += response.to(bias.dtype)
    elif getattr(norm, "running_mean", None) is not None:
        norm.running_mean -= response.to(norm.running_mean.dtype)
    else:
        raise ValueError("the layer that reads the constant has no bias, and no batch norm behind it was given")


@torch.no_grad()
def carry_constant(consumer: nn.Module, constant: Tensor, removed: Tensor, carrier: int | None = None) -> int | None:
    """Let one removed channel stay and emit for all of them, in place: exact whatever the padding is.

    The kernels that read the removed channels are summed into those of the one with the largest constant, weighted
    with their constants, and set to zero elsewhere. Its own constant stays, and must not be masked.

    Args:
        consumer: the convolution or linear layer that reads the channels.
        constant: ``(n,)``, what each channel emits.
        removed: boolean ``(n,)``, channels that emit nothing but their constant.
        carrier: the one that stays, which must not emit zero; None: the one with the largest constant.

    Returns:
        The channel to keep, or None when all of them emit zero and may go.
    """
    constant = _removed_only(consumer, constant, removed)
    if carrier is None:
        carrier = int(constant.abs().argmax()) if constant.numel() else 0
    columns = removed.to(constant.device).nonzero().flatten()
    if not bool(constant.any()):
        return None
    weight = consumer.weight.data
    total = torch.einsum("nc...,c->n...", weight.double(), constant) / constant[carrier]
    weight[:, columns] = 0
    weight[:, carrier] = total.to(weight.dtype)
    return carrier


def _removed_only(consumer: nn.Module, constant: Tensor, removed: Tensor) -> Tensor:
    """The constants of removed channels, and zero for the others, after checking the sizes."""
    if not isinstance(consumer, (*CONVS, nn.Linear)) or getattr(consumer, "groups", 1) > 1:
        raise ValueError(f"a {type(consumer).__name__} with groups or without a kernel takes no constant")
    if consumer.weight.shape[1] != constant.numel() or removed.shape != constant.shape:
        found = (constant.numel(), removed.numel())
        raise ValueError(f"the layer reads {consumer.weight.shape[1]} channels; constants and mask have {found}")
    return torch.where(removed.to(constant.device), constant.double(), 0.0).to(consumer.weight.device)


def takes_constant(consumer: nn.Module) -> bool:
    """Whether :func:`fold_constant` works on a layer without a norm behind it."""
    return _is_position_free(consumer) and (consumer.pair if is_paired(consumer) else consumer).bias is not None


def _is_position_free(consumer: nn.Module) -> bool:
    """Whether a layer maps a constant input to a constant output."""
    if isinstance(consumer, nn.Linear) or consumer.padding_mode != "zeros" or consumer.padding == "valid":
        return True
    if consumer.padding == "same":
        return math.prod(consumer.kernel_size) == 1
    return not any(consumer.padding)
