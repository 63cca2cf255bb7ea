"""The DALI pipeline behind :class:`~prune_mm.datasets.dali.DALIDataLoader`: files and numbers in, pixels out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prune_mm.datasets.dali_steps import Canvas, Step


def import_dali() -> Any:
    """The module ``nvidia.dali``.

    Raises:
        ValueError: when it is not installed, with the command that installs it.
    """
    try:
        import nvidia.dali
    except ModuleNotFoundError as error:
        raise ValueError(
            "DALIDataLoader needs NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda130"
        ) from error
    return nvidia.dali


def choose_device(device: str) -> int | None:
    """GPU number for DALI, or None for a pipeline on the CPU.

    Args:
        device: ``auto`` (the GPU where there is one), ``cpu`` or ``gpu``.

    Raises:
        ValueError: another word, or ``gpu`` where there is none.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device is {device!r}; it must be 'auto', 'cpu' or 'gpu'")
    if device == "gpu" and not torch.cuda.is_available():
        raise ValueError("device='gpu', but there is no GPU here; use 'auto' or 'cpu'")
    return None if device == "cpu" or not torch.cuda.is_available() else torch.cuda.current_device()


#: A batch for the pipeline: a path or the contents of each file; for each random step numbers ``(batch, n)``.
Feed = tuple[list[NDArray[np.uint8]], list[NDArray[np.float32]]]


class ImagePipeline:
    """Decodes and transforms batches of any size up to ``batch_size``, ``depth`` of them at a time.

    Args:
        steps: transforms.
        from_bytes: batches are contents of files, not their paths.
        batch_size: largest batch.
        threads: of the CPU part.
        device_id: GPU, or None.
        depth: how many batches are prepared ahead.
    """

    def __init__(
        self, steps: Sequence[Step], from_bytes: bool, batch_size: int, threads: int, device_id: int | None, depth: int
    ) -> None:
        """See the class."""
        self.steps, self.from_bytes, self.device_id = list(steps), from_bytes, device_id
        self.feeds: Iterator[Feed] = iter(())
        dali = import_dali()
        # The seed is a formality: no operator of the graph draws anything.
        self.pipeline = dali.Pipeline(batch_size, threads, device_id, seed=0, prefetch_queue_depth=depth)
        with self.pipeline:
            self.pipeline.set_outputs(*self._graph())
        self.pipeline.build()

    def _graph(self) -> tuple[Any, ...]:
        """Pixels ``(height, width, 3)``, red first, and the size ``(height, width)`` of the file."""
        from nvidia.dali import fn, types

        kinds = [types.UINT8, *(types.FLOAT for step in self.steps if step.numbers)]
        files, *numbers = fn.external_source(source=self._next_feed, num_outputs=len(kinds), dtype=kinds, ndim=1)
        canvas = Canvas(files if self.from_bytes else fn.io.file.read(files), gpu=self.device_id is not None)
        for step in self.steps:
            step.apply(canvas, numbers.pop(0) if step.numbers else None)
        return canvas.pixels, canvas.original

    def _next_feed(self) -> list[Any]:
        files, numbers = next(self.feeds)
        return [files, *numbers]

    def start(self, feeds: Iterator[Feed]) -> None:
        """Begin a pass; the one before has come to its end."""
        self.feeds = feeds

    def take(self) -> tuple[Tensor | list[Tensor], NDArray[np.int64]]:
        """The next batch.

        Returns:
            Images ``(batch, 3, height, width)`` uint8, blue first, or a list of ``(3, height, width)`` when they
            differ in size; sizes of the files ``(batch, 2)``: height, width.

        Raises:
            StopIteration: the pass is over.
            RuntimeError: DALI's; the pipeline is of no further use.
        """
        stream = None if self.device_id is None else torch.cuda.current_stream(self.device_id)
        try:
            pixels, sizes = self.pipeline.run(stream)
        except StopIteration:
            self.pipeline.reset()
            raise
        if pixels.is_dense_tensor():
            images: Tensor | list[Tensor] = _channels_first(torch.from_dlpack(pixels.as_tensor()))
        else:
            images = [_channels_first(torch.from_dlpack(pixels[i])) for i in range(len(pixels))]
        return images, np.stack([np.asarray(sizes[i]) for i in range(len(sizes))])


def _channels_first(pixels: Tensor) -> Tensor:
    """``(..., height, width, 3)``, red first, to ``(..., 3, height, width)``, blue first."""
    return torch.stack([pixels[..., channel] for channel in (2, 1, 0)], dim=-3)


def undecodable(files: Sequence[NDArray[np.uint8]], from_bytes: bool) -> int | None:
    """Number of the first file that cannot be decoded; None when all can.

    Args:
        files: as in :data:`Feed`.
        from_bytes: as for :class:`ImagePipeline`.
    """
    checker = ImagePipeline([], from_bytes, 1, 1, None, 1)
    checker.start(iter([([file], []) for file in files]))
    for number, file in enumerate(files):
        if not from_bytes and not Path(os.fsdecode(bytes(file))).is_file():
            return number
        try:
            checker.take()
        except RuntimeError:
            return number
    return None
