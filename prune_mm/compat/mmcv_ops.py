"""The operators of ``mmcv._ext`` on top of torchvision and plain torch, forward and backward, CPU and CUDA.

Every function has the name, the parameters and the buffer semantics of the compiled operator it replaces:
results are written into the tensors the caller allocated, and scratch buffers (``columns``, ``argmax_y`` ...)
that torchvision does not need stay untouched. :data:`OPERATORS` lists them by name.

Backward functions differentiate the forward one with autograd: the compiled signatures pass the inputs again,
so nothing has to be kept between the two calls. Half and bfloat16 are computed in float32, as torchvision's
own autocast kernels do.

Known difference: mmcv's ``roi_pool`` (CUDA only) keeps fractional region borders, torchvision's rounds them
to whole cells first; the two agree for whole box corners at ``spatial_scale`` 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from .mmcv_buffers import gradients, widen, write
from .mmcv_deform import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)


def _overlaps(boxes1: Tensor, boxes2: Tensor, mode: int = 0, offset: int = 0) -> Tensor:
    """IoU (mode 0) or intersection over the area of ``boxes1`` (mode 1) of broadcastable (..., 4) boxes."""
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    high = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    intersection = (high - low + offset).clamp(min=0).prod(-1)
    area1 = (boxes1[..., 2:] - boxes1[..., :2] + offset).prod(-1)
    if mode == 1:
        return intersection / area1
    area2 = (boxes2[..., 2:] - boxes2[..., :2] + offset).prod(-1)
    return intersection / (area1 + area2 - intersection)


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Write the overlaps of (M, 4) and (N, 4) boxes into ``ious``: (M, N), or (M,) when ``aligned``."""
    left, right = widen(bboxes1), widen(bboxes2)
    write(ious, _overlaps(left if aligned else left[:, None], right, mode, offset))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices (int64, best score first) of the (N, 4) boxes that greedy NMS keeps."""
    boxes, scores = widen(boxes), widen(scores)
    # Moving the far corner by the offset turns inclusive pixel boxes into torchvision's continuous ones.
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al., ICCV 2017): decay the scores of overlapping boxes rather than drop the boxes.

    ``method`` is 0 (naive: weight 0 above the threshold), 1 (linear: 1 - IoU above it) or 2 (Gaussian:
    exp(-IoU^2 / sigma)). Boxes whose decayed score falls below ``min_score`` are dropped.

    Returns:
        Indices (K,) of the kept boxes in the order taken; ``dets[:K]`` receives their boxes and new scores.
    """
    boxes, scores = widen(boxes), widen(scores)
    alive = torch.arange(len(boxes), device=boxes.device)
    kept: list[Tensor] = []
    rows: list[Tensor] = []
    while len(alive):
        best = scores.argmax()
        top = alive[best]
        kept.append(top)
        rows.append(torch.cat([boxes[top], scores[best, None]]))
        rest = alive != top
        alive, scores = alive[rest], scores[rest]
        # Two boxes without area have no IoU (0/0); neither suppresses the other.
        iou = _overlaps(boxes[top], boxes[alive], offset=offset).nan_to_num(nan=0.0)
        if method == 2:
            scores = scores * torch.exp(-iou.square() / sigma)
        else:
            decayed = scores * (1 - iou) if method == 1 else torch.zeros_like(scores)
            scores = torch.where(iou >= iou_threshold, decayed, scores)
        survivors = scores >= min_score
        alive, scores = alive[survivors], scores[survivors]
    if not kept:
        return alive
    dets[: len(rows)] = torch.stack(rows).to(dets)
    return torch.stack(kept)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Greedy NMS of (N, 5) detections: each survivor's index, then those of the boxes it suppressed."""
    dets = widen(dets)
    rest = dets[:, 4].argsort(descending=True, stable=True)
    groups = []
    while len(rest):
        top, others = rest[:1], rest[1:]
        matched = _overlaps(dets[top, :4], dets[others, :4]) >= iou_threshold
        groups.append(torch.cat([top, others[matched]]).tolist())
        rest = others[~matched]
    return groups


def _average_only(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            "mmcv operator 'roi_align' with pool_mode='max' needs mmcv's compiled operators; "
            "the torchvision-backed replacement averages (pool_mode='avg')."
        )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign of (N, C, H, W) at ``rois`` (K, 5) into ``output`` (K, C, aligned_height, aligned_width).

    Raises:
        NotImplementedError: if ``pool_mode`` is 0 (max).
    """
    _average_only(pool_mode)
    size = (aligned_height, aligned_width)
    features = widen(input)
    regions = rois.detach().to(features.dtype)
    write(output, torchvision.ops.roi_align(features, regions, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of :func:`roi_align_forward` with respect to its (N, C, H, W) input.

    Raises:
        NotImplementedError: if ``pool_mode`` is 0 (max).
    """
    _average_only(pool_mode)
    size = (aligned_height, aligned_width)

    def pool(features: Tensor) -> Tensor:
        regions = rois.detach().to(features.dtype)
        return torchvision.ops.roi_align(features, regions, size, spatial_scale, sampling_ratio, aligned)

    # Average pooling is linear, so its gradient does not depend on where it is taken.
    (gradient,) = gradients(pool, [torch.zeros_like(grad_input)], grad_output)
    write(grad_input, gradient)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool into ``output`` (K, C, pooled_height, pooled_width).

    ``argmax``, of the same shape, receives the flat H*W position of each maximum, -1 for an empty region.
    """
    features = widen(input)
    regions = rois.detach().to(features.dtype)
    # The public torchvision function hides the positions, which the backward pass needs.
    pooled, positions = torch.ops.torchvision.roi_pool(features, regions, spatial_scale, pooled_height, pooled_width)
    write(output, pooled)
    write(argmax, positions)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the gradient of :func:`roi_pool_forward`: a cell's gradient goes to the position it took."""
    images, channels, height, width = grad_input.shape
    plane = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)
    target = plane[:, :, None, None] * (height * width) + argmax.long()
    filled = argmax >= 0  # an empty region has position -1 and no gradient
    gradient = widen(grad_output)
    flat = gradient.new_zeros(images * channels * height * width)
    flat.index_add_(0, target[filled], gradient[filled])
    write(grad_input, flat.view(grad_input.shape))


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    """Element-wise sigmoid focal loss (Lin et al., ICCV 2017, eq. 5), (N, C); label C means background.

    Written with log-sigmoids because torchvision's form has a NaN gradient at saturated logits for gamma < 1.
    """
    classes = logits.shape[1]
    positive = target[:, None] == torch.arange(classes, device=target.device)
    signed = torch.where(positive, logits, -logits)
    balance = torch.where(positive, logits.new_tensor(alpha), logits.new_tensor(1 - alpha))
    loss = -balance * (gamma * F.logsigmoid(-signed)).exp() * F.logsigmoid(signed)
    if not weight.numel():
        return loss
    # Class weights go by the label of the sample; the background has no entry in the table.
    known = (target >= 0) & (target < classes)
    per_sample = torch.where(known, weight[target.clamp(0, classes - 1)], 1.0)
    return loss * per_sample[:, None]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the element-wise focal loss of logits (N, C) and labels (N,); ``weight`` is (C,) or empty."""
    write(output, _focal_loss(widen(input), target, widen(weight), gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the element-wise derivative of :func:`sigmoid_focal_loss_forward` with respect to the logits."""

    def loss(logits: Tensor) -> Tensor:
        return _focal_loss(logits, target, widen(weight), gamma, alpha)

    (gradient,) = gradients(loss, [input], torch.ones_like(input))
    write(grad_input, gradient)


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write stride-1 patches of ``im`` (1, C, H, W) at K positions into ``col`` (C*kernel_h*kernel_w, K)."""
    patches = F.unfold(widen(im), (kernel_h, kernel_w), padding=(pad_h, pad_w))[0]
    out_width = im.shape[3] + 2 * pad_w - kernel_w + 1
    write(col, patches[:, mask_h_idx * out_width + mask_w_idx])


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Put the K columns of ``col`` (C, K) at their positions in ``im`` (1, C, height, width)."""
    with torch.no_grad():
        im[0, :, mask_h_idx, mask_w_idx] = col.detach().to(im.dtype)


def _deformable_attention(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    # mmcv has a reference in plain torch, which it uses on the CPU; its CUDA path comes here instead.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, spatial_shapes.tolist(), locations, weights)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al., ICLR 2021).

    Shapes: (N, keys, heads, dim) to (N, queries, heads*dim).
    """
    result = _deformable_attention(
        widen(value), value_spatial_shapes, widen(sampling_locations), widen(attention_weights)
    )
    return result.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the three gradients of :func:`ms_deform_attn_forward`."""

    def attend(values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return _deformable_attention(values, value_spatial_shapes, locations, weights)

    results = gradients(attend, (value, sampling_locations, attention_weights), grad_output)
    for buffer, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), results, strict=True):
        write(buffer, gradient)


def get_compiler_version() -> str:
    """Say, where mmcv reports its compiler, that nothing was compiled."""
    return f"not compiled (operators from torchvision {torchvision.__version__})"


def get_compiling_cuda_version() -> str:
    """Say, where mmcv reports the CUDA version it was compiled with, that nothing was compiled."""
    return f"not compiled (torch built with CUDA {torch.version.cuda or 'not available'})"


OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        bbox_overlaps,
        nms,
        softnms,
        nms_match,
        roi_align_forward,
        roi_align_backward,
        roi_pool_forward,
        roi_pool_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        masked_im2col_forward,
        masked_col2im_forward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
}
