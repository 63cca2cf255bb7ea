"""ImageNet through NVIDIA DALI: a data loader in place of PyTorch's, with everything else as MMPretrain has it.

::

    train_dataloader = dict(type="prune_mm.DALIDataLoader")

in a config whose ``_base_`` reads ImageNet is enough. Dataset, labels, sampler and the list of transforms are the ones
of the config; DALI reads, decodes and transforms the images instead of PyTorch's worker processes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mmengine import dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from prune_mm.datasets.dali_pipeline import Feed, ImagePipeline, choose_device, import_dali, undecodable
from prune_mm.datasets.dali_steps import random_numbers, translate
from prune_mm.datasets.recordio import read_image_record
from prune_mm.registry import DATALOADERS


@DATALOADERS.register_module()
class DALIDataLoader(DataLoader):
    """Yields what MMPretrain's loader yields: ``dict(inputs=..., data_samples=[DataSample, ...])``.

    ``inputs`` is uint8 ``(batch, 3, height, width)``, blue first, as OpenCV loads it; the model's data preprocessor
    turns it to RGB, normalises it and mixes it up as always. Order, sharding over processes, padding of the last round,
    ``drop_last`` and evaluation are those of the sampler of the config. Random numbers of a sample depend on (seed,
    epoch, place in the global order) only: an epoch of a resumed run, or of a run with more processes, holds the same
    pixels.

    Args:
        loader: PyTorch's, built from the same config, with a dataset of MMPretrain or
            :class:`~prune_mm.datasets.recordio.RecordIODataset`. Its ``num_workers`` become threads of DALI.
        device: ``auto`` (the GPU of this process where there is one), ``cpu`` or ``gpu``.
        prefetch: how many batches are prepared ahead.
        seed: of the random transforms.

    Raises:
        ValueError: DALI is not installed, or cannot serve an option, a transform or the dataset.
    """

    def __init__(self, loader: DataLoader, device: str = "auto", prefetch: int = 2, seed: int | None = None) -> None:
        """See the class."""
        import_dali()
        if isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 1:
            raise ValueError(f"prefetch is {prefetch!r}; it must be a whole number from 1")
        self.threads, self.prefetch, self.seed = max(1, loader.num_workers), prefetch, seed or 0
        self.device_id = choose_device(device)
        if loader.batch_size is None:
            super().__init__(loader.dataset, batch_sampler=loader.batch_sampler)
        else:
            options = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
            super().__init__(loader.dataset, sampler=loader.sampler, **options)
        if not len(self.dataset):
            raise ValueError(f"{type(self.dataset).__name__} holds no images")
        self._transforms = _pipeline_of(self.dataset)
        self.steps = translate(_without_seeding(self._transforms))
        self.pack = self._transforms[-1]
        first = self.dataset.get_data_info(0)
        if not {"img_path", "record"} & set(first):
            raise ValueError(f"{type(self.dataset).__name__} names no image files; DALI needs folders or RecordIO")
        self.from_bytes = "record" in first
        self._idle: ImagePipeline | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """A pass over the data, in the order of the sampler."""
        return _Pass(self)

    @property
    def largest_batch(self) -> int:
        """Images in a full batch."""
        return int(self.batch_size or self.batch_sampler.batch_size)

    def random_seed(self) -> int:
        """The seed: that of the run, once the run knows it (a resumed one reads it from the checkpoint)."""
        first = self._transforms[0]
        return int(first.seed) if type(first).__name__ == "SeedSample" else self.seed

    def borrow_pipeline(self) -> ImagePipeline:
        """A pipeline with nothing in it; the one of the last pass, when that came to its end."""
        pipeline, self._idle = self._idle, None
        options = (self.largest_batch, self.threads, self.device_id, self.prefetch)
        return pipeline or ImagePipeline(self.steps, self.from_bytes, *options)

    def return_pipeline(self, pipeline: ImagePipeline) -> None:
        """Keep a pipeline for the next pass."""
        self._idle = pipeline


@dataclass
class _Batch:
    """A batch on its way: facts about the samples, random numbers, files or reads of files."""

    infos: list[dict[str, Any]]
    numbers: list[list[NDArray[np.float32]]]
    files: list[NDArray[np.uint8]] = field(default_factory=list)
    reads: list[Future] = field(default_factory=list)


class _Pass:
    """Iterator over one epoch."""

    def __init__(self, loader: DALIDataLoader) -> None:
        self.loader, self.dataset = loader, loader.dataset
        self.indices = iter(loader.batch_sampler)
        self.seed = loader.random_seed()
        sampler = getattr(loader.batch_sampler, "sampler", None)
        self.epoch, self.drawn = int(getattr(sampler, "epoch", 0) or 0), 0
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.pipeline: ImagePipeline | None = None
        self.running: deque[_Batch] = deque()

    def __iter__(self) -> _Pass:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.pipeline is None:
            self.pipeline = self.loader.borrow_pipeline()
            self.pipeline.start(self._feeds())
        try:
            images, sizes = self.pipeline.take()
        except StopIteration:
            self.loader.return_pipeline(self.pipeline)
            self.pipeline = None
            raise
        except RuntimeError as error:
            raise self._explained(error) from error
        return {"inputs": images, "data_samples": self._packed(self.running.popleft(), images, sizes)}

    def _next_index(self) -> list[int]:
        """Pass over a batch without reading it; MMEngine calls this to get to where a resumed run goes on."""
        indices = next(self.indices)
        self.drawn += len(indices)
        return indices

    def _feeds(self) -> Iterator[Feed]:
        """Batches for the pipeline, which asks for them ahead of time."""
        batches = map(self._batch, self.indices)
        for batch in self._with_contents(batches) if self.loader.from_bytes else batches:
            self.running.append(batch)
            yield batch.files, [np.stack(numbers) for numbers in zip(*batch.numbers)]

    def _with_contents(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """Read records in threads, some batches ahead of the pipeline."""
        with ThreadPoolExecutor(self.loader.threads, "records") as pool:
            reading: deque[_Batch] = deque()
            for batch in batches:
                batch.reads = [pool.submit(read_image_record, *info["record"]) for info in batch.infos]
                reading.append(batch)
                if len(reading) > self.loader.prefetch:
                    yield _received(reading.popleft())
            while reading:
                yield _received(reading.popleft())

    def _batch(self, indices: list[int]) -> _Batch:
        keys = [
            getattr(index, "key", (self.epoch, (self.drawn + number) * self.world + self.rank))
            for number, index in enumerate(indices)
        ]
        self.drawn += len(indices)
        infos = [{**self.dataset.get_data_info(int(index)), "sample_idx": int(index)} for index in indices]
        batch = _Batch(infos, [list(random_numbers(self.loader.steps, self.seed, key)) for key in keys])
        if not self.loader.from_bytes:
            batch.files = [np.frombuffer(os.fsencode(info["img_path"]), np.uint8) for info in infos]
        return batch

    def _packed(self, batch: _Batch, images: Any, sizes: NDArray[np.int64]) -> list[Any]:
        """Labels and facts about the images, by the transform that ends the pipeline of the config."""
        random_steps = [step for step in self.loader.steps if step.numbers]
        samples = []
        for info, numbers, image, size in zip(batch.infos, batch.numbers, images, sizes):
            facts = {"ori_shape": tuple(size.tolist()), "img_shape": tuple(image.shape[-2:])}
            for step, drawn in zip(random_steps, numbers):
                facts |= step.notes(drawn)
            samples.append(self.loader.pack({**info, **facts})["data_samples"])
        return samples

    def _explained(self, error: RuntimeError) -> Exception:
        """An error that names the file; DALI names none."""
        for batch in self.running:
            number = undecodable(batch.files, self.loader.from_bytes)
            if number is not None:
                name = batch.infos[number]["img_path"]
                return ValueError(f"'{name}' cannot be decoded: it is missing, damaged or not an image")
        return error


def _received(batch: _Batch) -> _Batch:
    for info, read in zip(batch.infos, batch.reads):
        info["gt_label"], content = read.result()
        batch.files.append(content)
    return batch


def _pipeline_of(dataset: Any) -> list[Any]:
    """Transforms of the dataset, which may be wrapped: the very list, since seeding adds to it later.

    Raises:
        ValueError: when there is none, or the parts of a joined dataset differ.
    """
    if not hasattr(dataset, "get_data_info"):
        raise ValueError(f"{type(dataset).__name__} does not tell the files of its samples (get_data_info)")
    inner = getattr(dataset, "dataset", None)
    if inner is not None:
        return _pipeline_of(inner)
    if getattr(dataset, "datasets", None):
        raise ValueError("several joined datasets are not offered with DALI; use PyTorch's loader for them")
    transforms = getattr(getattr(dataset, "pipeline", None), "transforms", None)
    if not transforms:
        raise ValueError(f"{type(dataset).__name__} has no pipeline of transforms")
    return transforms


def _without_seeding(transforms: list[Any]) -> list[Any]:
    return [transform for transform in transforms if type(transform).__name__ != "SeedSample"]


__all__ = ["DALIDataLoader"]
