"""Distorted pictures of handwriting: turned, sheared, shrunk, faint, struck through and noisy."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

#: Largest turn in degrees, shear, shift in pixels of 32, and smallest and largest size and contrast.
TURN, SHEAR, SHIFT = 30.0, 0.25, 3.0
SCALE, CONTRAST = (0.6, 1.05), (0.4, 1.0)
STROKES, NOISE = 2, 25.0


def distort(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A distorted copy of a grey image.

    Args:
        image: bright writing on black, (size, size).
        rng: everything that is random comes from it.

    Returns:
        (size, size).
    """
    size = image.shape[0]
    middle = (size - 1) / 2
    turn, scale = np.deg2rad(rng.uniform(-TURN, TURN)), rng.uniform(*SCALE)
    shear = rng.uniform(-SHEAR, SHEAR)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ [[1.0, shear], [0.0, 1.0]]
    matrix *= scale
    shift = np.full(2, middle) - matrix @ np.full(2, middle) + rng.uniform(-SHIFT, SHIFT, 2) * size / 32
    warped = cv2.warpAffine(image, np.column_stack([matrix, shift]), (size, size), flags=cv2.INTER_LINEAR)
    canvas = warped.astype(np.float32) * rng.uniform(*CONTRAST)
    for _ in range(rng.integers(0, STROKES + 1)):
        stroke = np.zeros_like(image)
        ends = rng.integers(-size // 4, size + size // 4, 4).tolist()
        cv2.line(stroke, tuple(ends[:2]), tuple(ends[2:]), 255, 1, cv2.LINE_AA)
        canvas = np.maximum(canvas, stroke * np.float32(rng.uniform(0.2, 0.7)))
    canvas += rng.uniform(0, 40) + rng.normal(0.0, rng.uniform(0, NOISE), image.shape)
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)
