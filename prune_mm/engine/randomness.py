"""Randomness that depends on (seed, draw) only, so that a resumed run sees what an uninterrupted one sees.

MMEngine seeds once per process: after ``--resume`` the random augmentations of the remaining epochs differ, and with
them the masks. Here every sample is augmented with a seed made of its place in the sampler's sequence, and every
iteration starts from a seed made of its number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine import dist

from prune_mm.registry import TRANSFORMS


class Draw(int):
    """A sample index that remembers which draw of the sampler it is; survives the arithmetic of dataset wrappers."""

    key: tuple[int, ...]

    def __new__(cls, index: int, key: tuple[int, ...]) -> Draw:
        """Index ``index``, drawn as ``key``."""
        draw = super().__new__(cls, index)
        draw.key = key
        return draw

    def __mod__(self, other: int) -> Draw:
        """For dataset wrappers that repeat."""
        return Draw(int(self) % other, self.key)

    def __sub__(self, other: int) -> Draw:
        """For dataset wrappers that concatenate."""
        return Draw(int(self) - other, self.key)

    def __reduce__(self) -> tuple:
        """Travel to worker processes."""
        return (Draw, (int(self), self.key))


class DrawSampler:
    """Yields what another sampler yields, as :class:`Draw`."""

    def __init__(self, sampler: Any) -> None:
        """Wrap ``sampler``."""
        self.sampler, self.start = sampler, 0
        if hasattr(sampler, "skip"):
            # MMEngine's loops call the inner sampler to pass over what was drawn before a resumed run. Samplers that
            # cannot must not seem to: then batch by batch is passed over.
            self._skip = sampler.skip
            self.skip = sampler.skip = self._pass_over

    def __iter__(self) -> Iterator[Draw]:
        """Number the draws of all ranks together, so that 1 and N processes augment alike."""
        epoch = int(getattr(self.sampler, "epoch", 0) or 0)
        rank, world = dist.get_rank(), dist.get_world_size()
        for number, index in enumerate(self.sampler, self.start):
            yield Draw(index, (epoch, number * world + rank))

    def _pass_over(self, draws: int) -> None:
        """Go on behind the first ``draws`` of this rank."""
        self.start = draws
        self._skip(draws)

    def __len__(self) -> int:
        """Length of the sampler."""
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the sampler's."""
        if name == "sampler":
            raise AttributeError(name)
        return getattr(self.sampler, name)


@TRANSFORMS.register_module()
class SeedSample:
    """First transform of a pipeline: seed Python, NumPy and torch for this draw."""

    def __init__(self, seed: int) -> None:
        """Args: seed: of the run."""
        self.seed = seed

    def __call__(self, results: dict) -> dict:
        """Seed, and hand the sample on with a plain index."""
        draw = results.get("sample_idx")
        if isinstance(draw, Draw):
            results["sample_idx"] = int(draw)
            seed_everything(self.seed, 1, *draw.key)
        return results


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a tuple of numbers."""
    words = np.random.SeedSequence([number % 2**32 for number in key]).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[0]))


def make_reproducible(dataloader: Any, seed: int, reseed: bool = False) -> None:
    """Make the augmentations of a training dataloader a function of (seed, epoch, draw). Safe to call twice.

    Args:
        dataloader: not yet iterated.
        seed: of the run.
        reseed: also give this seed to the sampler, which was built before a resumed run knew its seed.
    """
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", None)
    if reseed and hasattr(sampler, "seed"):
        sampler.seed = seed
    if sampler is not None and not isinstance(sampler, DrawSampler):
        batch_sampler.sampler = DrawSampler(sampler)
    for dataset in _datasets(getattr(dataloader, "dataset", None)):
        transforms = getattr(getattr(dataset, "pipeline", None), "transforms", None)
        if isinstance(transforms, list) and not (transforms and isinstance(transforms[0], SeedSample)):
            transforms.insert(0, SeedSample(seed))


def _datasets(dataset: Any) -> Iterator[Any]:
    """The dataset, and those inside its wrappers."""
    if dataset is None:
        return
    yield dataset
    yield from _datasets(getattr(dataset, "dataset", None))
    for inner in getattr(dataset, "datasets", None) or ():
        yield from _datasets(inner)
