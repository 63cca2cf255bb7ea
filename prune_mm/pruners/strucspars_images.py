"""Pictures of StrucSpars' state: ordered kernel norms beside the regulariser."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

#: Longest side of one matrix in pixels: larger ones are averaged down, small ones are magnified.
SIDE = 256
_GAP = 8
_FRAME = 0.4  # gray around each matrix, whose empty blocks are as white as the page


def norm_image(ordered_norms: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Two matrices side by side in frames, both ``(outputs, inputs)``, dark where large.

    Norms are shown relative to their 99th percentile, so that a few strong kernels do not hide the others; the
    regulariser relative to its largest value.

    Returns:
        ``(height, width, 3)`` uint8.
    """
    scale = max(float(np.quantile(ordered_norms, 0.99)), 1e-12)
    left = _pixels(np.clip(ordered_norms / scale, 0.0, 1.0))
    right = _pixels(strengths / max(float(strengths.max()), 1e-12))
    framed = [np.pad(1.0 - matrix, 1, constant_values=1.0 - _FRAME) for matrix in (left, right)]
    gray = np.concatenate([framed[0], np.ones((framed[0].shape[0], _GAP)), framed[1]], axis=1)
    return np.repeat(np.round(gray * 255.0).astype(np.uint8)[:, :, None], 3, axis=2)


def _pixels(matrix: np.ndarray) -> np.ndarray:
    rows, columns = matrix.shape
    factor = SIDE / max(rows, columns)
    image = torch.from_numpy(matrix)[None, None]
    if factor >= 2.0:
        return interpolate(image, scale_factor=int(factor), mode="nearest")[0, 0].numpy()
    size = (max(round(rows * min(factor, 1.0)), 1), max(round(columns * min(factor, 1.0)), 1))
    return adaptive_avg_pool2d(image, size)[0, 0].numpy()
