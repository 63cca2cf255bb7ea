"""MMPretrain's image transforms as DALI operators: same names, same options, same random distributions.

A *step* is made from a transform that MMPretrain has built, so options and defaults are checked and filled in there.
All randomness of a sample is drawn outside of the graph, by :meth:`Step.draw`: the graph is a pure function of an image
and these numbers, hence a sample looks the same whatever the batch size, the number of processes or the epoch at which
a run was resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A uniform number just below one half: the middle of an interval, rounded down.
_CENTRE = 0.49999


class Canvas:
    """The image while the graph is being built. It is decoded, and scaled, when a step needs pixels and not before.

    Pixels are ``(height, width, 3)`` uint8 in the order red, green, blue: decoding to blue first takes DALI twice as
    long.

    Args:
        encoded: bytes of the files, a DALI ``DataNode``.
        gpu: decode and transform on the GPU.
    """

    def __init__(self, encoded: Any, gpu: bool) -> None:
        """See the class."""
        from nvidia.dali import fn

        self.encoded, self.gpu = encoded, gpu
        shape = fn.peek_image_shape(encoded)
        self.original = shape[0:2]
        self.height, self.width = shape[0], shape[1]
        self._pixels: Any = None
        self._scaling: dict[str, Any] | None = None
        self._decoder = {"device": "mixed" if gpu else "cpu", "jpeg_fancy_upsampling": True}

    @property
    def pixels(self) -> Any:
        """The image after all steps so far."""
        from nvidia.dali import fn

        if self._pixels is None:
            self._pixels = fn.decoders.image(self.encoded, **self._decoder)
        if self._scaling is not None:
            size = fn.stack(_to_float(self.height), _to_float(self.width))
            self._pixels = fn.resize(self._pixels, size=size, **self._scaling)
            self._scaling = None
        return self._pixels

    @pixels.setter
    def pixels(self, value: Any) -> None:
        self._pixels = value

    def crop(self, y: Any, x: Any, height: Any, width: Any) -> None:
        """Cut out a window; nothing outside of it is decoded, or scaled, when that is still to be done."""
        from nvidia.dali import fn

        y, x, height, width = (_to_int(value) for value in (y, x, height, width))
        if self._scaling is not None:
            self._crop_and_scale(y, x, height, width)
        else:
            window = {"start": fn.stack(y, x), "shape": fn.stack(height, width), "axes": [0, 1]}
            if self._pixels is None:
                self._pixels = fn.decoders.image_slice(self.encoded, **self._decoder, **window)
            else:
                self._pixels = fn.slice(self._pixels, **window)
        self.height, self.width = height, width

    def _crop_and_scale(self, y: Any, x: Any, height: Any, width: Any) -> None:
        from nvidia.dali import fn

        scaling, self._scaling = self._scaling, None
        factors = [_to_float(a) / _to_float(b) for a, b in zip(self._unscaled, (self.height, self.width))]
        start = [_to_float(at) * factor for at, factor in zip((y, x), factors)]
        end = [_to_float(at + edge) * factor for at, edge, factor in zip((y, x), (height, width), factors)]
        size = fn.stack(_to_float(height), _to_float(width))
        window = {"roi_start": fn.stack(*start), "roi_end": fn.stack(*end)}
        self._pixels = fn.resize(self.pixels, size=size, **window, **scaling)

    def resize(self, height: Any, width: Any, interpolation: str, antialias: bool) -> None:
        """Scale to ``height x width`` pixels."""
        from nvidia.dali import types

        self._pixels = self.pixels
        kinds = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
        self._scaling = {"interp_type": kinds[interpolation], "antialias": antialias}
        self._unscaled = self.height, self.width
        self.height, self.width = height, width


class Step:
    """One transform. So many ``numbers`` are drawn for each sample; without any it is not random."""

    numbers = 0

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The random numbers of one sample, ``(numbers,)`` float32."""
        raise NotImplementedError

    def apply(self, canvas: Canvas, drawn: Any) -> None:
        """Add operators to the graph; ``drawn`` is the node that carries :meth:`draw`."""
        raise NotImplementedError

    def notes(self, drawn: NDArray[np.float32]) -> dict[str, Any]:
        """What MMPretrain would write about a sample."""
        return {}


class RandomResizedCrop(Step):
    """A window of random area and aspect ratio, scaled; up to ``max_attempts`` tries, then the central one."""

    def __init__(self, transform: Any) -> None:
        """Args: transform: MMPretrain's."""
        self.size = _pair(transform.scale)
        self.area, self.aspect = tuple(transform.crop_ratio_range), tuple(transform.aspect_ratio_range)
        self.attempts = transform.max_attempts
        self.scaling = _scaling(transform)
        self.numbers = 2 * self.attempts + 2

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Relative width and height of each attempt, in units of the square root of the area; then the position."""
        area = np.sqrt(rng.uniform(*self.area, self.attempts))
        aspect = np.exp(0.5 * rng.uniform(*np.log(self.aspect), self.attempts))
        return np.concatenate([area * aspect, area / aspect, rng.random(2)]).astype(np.float32)

    def apply(self, canvas: Canvas, drawn: Any) -> None:
        """Crop and scale."""
        from nvidia.dali import fn, math

        count, height, width = self.attempts, _to_float(canvas.height), _to_float(canvas.width)
        side = math.sqrt(height * width)
        least, most = self.aspect
        # The last candidate always fits: it is the largest central window of an allowed aspect ratio.
        widths = fn.cat(_round(drawn[0:count] * side), fn.stack(math.min(width, _round(height * most))))
        heights = fn.cat(_round(drawn[count : 2 * count] * side), fn.stack(math.min(height, _round(width / least))))
        fits = (widths <= width) & (heights <= height) & (widths > 0) & (heights > 0)
        order = _to_float(fits) * np.arange(count + 1, 0, -1, dtype=np.float32)
        best = fn.reductions.max(order)
        first = _to_float(order == best)
        central = _to_float(best == 1)
        h, w = fn.reductions.sum(heights * first), fn.reductions.sum(widths * first)
        y, x = (drawn[2 * count + i] * (1 - central) + _CENTRE * central for i in (0, 1))
        y, x = math.floor(y * (height - h + 1)), math.floor(x * (width - w + 1))
        canvas.crop(y, x, h, w)
        canvas.resize(*self.size, *self.scaling)


class RandomFlip(Step):
    """Mirror horizontally, vertically or both, each with its probability."""

    numbers = 2

    def __init__(self, transform: Any) -> None:
        """Args: transform: MMCV's."""
        directions, chances = transform.direction, transform.prob
        directions = [directions] if isinstance(directions, str) else list(directions)
        if not isinstance(chances, list):
            chances = [chances / len(directions)] * len(directions)
        self.directions, self.limits = directions, np.cumsum(chances)

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Whether to flip horizontally, and vertically."""
        chosen = int(np.searchsorted(self.limits, rng.random(), side="right"))
        direction = self.directions[chosen] if chosen < len(self.directions) else None
        return np.array([direction in ("horizontal", "diagonal"), direction in ("vertical", "diagonal")], np.float32)

    def apply(self, canvas: Canvas, drawn: Any) -> None:
        """Flip."""
        from nvidia.dali import fn

        canvas.pixels = fn.flip(canvas.pixels, horizontal=_to_int(drawn[0]), vertical=_to_int(drawn[1]))

    def notes(self, drawn: NDArray[np.float32]) -> dict[str, Any]:
        """``flip`` and ``flip_direction``."""
        names = {(1, 0): "horizontal", (0, 1): "vertical", (1, 1): "diagonal"}
        direction = names.get((int(drawn[0]), int(drawn[1])))
        return {"flip": direction is not None, "flip_direction": direction}


class ColorJitter(Step):
    """Brightness, contrast and saturation as Pillow defines them.

    The three are linear maps that commute but for clipping and rounding, so they are applied as one, and the random
    order of MMPretrain is not drawn.
    """

    numbers = 3

    def __init__(self, transform: Any) -> None:
        """Args: transform: MMPretrain's.

        Raises:
            ValueError: with a change of hue, which DALI defines otherwise.
        """
        if transform.hue is not None:
            raise ValueError(f"ColorJitter(hue={transform.hue}) is not offered with DALI; leave hue out")
        self.ranges = [transform.brightness, transform.contrast, transform.saturation]

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The three factors."""
        return np.array([1.0 if r is None else rng.uniform(*r) for r in self.ranges], np.float32)

    def apply(self, canvas: Canvas, drawn: Any) -> None:
        """Blend with black, with the mean grey, and with the grey image."""
        from nvidia.dali import fn, types

        factors = drawn.gpu() if canvas.gpu else drawn
        brightness, contrast, saturation = factors[0], factors[1], factors[2]
        pixels = _to_float(canvas.pixels)
        grey = _to_float(fn.color_space_conversion(canvas.pixels, image_type=types.RGB, output_type=types.GRAY))
        shift = brightness * (1 - contrast) * fn.reductions.mean(grey, axes=[0, 1, 2])
        gain = brightness * contrast
        coloured, uncoloured = gain * pixels + shift, gain * grey + shift
        canvas.pixels = _to_pixels(saturation * coloured + (1 - saturation) * uncoloured)


class Lighting(Step):
    """AlexNet's noise along the principal components of colour: one offset per channel."""

    numbers = 3

    def __init__(self, transform: Any) -> None:
        """Args: transform: MMPretrain's.

        Raises:
            ValueError: with ``to_rgb``, which would hand on images in another channel order.
        """
        if transform.to_rgb:
            raise ValueError("Lighting(to_rgb=True) is not offered with DALI; order eigvec blue, green, red")
        self.components, self.deviation = transform.eigvec * transform.eigval, transform.alphastd

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Offsets of red, green and blue, in grey levels; MMPretrain's matrix has blue first."""
        alpha = rng.normal(0.0, self.deviation, self.components.shape[1])
        return (self.components @ alpha)[::-1].astype(np.float32)

    def apply(self, canvas: Canvas, drawn: Any) -> None:
        """Add the offsets."""
        offsets = drawn.gpu() if canvas.gpu else drawn
        canvas.pixels = _to_pixels(_to_float(canvas.pixels) + offsets)


class ResizeEdge(Step):
    """Scale one edge to a length, the other in proportion, rounded down."""

    def __init__(self, transform: Any) -> None:
        """Args: transform: MMPretrain's."""
        self.length, self.edge, self.scaling = transform.scale, transform.edge, _scaling(transform)

    def apply(self, canvas: Canvas, drawn: Any) -> None:
        """Scale."""
        from nvidia.dali import math

        height, width, length = canvas.height, canvas.width, self.length
        # Integers: a quotient of floats may come out just below a whole number.
        by_width, by_height = length * height // width, length * width // height
        if self.edge == "short":
            size = math.max(by_width, length), math.max(by_height, length)
        elif self.edge == "long":
            size = math.min(by_width, length), math.min(by_height, length)
        else:
            size = (by_width, by_width * 0 + length) if self.edge == "width" else (by_height * 0 + length, by_height)
        canvas.resize(*size, *self.scaling)


class CenterCrop(Step):
    """The central window, or all of an edge that is shorter."""

    def __init__(self, transform: Any) -> None:
        """Args: transform: MMCV's.

        Raises:
            ValueError: with ``auto_pad``.
        """
        if transform.auto_pad:
            raise ValueError("CenterCrop(auto_pad=True) is not offered with DALI; scale the images up before the crop")
        self.width, self.height = _pair(transform.crop_size)

    def apply(self, canvas: Canvas, drawn: Any) -> None:
        """Crop."""
        from nvidia.dali import math

        rest = [math.max(_to_int(canvas.height) - self.height, 0), math.max(_to_int(canvas.width) - self.width, 0)]
        height, width = math.min(canvas.height, self.height), math.min(canvas.width, self.width)
        # Half of the rest, rounded to the even number where it is between two, as Python's round() does.
        y, x = ((r + ((r // 2) & 1)) // 2 for r in rest)
        canvas.crop(y, x, height, width)


class Resize(Step):
    """Scale to a fixed size, whatever the aspect ratio."""

    def __init__(self, transform: Any) -> None:
        """Args: transform: MMCV's.

        Raises:
            ValueError: with ``keep_ratio`` or ``scale_factor``.
        """
        if transform.keep_ratio or transform.scale is None:
            raise ValueError("Resize is offered with DALI as Resize(scale=(width, height)); ResizeEdge keeps the ratio")
        self.width, self.height = _pair(transform.scale)
        self.scaling = _scaling(transform)

    def apply(self, canvas: Canvas, drawn: Any) -> None:
        """Scale."""
        canvas.resize(self.height, self.width, *self.scaling)


_KINDS = (RandomResizedCrop, RandomFlip, ColorJitter, Lighting, ResizeEdge, CenterCrop, Resize)
STEPS: dict[str, type[Step]] = {kind.__name__: kind for kind in _KINDS}


def translate(transforms: list[Any]) -> list[Step]:
    """The steps between loading and packing.

    Args:
        transforms: what MMPretrain built from ``pipeline``: LoadImageFromFile, then any of :data:`STEPS`, PackInputs.

    Raises:
        ValueError: naming the transform or option that DALI does not offer, and those it does.
    """
    kinds = [type(transform).__name__ for transform in transforms]
    if len(kinds) < 2 or kinds[0] != "LoadImageFromFile" or kinds[-1] != "PackInputs":
        raise ValueError(f"with DALI a pipeline starts with LoadImageFromFile and ends with PackInputs, not {kinds}")
    loading = transforms[0]
    if loading.color_type != "color" or loading.to_float32:
        raise ValueError("with DALI images are loaded in colour as uint8: LoadImageFromFile() without other options")
    unknown = [kind for kind in kinds[1:-1] if kind not in STEPS]
    if unknown:
        raise ValueError(
            f"the transform {unknown[0]} is not offered with DALI; there are {', '.join(STEPS)}. "
            "Mixup and CutMix go into train_cfg.augments of the model"
        )
    return [STEPS[kind](transform) for kind, transform in zip(kinds[1:-1], transforms[1:-1])]


def _scaling(transform: Any) -> tuple[str, bool]:
    """Interpolation, and whether to smooth when scaling down, which OpenCV does not.

    Bilinear is OpenCV's to the last grey level. The bicubic kernels differ a little (-0.5 here, -0.75 there), nearest
    pixels are other pixels.
    """
    if transform.interpolation not in ("bilinear", "bicubic"):
        raise ValueError(
            f"{type(transform).__name__}(interpolation={transform.interpolation!r}) is not offered with DALI; "
            "there are 'bilinear' and 'bicubic'"
        )
    return transform.interpolation, getattr(transform, "backend", "cv2") == "pillow"


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)


def _round(value: Any) -> Any:
    from nvidia.dali import math

    return math.floor(value + 0.5)


def _to_float(value: Any) -> Any:
    from nvidia.dali import fn, types

    return np.float32(value) if isinstance(value, int) else fn.cast(value, dtype=types.FLOAT)


def _to_int(value: Any) -> Any:
    from nvidia.dali import fn, types

    # Slice and flip take no other integers.
    return fn.cast(value, dtype=types.INT32)


def _to_pixels(value: Any) -> Any:
    from nvidia.dali import fn, types

    # The cast rounds and clips.
    return fn.cast(value, dtype=types.UINT8)


def random_numbers(steps: list[Step], seed: int, key: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Numbers of one sample for each random step.

    Args:
        steps: of the pipeline.
        seed: of the run.
        key: epoch, and the number of the draw among those of all processes.
    """
    rng = np.random.default_rng([number % 2**32 for number in (seed, 3, *key)])
    for step in steps:
        if step.numbers:
            yield step.draw(rng)
