"""DALI gives what MMPretrain's own loader gives: images, labels and order, in 1 and N processes, after a resume."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS, init_default_scope
from mmengine.runner import Runner
from photos import TRAIN, VAL, make_photos

from prune_mm.datasets import dali
from prune_mm.datasets.dali_steps import STEPS, random_numbers
from prune_mm.engine.launch import check_data
from prune_mm.engine.randomness import make_reproducible

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali-cuda130, see requirements/tests.txt")

SMALL = [VAL[0], {"type": "Resize", "scale": (32, 32)}, VAL[-1]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    init_default_scope("mmpretrain")
    return make_photos(tmp_path_factory.mktemp("photos") / "imagenet")


def config_of(photos, split="val", pipeline=VAL, shuffle=False, batch_size=4, **options):
    dataset = {"type": "CustomDataset", "data_root": str(photos), "data_prefix": split, "pipeline": pipeline}
    dataset["serialize_data"] = False  # or every dataset collects garbage, which takes long in a test process
    sampler = {"type": "DefaultSampler", "shuffle": shuffle, **options.pop("sampler", {})}
    dataset.update(options.pop("dataset", {}))
    return {"batch_size": batch_size, "num_workers": 0, "dataset": dataset, "sampler": sampler, **options}


def dali_loader(photos, *args, seed=1, **options):
    config = {"type": "prune_mm.DALIDataLoader", "device": "cpu", **config_of(photos, *args, **options)}
    return Runner.build_dataloader(config, seed=seed)


def train_loader(photos, epoch=0, **options):
    loader = dali_loader(photos, "train", TRAIN, True, **options)
    loader.sampler.set_epoch(epoch)
    return loader


def indices(loader):
    return [[sample.sample_idx for sample in batch["data_samples"]] for batch in loader]


def pixels(loader):
    """Image by its place in the data set."""
    return {s.sample_idx: i.clone() for batch in loader for i, s in zip(batch["inputs"], batch["data_samples"])}


def as_rank(monkeypatch, rank, world):
    monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", lambda: (rank, world))
    monkeypatch.setattr("mmengine.dist.get_rank", lambda: rank)
    monkeypatch.setattr("mmengine.dist.get_world_size", lambda: world)


# -- the validation split ---------------------------------------------------------------------------------------------


def assert_same_data(stock, ours):
    assert len(ours) == len(stock)
    assert len(ours.dataset) == len(stock.dataset)
    for expected, batch in itertools.zip_longest(stock, ours):
        images = torch.stack(expected["inputs"])
        assert batch["inputs"].dtype == torch.uint8
        assert batch["inputs"].shape == images.shape
        difference = (images.int() - batch["inputs"].int()).abs()
        # Files decode to the same bytes; the bilinear kernels round differently, by one grey level in an eighth of all.
        assert difference.max() <= 1
        assert difference.float().mean() < 0.2
        for theirs, sample in zip(expected["data_samples"], batch["data_samples"]):
            assert sample.gt_label == theirs.gt_label
            assert (sample.img_path, sample.sample_idx) == (theirs.img_path, theirs.sample_idx)
            assert (tuple(sample.ori_shape), tuple(sample.img_shape)) == (theirs.ori_shape, theirs.img_shape)


@pytest.mark.parametrize("source", ["folder", "annotations", "imagenet"])
def test_the_validation_split_is_that_of_pytorch(photos, source):
    options = {"folder": {}, "annotations": {"ann_file": "meta/val.txt"}}.get(source)
    if source == "imagenet":
        options = {"type": "ImageNet", "split": "val", "data_prefix": ""}
    stock = Runner.build_dataloader(config_of(photos, dataset=options), seed=1)
    assert_same_data(stock, dali_loader(photos, dataset=options))


@pytest.mark.parametrize(
    "transforms",
    [
        [{"type": "ResizeEdge", "scale": 96, "edge": "long"}, {"type": "CenterCrop", "crop_size": (40, 21)}],
        [{"type": "CenterCrop", "crop_size": 61}, {"type": "Resize", "scale": (50, 70)}],
        [{"type": "Resize", "scale": (70, 50), "interpolation": "bicubic"}],
        [{"type": "ResizeEdge", "scale": 80, "edge": "width"}, {"type": "CenterCrop", "crop_size": 49}],
        [{"type": "RandomFlip", "prob": 1.0, "direction": "vertical"}, {"type": "Resize", "scale": (32, 32)}],
        [],
    ],
    ids=lambda transforms: "-".join(t["type"] for t in transforms) or "none",
)
def test_other_transforms_agree_too(photos, transforms):
    pipeline = [VAL[0], *transforms, VAL[-1]]
    stock = Runner.build_dataloader(config_of(photos, pipeline=pipeline, batch_size=5), seed=1)
    for expected, batch in zip(stock, dali_loader(photos, pipeline=pipeline, batch_size=5), strict=True):
        for theirs, ours in zip(expected["inputs"], batch["inputs"], strict=True):
            assert theirs.shape == ours.shape
            # The bicubic kernels of OpenCV and DALI differ.
            assert (theirs.int() - ours.int()).abs().float().mean() < (6 if "bicubic" in str(transforms) else 0.3)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_validation_split_like_pytorch(photos, world, monkeypatch):
    parts, labels = [], []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        loader = dali_loader(photos, pipeline=SMALL)
        parts.append([i for batch in indices(loader) for i in batch])
        stock = Runner.build_dataloader(config_of(photos, pipeline=SMALL), seed=1)
        assert parts[-1] == [s.sample_idx for batch in stock for s in batch["data_samples"]]
        labels.append(len(loader.dataset))
    # What MMEngine's collect_results does: interleave, then cut off the padding.
    together = [i for row in itertools.zip_longest(*parts) for i in row if i is not None][: labels[0]]
    assert together == list(range(25))


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_sees_the_same_epochs(photos):
    loader = train_loader(photos)
    epochs = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        epochs.append([(batch["inputs"].clone(), indices([batch])) for batch in loader])
    assert epochs[0][0][1] != epochs[1][0][1]
    for (images, order), batch in zip(epochs[2], train_loader(photos, 2), strict=True):
        assert indices([batch]) == order
        assert torch.equal(images, batch["inputs"])


def test_the_same_image_looks_different_in_another_epoch_and_with_another_seed(photos):
    first, second, other = (pixels(train_loader(photos, epoch, seed=seed)) for epoch, seed in ((0, 1), (1, 1), (0, 2)))
    assert first.keys() == second.keys() == set(range(21))
    assert not any(torch.equal(first[i], second[i]) or torch.equal(first[i], other[i]) for i in first)


@pytest.mark.parametrize("world", [2, 3])
def test_n_processes_see_the_pixels_of_one(photos, world, monkeypatch):
    whole, parts = pixels(train_loader(photos)), {}
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        loader = train_loader(photos, batch_size=3)
        assert len(list(loader)) == len(loader)
        parts |= {key: image for key, image in pixels(loader).items() if key not in parts}
    assert parts.keys() == whole.keys()
    # 21 images over 2 ranks: the last place is padded with the first image once more, drawn anew.
    same = sum(torch.equal(parts[key], whole[key]) for key in whole)
    assert same >= 21 - (-21 % world)


def test_the_last_batch_is_kept_or_dropped(photos):
    assert [len(batch) for batch in indices(dali_loader(photos, batch_size=8))] == [8, 8, 8, 1]
    assert [len(batch) for batch in indices(dali_loader(photos, batch_size=8, drop_last=True))] == [8, 8, 8]


def test_without_padding_ranks_differ_in_length(photos, monkeypatch):
    lengths = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        lengths.append(sum(map(len, indices(dali_loader(photos, sampler={"round_up": False})))))
    assert lengths == [13, 12]


def test_a_pass_that_is_left_early_spoils_nothing(photos):
    loader = train_loader(photos)
    whole = pixels(loader)
    next(iter(loader))
    again = pixels(loader)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_batches_stay_as_they_are_while_others_are_made(photos):
    batches, copies = [], []
    for batch in train_loader(photos, prefetch=1):
        batches.append(batch["inputs"])
        copies.append(batch["inputs"].clone())
    assert all(torch.equal(a, b) for a, b in zip(batches, copies))


def test_the_hook_of_the_pruner_gives_its_seed(photos):
    first, second = train_loader(photos, seed=7), train_loader(photos, seed=3)
    make_reproducible(second, 7, reseed=True)
    first, second = pixels(first), pixels(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_infinite_sampler_goes_on_behind_what_was_drawn(photos):
    def batches(skip):
        loader = train_loader(photos, sampler={"type": "InfiniteSampler"})
        make_reproducible(loader, 1)
        if skip:
            loader.sampler.skip(skip * 4)
        return [(indices([b]), b["inputs"].clone()) for b in itertools.islice(loader, 8 - skip)]

    for (order, images), (again, repeated) in zip(batches(0)[6:], batches(6), strict=True):
        assert order == again
        assert torch.equal(images, repeated)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_nearly_the_same(photos):
    jitter = {"type": "ColorJitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    vectors = [[0.6, 0.7, 0.4], [0.6, 0, -0.8], [0.6, -0.7, 0.4]]
    lighting = {"type": "Lighting", "eigval": [55.0, 4.8, 1.1], "eigvec": vectors}
    for split, pipeline in (("val", VAL), ("train", [*TRAIN[:-1], jitter, lighting, TRAIN[-1]])):
        loaders = [dali_loader(photos, split, pipeline, device=device) for device in ("cpu", "gpu")]
        for expected, batch in zip(*loaders, strict=True):
            assert batch["inputs"].is_cuda
            assert (batch["inputs"].cpu().float() - expected["inputs"].float()).abs().mean() < 2


# -- augmentations ----------------------------------------------------------------------------------------------------


def reference_crop(numbers, attempts, size):
    """MMPretrain's rand_crop_params with given random numbers."""
    width, height = size
    side = np.sqrt(width * height)
    for i in range(attempts):
        w, h = int(np.floor(numbers[i] * side + 0.5)), int(np.floor(numbers[attempts + i] * side + 0.5))
        if 0 < w <= width and 0 < h <= height:
            y, x = (int(numbers[2 * attempts + k] * (r + 1)) for k, r in enumerate((height - h, width - w)))
            return y, x, h, w
    ratio = width / height
    w = min(width, round(height * 4 / 3)) if ratio > 4 / 3 else width
    h = min(height, round(width * 4 / 3)) if ratio < 3 / 4 else height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.1, 1.0), (0.98, 1.0)])
def test_crops_are_the_windows_of_mmpretrain(photos, area):
    # (.98, 1) seldom fits into images this long: then the central window counts.
    crop = {"type": "RandomResizedCrop", "scale": 40, "crop_ratio_range": area}
    loader = dali_loader(photos, "train", [VAL[0], crop, VAL[-1]])
    stock = Runner.build_dataloader(config_of(photos, "train", [VAL[0], VAL[-1]], batch_size=1), seed=1)
    ours, fallbacks = pixels(loader), 0
    for number, batch in enumerate(stock):
        image = batch["inputs"][0].float()
        (numbers,) = random_numbers(loader.steps, 1, (0, number))
        y, x, h, w = reference_crop(numbers, 10, (image.shape[2], image.shape[1]))
        fallbacks += (h, w) == reference_crop(np.zeros(22), 10, (image.shape[2], image.shape[1]))[2:]
        window = torch.nn.functional.interpolate(image[None, :, y : y + h, x : x + w], (40, 40), mode="bilinear")[0]
        assert (window - ours[number].float()).abs().max() <= 0.6
    assert fallbacks > 5 or area[0] < 0.9


def test_crops_have_the_distribution_of_mmpretrain():
    stock = TRANSFORMS.build({"type": "mmpretrain.RandomResizedCrop", "scale": 8, "crop_ratio_range": (0.1, 1.0)})
    step, rng = STEPS["RandomResizedCrop"](stock), np.random.default_rng(0)
    image = np.zeros((375, 500, 3), np.uint8)
    theirs = np.array([stock.rand_crop_params(image) for _ in range(2000)])
    ours = np.array([reference_crop(step.draw(rng), 10, (500, 375)) for _ in range(2000)])
    for column in range(4):
        assert abs(theirs[:, column].mean() - ours[:, column].mean()) < 12
        assert abs(theirs[:, column].std() - ours[:, column].std()) < 10


def test_flips_are_noted(photos):
    plain = pixels(dali_loader(photos, "train", SMALL))
    flip = {"type": "RandomFlip", "prob": [0.3, 0.3, 0.3], "direction": ["horizontal", "vertical", "diagonal"]}
    axes = {None: [], "horizontal": [2], "vertical": [1], "diagonal": [1, 2]}
    seen = set()
    for batch in dali_loader(photos, "train", [VAL[0], {"type": "Resize", "scale": (32, 32)}, flip, VAL[-1]]):
        for image, sample in zip(batch["inputs"], batch["data_samples"]):
            seen.add(sample.flip_direction)
            assert sample.flip == (sample.flip_direction is not None)
            assert torch.equal(image, plain[sample.sample_idx].flip(axes[sample.flip_direction]))
    assert seen >= {"horizontal", "vertical", "diagonal"}


@pytest.mark.parametrize(
    "options", [{"brightness": 0.5}, {"contrast": 0.5}, {"saturation": 0.5}, {"brightness": 0.2, "contrast": 0.3}]
)
def test_colours_change_as_pillow_changes_them(photos, options):
    jitter = {"type": "ColorJitter", **options}
    loader = dali_loader(photos, "train", [VAL[0], {"type": "Resize", "scale": (32, 32)}, jitter, VAL[-1]])
    plain = pixels(dali_loader(photos, "train", SMALL))
    stock = TRANSFORMS.build({"type": "mmpretrain.ColorJitter", **options})
    for key, image in pixels(loader).items():
        (factors,) = random_numbers(loader.steps, 1, (0, key))
        stock._rand_params = lambda factors=factors: ([0, 1, 2, 3], *(float(f) for f in factors), None)
        expected = stock.transform({"img": plain[key].permute(1, 2, 0).numpy().copy()})["img"]
        difference = np.abs(expected.astype(int) - image.permute(1, 2, 0).numpy())
        # Pillow cuts off what DALI rounds, and clips to 0..255 after each of the three where DALI does so at the end.
        assert np.median(difference) <= 2
        assert difference.max() <= 2 or len(options) > 1


def test_lighting_adds_one_offset_per_channel(photos):
    lighting = {"type": "Lighting", "eigval": [55.46, 4.79, 1.15], "alphastd": 0.1,
                "eigvec": [[-0.57, 0.72, 0.40], [-0.58, -0.004, -0.81], [-0.58, -0.69, 0.42]]}  # fmt: skip
    loader = dali_loader(photos, "train", [VAL[0], {"type": "Resize", "scale": (32, 32)}, lighting, VAL[-1]])
    plain = pixels(dali_loader(photos, "train", SMALL))
    for key, image in pixels(loader).items():
        (offsets,) = random_numbers(loader.steps, 1, (0, key))
        expected = (plain[key].float() + torch.from_numpy(offsets).flip(0)[:, None, None]).clamp(0, 255)
        assert (expected - image.float()).abs().max() <= 0.51


class InMemory:
    """As MMPretrain's CIFAR."""

    pipeline = Compose([TRANSFORMS.build({"type": f"mmpretrain.{t['type']}"}) for t in (VAL[0], VAL[-1])])

    def __len__(self):
        return 1

    def get_data_info(self, index):
        return {"img": np.zeros((32, 32, 3), np.uint8), "gt_label": 0}


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            {"type": "RandomCrop", "crop_size": 20},
            "the transform RandomCrop is not offered with DALI; there",
        ),
        ({"type": "ColorJitter", "hue": 0.1}, r"ColorJitter\(hue=\(-0.1, 0.1\)\) is not offered with DALI"),
        (
            {"type": "ResizeEdge", "scale": 9, "interpolation": "area"},
            "interpolation='area'.* is not offered",
        ),
        ({"type": "CenterCrop", "crop_size": 9, "auto_pad": True}, "auto_pad=True"),
        ({"type": "Resize", "scale": (9, 9), "keep_ratio": True}, "ResizeEdge keeps the ratio"),
    ],
)
def test_transforms_that_dali_lacks_are_refused(photos, transform, message):
    with pytest.raises(ValueError, match=message):
        dali_loader(photos, pipeline=[VAL[0], transform, VAL[-1]])


def test_other_bad_options_are_refused(photos):
    with pytest.raises(ValueError, match=r"starts with LoadImageFromFile and ends with .*, not \['PackInputs'\]"):
        dali_loader(photos, pipeline=VAL[-1:])
    loader = torch.utils.data.DataLoader(InMemory())
    with pytest.raises(ValueError, match="InMemory names no image files; DALI needs folders or RecordIO"):
        dali.DALIDataLoader(loader)
    with pytest.raises(ValueError, match="device is 'cuda'; it must be 'auto', 'cpu' or 'gpu'"):
        dali_loader(photos, device="cuda")
    with pytest.raises(ValueError, match="prefetch is 0; it must be a whole number from 1"):
        dali_loader(photos, prefetch=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no GPU here"):
            dali_loader(photos, device="gpu")
    with pytest.raises(ValueError, match=r"prune_mm.DALIDataLoader cannot read its data: .*workers"):
        dali_loader(photos, workers=3)


def test_without_dali_the_error_says_what_to_install(photos, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match="pip install nvidia-dali-cuda130"):
        dali_loader(photos)


def test_missing_and_empty_folders_are_named(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"val_dataloader: '{tmp_path}/nowhere' is missing"):
        check_data({"val_dataloader": config_of(tmp_path, "nowhere")}, "val_dataloader")
    with pytest.raises(ValueError, match=r"cannot read its data: .*nowhere"):
        dali_loader(tmp_path, "nowhere")
    (tmp_path / "val" / "n0").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"cannot read its data: .*Found 0 files in subfolders of.*{tmp_path}/val"):
        dali_loader(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing"])
def test_an_unreadable_image_is_named(photos, tmp_path, damage):
    folder = make_photos(tmp_path / "photos", 2, 2) / "train" / "n0000"
    whole = (folder / "1.JPEG").read_bytes()
    loader = dali_loader(tmp_path / "photos", "train", batch_size=2)
    contents = {"truncated": whole[: len(whole) // 2], "text": b"no image at all", "empty": b""}
    if damage == "missing":
        (folder / "1.JPEG").unlink()
    else:
        (folder / "1.JPEG").write_bytes(contents[damage])
    with pytest.raises(ValueError, match=rf"'{folder}/1\.JPEG' cannot be decoded: it is missing, damaged or"):
        list(loader)


def test_other_loaders_are_left_to_mmengine(photos):
    stock = Runner.build_dataloader(config_of(photos), seed=1)
    assert type(stock) is torch.utils.data.DataLoader
    assert not isinstance(stock, dali.DALIDataLoader)
    assert Runner.build_dataloader(stock) is stock
    ours = dali_loader(photos)
    assert Runner.build_dataloader(ours) is ours
