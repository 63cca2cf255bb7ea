"""What every operator replacement shares: compute precision, the caller's buffers, gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """Detach, and take half and bfloat16 to float32 (torchvision's CPU kernels have neither)."""
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def write(buffer: Tensor, value: Tensor) -> None:
    """Put ``value`` into the caller's buffer, whatever its dtype."""
    with torch.no_grad():
        buffer.resize_(value.shape).copy_(value)


def accumulate(buffer: Tensor, value: Tensor, scale: float = 1.0) -> None:
    """Add ``scale * value`` to the caller's buffer, as the compiled kernels do for parameter gradients."""
    with torch.no_grad():
        buffer.add_(value.to(buffer.dtype), alpha=scale)


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Vector-Jacobian product of ``function`` at ``inputs``: one gradient per input, in compute precision."""
    with torch.enable_grad():
        leaves = [widen(tensor).requires_grad_() for tensor in inputs]
        output = function(*leaves)
    return torch.autograd.grad(output, leaves, grad_output.detach().to(output.dtype))
