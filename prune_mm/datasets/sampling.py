"""PartSampler: epochs that are parts of a data set, for sets whose whole pass is too long a unit of time."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from numpy.typing import NDArray
from torch.utils.data import Sampler

from prune_mm.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class PartSampler(Sampler[int]):
    """Lets an epoch be the next ``size`` samples of the data set, in random order, pass after pass.

    Schedules, updates of an allocation and checkpoints count in epochs; of a large data set they may need to come more
    often than once a pass. No sample comes twice before all came once, whatever the epochs::

        train_dataloader = dict(sampler=dict(_delete_=True, type='prune_mm.PartSampler', size=10_000))

    The order is a function of the seed alone: with 1 or N processes an epoch has the same samples, and a resumed
    training goes on with those that are left.

    Args:
        dataset: with a length.
        size: samples of an epoch, of all processes together. When they do not divide by the number of processes, the
            first ones of the epoch come again, as with ``DefaultSampler``.
        start: samples that an earlier training with the same seed has seen already; this one goes on behind them.
        seed: of the order; None: one that the processes agree on.

    Raises:
        ValueError: the data set is empty, ``size`` is not positive, or ``start`` is negative.
    """

    def __init__(self, dataset: Sized, size: int, start: int = 0, seed: int | None = None) -> None:
        """See the class."""
        if len(dataset) < 1:
            raise ValueError("PartSampler needs a data set with samples, this one is empty")
        if size < 1:
            raise ValueError(f"PartSampler: size={size} must be at least 1, the samples of an epoch")
        if start < 0:
            raise ValueError(f"PartSampler: start={start} must not be negative")
        self.dataset, self.size, self.start = dataset, size, start
        self.rank, self.world_size = get_dist_info()
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        """Indices of this process in this epoch."""
        begin = self.start + self.epoch * self.size
        for number in range(self.rank, len(self) * self.world_size, self.world_size):
            yield self._at(begin + number % self.size)

    def __len__(self) -> int:
        """Samples of this process in an epoch."""
        return -(-self.size // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch."""
        self.epoch = epoch

    def _at(self, place: int) -> int:
        """Index of the sample at a place in the endless sequence of passes."""
        number, place = divmod(place, len(self.dataset))
        return int(self._order(number)[place])

    def _order(self, number: int) -> NDArray[np.int64]:
        """Order of a pass; the last one is kept."""
        key = (self.seed, number)
        if getattr(self, "_known", (None,))[0] != key:
            self._known = (key, np.random.default_rng(key).permutation(len(self.dataset)))
        return self._known[1]
