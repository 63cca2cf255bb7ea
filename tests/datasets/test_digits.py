"""The handwritten digits: three splits that share no writer, the same in every process."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

import prune_mm
from prune_mm.datasets import digits
from prune_mm.datasets.digits import SPLITS, WRITERS, Digits, split_indices
from prune_mm.datasets.distortion import distort
from prune_mm.registry import DATASETS

pytest.importorskip("sklearn")


def test_the_splits_are_disjoint_and_hold_everything():
    found = [index for split in SPLITS for index in split_indices(split)]
    assert sorted(found) == list(range(1797))
    assert {split: len(split_indices(split)) for split in SPLITS} == {"train": 516, "val": 399, "test": 882}


def test_no_writer_is_in_two_splits():
    edges = {split_indices(split).start for split in SPLITS} | {split_indices(split).stop for split in SPLITS}
    assert edges <= set(WRITERS)


def test_every_writer_begins_with_one_digit_after_the_other():
    from sklearn.datasets import load_digits

    labels = load_digits().target
    for begin in WRITERS[:-1]:
        assert labels[begin : begin + 10].tolist() == list(range(10))


@pytest.mark.parametrize("split", SPLITS)
def test_classes_are_balanced(split):
    counts = Counter(sample["gt_label"] for sample in Digits(split).load_data_list())
    assert len(counts) == 10
    assert max(counts.values()) <= 1.1 * min(counts.values())


def test_samples_are_the_enlarged_images():
    from sklearn.datasets import load_digits

    raw, data = load_digits(), Digits("val", serialize_data=False)
    first = split_indices("val").start
    for number in (0, 100, 268):
        sample = data[number]
        assert sample["img"].shape == (32, 32, 3)
        assert sample["img"].dtype == np.uint8
        assert sample["gt_label"] == raw.target[first + number]
        small = sample["img"][..., 0].reshape(8, 4, 8, 4).mean((1, 3)) * (16 / 255)
        assert np.corrcoef(small.ravel(), raw.images[first + number].ravel())[0, 1] > 0.95
        assert (sample["img"] == sample["img"][..., :1]).all()


def test_the_same_in_every_call():
    digits._images.cache_clear()
    first = digits._images()[0].copy()
    digits._images.cache_clear()
    assert np.array_equal(first, digits._images()[0])


def test_distorted_images_to_judge_by_are_always_the_same():
    plain, first, again = Digits("val"), *(Digits("val", distorted=True, copies=2) for _ in range(2))
    assert len(first) == 2 * len(plain) == 798
    for number in (0, 17, 398):
        shown = first[number]["img"]
        assert shown.shape == (32, 32, 3)
        assert shown.dtype == np.uint8
        assert np.array_equal(shown, again[number]["img"])
        assert not np.array_equal(shown, plain[number]["img"])
        copy = first[number + 399]
        assert copy["gt_label"] == first[number]["gt_label"] == plain[number]["gt_label"]
        assert not np.array_equal(shown, copy["img"])


def test_other_seeds_distort_otherwise():
    first, other = (Digits("val", distorted=True, distortion_seed=seed)[3]["img"] for seed in (0, 1))
    assert not np.array_equal(first, other)


def test_distorted_images_to_train_with_are_new_each_time_and_follow_the_seed():
    data = Digits("train", distorted=True)
    np.random.seed(5)
    first, second = data[0]["img"], data[0]["img"]
    np.random.seed(5)
    assert np.array_equal(first, data[0]["img"])
    assert not np.array_equal(first, second)


@given(st.integers(0, 2**31), st.integers(0, 1796))
@settings(max_examples=60, deadline=None)
def test_a_digit_stays_in_the_picture(seed, index):
    image = digits._images()[0][index]
    found = distort(image, np.random.default_rng(seed))
    assert (found.shape, found.dtype) == (image.shape, np.uint8)
    # Smallest size and contrast, less what is pushed over the edge; strokes and noise only add.
    assert float(found.sum()) > 0.6**2 * 0.4 * 0.5 * float(image.sum())


def test_no_copies_are_refused():
    with pytest.raises(ValueError, match="copies=0 must be at least 1"):
        Digits("val", copies=0)


def test_the_config_of_the_evidence_reads_batches():
    config = Config.fromfile("configs/evidence/digits_resnet20/dense.py")
    init_default_scope("mmpretrain")
    for split in ("train", "val", "test"):
        loader = config[f"{split}_dataloader"]
        assert loader.dataset.split == split
        batch = next(iter(Runner.build_dataloader(loader, seed=0)))
        assert batch["inputs"][0].shape == (3, 32, 32)
        assert int(batch["data_samples"][0].gt_label) in range(10)


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match="split='dev' must be one of train, val, test"):
        DATASETS.build({"type": "prune_mm.Digits", "split": "dev"})


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    digits._images.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"needs scikit-learn.*requirements/evidence\.txt"):
        Digits("train")
    assert prune_mm.__version__
