"""mmcv's deformable convolutions, v1 and v2, on ``torchvision::deform_conv2d``; see ``mmcv_ops.py``.

The compiled signatures also carry the kernel size, the groups, ``im2col_step`` and scratch buffers. The first
two follow from the shapes of ``weight`` and ``offset``, the others concern the compiled kernel only: all are
accepted, and not read.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor

from .mmcv_buffers import accumulate, gradients, widen, write


def deform_conv2d(x: Tensor, offset: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As torchvision's operator, whose CPU kernel reads outside its memory when an offset is NaN; this gives NaN."""
    diverged = not offset.is_cuda and bool(offset.isnan().any())
    if diverged:
        offset = offset.nan_to_num(nan=0.0)
    result = torchvision.ops.deform_conv2d(x, offset, *args, **kwargs)
    return result * float("nan") if diverged else result


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution v1 (Dai et al., ICCV 2017) into ``output``."""
    result = deform_conv2d(
        widen(input), widen(offset), widen(weight), None, (dH, dW), (padH, padW), (dilationH, dilationW)
    )
    write(output, result)


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the gradients of :func:`deform_conv_forward` with respect to ``input`` and ``offset``."""

    def convolve(x: Tensor, shift: Tensor) -> Tensor:
        return deform_conv2d(x, shift, widen(weight), None, (dH, dW), (padH, padW), (dilationH, dilationW))

    for buffer, gradient in zip(
        (grad_input, grad_offset), gradients(convolve, (input, offset), grad_output), strict=True
    ):
        write(buffer, gradient)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the gradient of :func:`deform_conv_forward` with respect to the weight."""

    def convolve(weight: Tensor) -> Tensor:
        return deform_conv2d(widen(input), widen(offset), weight, None, (dH, dW), (padH, padW), (dilationH, dilationW))

    # The convolution is linear in its weight, so the weight itself (which is not passed) does not matter.
    (gradient,) = gradients(convolve, [torch.zeros_like(grad_weight)], grad_output)
    accumulate(grad_weight, gradient, scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Modulated deformable convolution, DCNv2 (Zhu et al., CVPR 2019), into ``output``.

    ``bias`` is an empty tensor when ``with_bias`` is false.
    """
    result = deform_conv2d(
        widen(input),
        widen(offset),
        widen(weight),
        widen(bias) if with_bias else None,
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
        widen(mask),
    )
    write(output, result)


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Gradients of :func:`modulated_deform_conv_forward`: written (activations) or added (parameters)."""

    def convolve(x: Tensor, shift: Tensor, gate: Tensor, kernel: Tensor) -> Tensor:
        return deform_conv2d(
            x, shift, kernel, None, (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), gate
        )

    to_input, to_offset, to_mask, to_weight = gradients(convolve, (input, offset, mask, weight), grad_output)
    write(grad_input, to_input)
    write(grad_offset, to_offset)
    write(grad_mask, to_mask)
    accumulate(grad_weight, to_weight)
    if with_bias:
        accumulate(grad_bias, widen(grad_output).sum((0, 2, 3)))
