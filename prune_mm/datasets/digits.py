"""Handwritten digits that come with scikit-learn: 1797 images of 8x8 pixels, enlarged to 32x32, in three splits.

Nothing is fetched: the images are a part of the scikit-learn package (the test images of the UCI set "Optical
Recognition of Handwritten Digits", Alpaydin and Kaynak, 1998). They are stored writer by writer, and each of the 14
writers wrote every digit about as often, so whole writers go to one split: classes stay balanced, and the networks are
judged by hands they have never seen. (Split image by image, even a small network is right in 99 % of all cases, and
differences between pruning methods drown.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from numpy.typing import NDArray
from PIL import Image

from prune_mm.datasets.distortion import distort
from prune_mm.registry import DATASETS

__all__ = ["SPLITS", "Digits", "split_indices"]

SIZE = 32
CLASSES = tuple(str(digit) for digit in range(10))
#: Index of the first image of each writer, and the end.
WRITERS = (0, 130, 256, 386, 516, 646, 776, 915, 1029, 1157, 1287, 1415, 1545, 1667, 1797)
#: First and last writer of a split: ``val`` is for choosing hyper-parameters, ``test`` for results only.
SPLITS = {"train": (0, 4), "val": (4, 7), "test": (7, 14)}


def split_indices(split: str) -> range:
    """Indices of the images of a split, in the order of ``sklearn.datasets.load_digits``.

    Raises:
        ValueError: for a split there is not.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    first, last = SPLITS[split]
    return range(WRITERS[first], WRITERS[last])


@lru_cache(maxsize=1)
def _images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All images (1797, 32, 32), bilinearly enlarged, and their labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "prune_mm.Digits needs scikit-learn, which holds the images: pip install -r requirements/evidence.txt"
        ) from error
    found = load_digits()
    grey = np.round(found.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for image in grey]
    return np.stack(large), found.target.astype(np.int64)


@DATASETS.register_module()
class Digits(BaseDataset):
    """Handwritten digits for MMPretrain's transforms and classifiers: RGB images (32, 32, 3), labels 0 to 9.

    Args:
        split: ``train`` (516 images of 4 writers), ``val`` (399 of 3) or ``test`` (882 of 7).
        pipeline: transforms; the image is in ``img`` already.
        distorted: turn, shear, shrink, dim, strike through and add noise (see
            :mod:`prune_mm.datasets.distortion`): anew whenever an image to train with is read, and always the same
            in the other splits.
        copies: every image so many times, each distorted in its own way.
        distortion_seed: of the images that are always the same.
        kwargs: arguments of MMEngine's ``BaseDataset``.

    Raises:
        ValueError: for a split there is not, without copies, or without scikit-learn.
    """

    METAINFO = {"classes": CLASSES}  # noqa: RUF012 (MMEngine's name and type)

    def __init__(
        self,
        split: str = "train",
        pipeline: Any = (),
        distorted: bool = False,
        copies: int = 1,
        distortion_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        self.split, self.distorted, self.copies, self.distortion_seed = split, distorted, copies, distortion_seed
        split_indices(split)
        if copies < 1:
            raise ValueError(f"copies={copies} must be at least 1")
        super().__init__(pipeline=list(pipeline), **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Images and labels of the split."""
        images, labels = _images()
        chosen = [index for _ in range(self.copies) for index in split_indices(self.split)]
        grey = [images[index] for index in chosen]
        if self.distorted and self.split != "train":
            seeds = ([self.distortion_seed, number] for number in range(len(grey)))
            grey = [distort(image, np.random.default_rng(seed)) for image, seed in zip(grey, seeds)]
        return [{"img": image, "gt_label": int(labels[index])} for image, index in zip(grey, chosen)]

    def prepare_data(self, idx: int) -> Any:
        """One sample behind the transforms, told its size as if it had been read from a file."""
        sample = self.get_data_info(idx)
        grey = sample["img"]
        if self.distorted and self.split == "train":
            # MMEngine seeds NumPy's own generator, in every worker.
            grey = distort(grey, np.random.default_rng(np.random.randint(2**31)))
        # The three channels are one and the same: networks read colour images.
        sample["img"] = np.repeat(grey[..., None], 3, axis=2)
        sample["img_shape"] = sample["ori_shape"] = sample["img"].shape[:2]
        return self.pipeline(sample)
