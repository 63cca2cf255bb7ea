"""When the workers of a training dataloader start."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.runner import loops
from torch.utils.data import DataLoader

Stock = loops._InfiniteDataloaderIterator


class LateIterator(Stock):
    """The batches of a training by iteration; workers start with the first one.

    MMEngine 0.10.7 starts them when it builds the loop, and they have read the first batches before a hook can touch
    dataset or sampler.
    """

    def __init__(self, dataloader: DataLoader) -> None:
        """Args: dataloader: which is not iterated yet."""
        self._dataloader, self._iterator, self._epoch = dataloader, None, 0

    def __next__(self) -> Sequence[dict]:
        """One batch."""
        if self._iterator is None:
            self._iterator = iter(self._dataloader)
        return super().__next__()


def start_workers_late() -> None:
    """Use :class:`LateIterator` where MMEngine has no such thing of its own; safe to call twice."""
    if not hasattr(loops._InfiniteDataloaderIterator, "skip_iter"):
        loops._InfiniteDataloaderIterator = LateIterator
