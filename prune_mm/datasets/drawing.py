"""Pictures of the demo data: textured shapes over coloured noise.

Shapes are drawn from signed distance functions, so the anti-aliased picture and the mask come from one outline. Colours
are float32 RGB in [0, 1], lengths are pixels unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]

# Outlines: signed distance, negative inside, in a frame where the shape fits the unit circle.


def _star(x: Floats, y: Floats) -> Floats:
    # Folding the plane into half a spike leaves a single straight edge, from the tip to the notch.
    tip, notch, half = 1.0, 0.45, math.pi / 5
    angle = abs((np.arctan2(x, y) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    run, rise = tip - notch * math.cos(half), notch * math.sin(half)
    return ((radius * np.cos(angle) - tip) * rise + radius * np.sin(angle) * run) / math.hypot(run, rise)


def _cross(x: Floats, y: Floats) -> Floats:
    x, y = abs(x), abs(y)
    arm, length = 0.3, 0.95
    return np.minimum(np.maximum(x - length, y - arm), np.maximum(x - arm, y - length))


def _hook(x: Floats, y: Floats) -> Floats:
    long, short = np.maximum(abs(x + 0.58) - 0.12, abs(y) - 0.7), np.maximum(abs(x) - 0.7, abs(y - 0.58) - 0.12)
    return np.minimum(long, short)


def _blob(x: Floats, y: Floats) -> Floats:
    angle = np.arctan2(y, x)
    return np.hypot(x, y) - (0.6 + 0.2 * np.sin(2 * angle) + 0.12 * np.sin(3 * angle + 1))


_OUTLINES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "bar": lambda x, y: np.maximum(abs(x) - 0.9, abs(y) - 0.35),
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.9, 0.7 - np.hypot(x - 0.45, y)),
    "cross": _cross,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.7) - 0.2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - math.sqrt(0.5),
    "star": _star,
    "triangle": lambda x, y: np.maximum(y, abs(x) * math.sin(math.pi / 3) - y / 2) - 0.5,
    # Marks that are no objects.
    "blob": _blob,
    "hook": _hook,
    "stroke": lambda x, y: np.hypot(np.maximum(abs(x) - 0.9, 0), y) - 0.06,
}
#: What lies about in a cluttered picture, and what lies across its objects.
MARKS = ("blob", "hook", "stroke")
#: Outlines that can be a class of objects.
OBJECTS = tuple(name for name in _OUTLINES if name not in MARKS)


@dataclass(frozen=True)
class Shape:
    """An outline placed in an image: centre and circumradius in pixels, angle in radians."""

    name: str
    cx: float
    cy: float
    radius: float
    angle: float

    @classmethod
    def sample(cls, rng: np.random.Generator, name: str, size: int, radii: tuple[float, float]) -> Shape:
        """Place ``name`` anywhere it fits whole; small radii are as likely as large ones on a log scale."""
        radius = float(np.exp(rng.uniform(*np.log(radii))))
        cx, cy = rng.uniform(radius, size - radius, 2)
        return cls(name, float(cx), float(cy), radius, float(rng.uniform(0, 2 * math.pi)))

    def frame(self, size: int) -> tuple[Floats, Floats]:
        """Coordinates of all pixel centres in the frame of the shape, two (size, size) arrays in radii."""
        centres = (np.arange(size) + 0.5) / self.radius
        x, y = (centres - self.cx / self.radius)[None, :], (centres - self.cy / self.radius)[:, None]
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return (cos * x + sin * y).astype(np.float32), (cos * y - sin * x).astype(np.float32)

    def distance(self, size: int) -> Floats:
        """Signed distance of all pixel centres to the outline in pixels, (size, size)."""
        return _OUTLINES[self.name](*self.frame(size)) * self.radius


# Pictures.


@dataclass(frozen=True)
class Style:
    """How busy pictures are: deviation of the background noise (lowest, highest), and strength of shape textures."""

    noise: tuple[float, float]
    texture: float


BUSY = Style(noise=(0.05, 0.13), texture=1.0)
# One label an image teaches much less than boxes and masks, so a classifier gets calmer pictures to learn from.
CALM = Style(noise=(0.02, 0.04), texture=0.4)


@lru_cache(maxsize=64)
def _upsampling(cells: int, size: int) -> Floats:
    """Smoothstep weights, (size, cells + 1), that spread a line of grid values over ``size`` pixels."""
    position = np.linspace(0, cells, size, endpoint=False)
    left = position.astype(int)
    step = position - left
    step = step * step * (3 - 2 * step)
    weights = np.zeros((size, cells + 1), np.float32)
    weights[np.arange(size), left] = 1 - step
    weights[np.arange(size), left + 1] = step
    return weights


def _noise(rng: np.random.Generator, size: int, cells: Sequence[int], channels: int) -> Floats:
    """Smooth noise, (size, size, channels), mean 0, deviation 1: an octave for each entry of ``cells``."""
    noise = np.zeros((channels, size, size), np.float32)
    for octave, count in enumerate(cells):
        grid = rng.standard_normal((channels, count + 1, count + 1), np.float32) * 0.7**octave
        weights = _upsampling(count, size)
        noise += weights @ grid @ weights.T
    return noise.transpose(1, 2, 0) / (noise.std() + 1e-6)


def _background(rng: np.random.Generator, size: int, style: Style) -> Floats:
    """A colour gradient under multi-scale colour noise, (size, size, 3)."""
    start, end = rng.uniform(0.15, 0.85, (2, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    ramp = 0.5 + (math.cos(angle) * line[None, :] + math.sin(angle) * line[:, None]) / math.sqrt(2)
    gradient = start + (end - start) * 0.6 * ramp[..., None]
    grey = rng.uniform(0, 1)
    noise = grey * _noise(rng, size, (3, 6, 12, 24), 1) + (1 - grey) * _noise(rng, size, (2, 4, 8, 16), 3)
    return gradient + rng.uniform(*style.noise) * noise


def _texture(rng: np.random.Generator, shape: Shape, size: int) -> Floats:
    """Mixing weight of the two colours of a shape, (size, size, 1): stripes, gradient or noise in [0, 1]."""
    kind = rng.integers(3)
    if kind == 2:
        cells = max(2, round(size / shape.radius * 2))
        return np.clip(0.5 + 0.4 * _noise(rng, size, (cells, 2 * cells), 1), 0, 1)
    x, y = shape.frame(size)
    angle = rng.uniform(0, 2 * math.pi)
    along = (math.cos(angle) * x + math.sin(angle) * y)[..., None]
    if kind == 1:
        return np.clip((along + 1) / 2, 0, 1)
    # Stripes finer than 5 pixels would alias into grey.
    period = max(rng.uniform(0.3, 0.7), 5 / shape.radius)
    return np.clip(0.5 + np.sin(2 * math.pi * along / period + rng.uniform(0, 2 * math.pi)), 0, 1)


def _paint(rng: np.random.Generator, image: Floats, shape: Shape, style: Style) -> None:
    """Draw ``shape`` over ``image`` (size, size, 3) in place, anti-aliased over one pixel."""
    size = image.shape[0]
    alpha = np.clip(0.5 - shape.distance(size), 0, 1)[..., None].astype(np.float32)
    below = (image * alpha).sum((0, 1)) / alpha.sum()
    # Of several colour pairs the best is taken, so that hardly any shape melts into its ground and hardly any
    # texture into one flat colour.
    first, other = rng.uniform(0, 1, (2, 10, 3)).astype(np.float32)
    second = first + 0.5 * (other - first)
    gaps = [np.linalg.norm(gap, axis=1) for gap in (first - below, second - below, 1.5 * (first - second))]
    best = int(np.min(gaps, axis=0).argmax())
    weight = style.texture * _texture(rng, shape, size)
    colour = first[best] * (1 - weight) + second[best] * weight
    image += alpha * (colour - image)


def render(rng: np.random.Generator, shapes: Sequence[Shape], size: int, style: Style) -> Image.Image:
    """Background, shapes in order, faint sensor noise; an RGB image of ``size`` x ``size``."""
    image = _background(rng, size, style)
    for shape in shapes:
        _paint(rng, image, shape, style)
    image += 0.015 * rng.standard_normal(image.shape, np.float32)
    return Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))
