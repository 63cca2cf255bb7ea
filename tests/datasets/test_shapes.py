"""The generated demo data: what is annotated is what was drawn, and folders are all or nothing."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prune_mm import compat
from prune_mm.datasets import hardness, shapes
from prune_mm.datasets.drawing import Shape
from prune_mm.datasets.shapes import COCO_CLASSES, FOLDER_CLASSES, make_shapes_coco, make_shapes_imagefolder

COUNTS = {"train2017": 40, "val2017": 6}
SIZE = 128


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    return make_shapes_coco(root, train=COUNTS["train2017"], val=COUNTS["val2017"])


@pytest.fixture(scope="module")
def folder_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes_imagefolder(tmp_path_factory.mktemp("data") / "cls", train_per_class=3, val_per_class=2)


@pytest.fixture(scope="module", params=list(COUNTS))
def split(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def coco(coco_root: Path, split: str):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO

    return COCO(str(coco_root / "annotations" / f"instances_{split}.json"))


def test_coco_api_loads_every_split(coco, split):
    assert len(coco.imgs) == COUNTS[split]
    assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == list(enumerate(COCO_CLASSES, 1))
    assert all(1 <= len(coco.imgToAnns[image]) <= 4 for image in coco.imgs)


def test_image_files_have_the_annotated_size(coco, coco_root, split):
    for info in coco.imgs.values():
        with Image.open(coco_root / split / info["file_name"]) as picture:
            assert picture.mode == "RGB"
            assert picture.size == (info["width"], info["height"]) == (SIZE, SIZE)
    assert len(list((coco_root / split).iterdir())) == len(coco.imgs)


def test_boxes_and_areas_are_those_of_the_masks(coco):
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        bounds = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        assert annotation["bbox"] == bounds
        assert annotation["area"] == mask.sum() >= hardness.MIN_VISIBLE_AREA
        assert annotation["iscrowd"] == 0


def test_masks_of_an_image_do_not_overlap(coco):
    for objects in coco.imgToAnns.values():
        assert sum(coco.annToMask(annotation).astype(int) for annotation in objects).max() == 1


def test_some_objects_are_occluded_but_none_by_more_than_the_limit():
    hidden = 0
    for seed in range(60):
        for shape, visible in shapes._layout(np.random.default_rng(seed), SIZE, 4):
            share = visible.sum() / (shape.distance(SIZE) <= 0).sum()
            assert share >= hardness.DEMO.min_share
            hidden += share < 1
    assert hidden > 5


@pytest.mark.parametrize("size", [shapes.MIN_SIZE, 64])
def test_small_images_keep_the_least_visible_area(size):
    for seed in range(100):
        objects = shapes._layout(np.random.default_rng(seed), size, 4)
        assert objects
        assert all(visible.sum() >= hardness.MIN_VISIBLE_AREA for _, visible in objects)


@pytest.mark.parametrize("name", FOLDER_CLASSES)
def test_outlines_fit_the_unit_circle_and_fill_their_area(name):
    shape = Shape(name, 50.0, 50.0, 40.0, 0.3)
    mask = shape.distance(100) <= 0
    rows, columns = np.nonzero(mask)
    assert np.hypot(columns + 0.5 - 50, rows + 0.5 - 50).max() <= 40
    notch, tip = 0.45, 1.0
    area = {
        "circle": np.pi * 0.9**2,
        "cross": 4 * 0.3 * (2 * 0.95 - 0.3),
        "ring": np.pi * (0.9**2 - 0.5**2),
        "square": 2.0,
        "star": 5 * notch * tip * np.sin(np.pi / 5),
        "triangle": 3 * np.sqrt(3) / 4,
    }[name]
    assert mask.sum() / 40**2 == pytest.approx(area, rel=0.01)


def test_shapes_stand_out_from_their_ground(coco, coco_root, split):
    contrasts = []
    for image, objects in coco.imgToAnns.items():
        picture = np.asarray(Image.open(coco_root / split / coco.imgs[image]["file_name"]), np.float32)
        ground = sum(coco.annToMask(annotation) for annotation in objects) == 0
        for annotation in objects:
            inside = picture[coco.annToMask(annotation) == 1].mean(0)
            contrasts.append(np.linalg.norm(inside - picture[ground].mean(0)))
    assert np.quantile(contrasts, 0.1) > 40


def test_classes_are_balanced():
    found = Counter(
        shape.name for seed in range(150) for shape, _ in shapes._layout(np.random.default_rng(seed), SIZE, 4)
    )
    assert set(found) == set(COCO_CLASSES)
    assert max(found.values()) < 1.4 * min(found.values())


def test_same_arguments_give_the_same_bytes(tmp_path, folder_root):
    first = make_shapes_coco(tmp_path / "a", train=4, val=2)
    second = make_shapes_coco(tmp_path / "b", train=4, val=2)
    assert contents(first) == contents(second)
    again = make_shapes_imagefolder(tmp_path / "c", train_per_class=3, val_per_class=2)
    assert contents(again) == contents(folder_root)


def test_a_larger_set_starts_with_the_smaller_one(tmp_path, coco_root):
    small = make_shapes_coco(tmp_path / "small", train=3, val=2)
    for path in (small / "train2017").iterdir():
        assert path.read_bytes() == (coco_root / "train2017" / path.name).read_bytes()


def test_seed_and_split_change_the_images(tmp_path):
    first = contents(make_shapes_coco(tmp_path / "a", train=2, val=2, seed=0))
    other = contents(make_shapes_coco(tmp_path / "b", train=2, val=2, seed=1))
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)
    assert first["train2017/000000000001.jpg"] != first["val2017/000000000001.jpg"]


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (make_shapes_coco, {"train": 2, "val": 1}),
        (make_shapes_imagefolder, {"train_per_class": 1, "val_per_class": 1}),
    ],
)
def test_second_call_writes_nothing(tmp_path, monkeypatch, make, arguments):
    root = make(tmp_path / "data", **arguments)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(shapes, "render", lambda *_: pytest.fail("an image was drawn again"))
    assert make(root, **arguments) == root
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("manifest", [None, "not json", "null", '{"kind": "coco"}'])
def test_foreign_folder_is_refused_and_left_alone(tmp_path, manifest):
    root = tmp_path / "mine"
    root.mkdir()
    (root / "thesis.txt").write_text("irreplaceable")
    if manifest is not None:
        (root / shapes.MANIFEST).write_text(manifest)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"mine.*pass another folder"):
        make_shapes_coco(root, train=1, val=1)
    assert contents(tmp_path) == before


def test_other_arguments_and_plain_files_are_refused(tmp_path):
    root = make_shapes_coco(tmp_path / "data", train=2, val=1)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="'train': 2"):
        make_shapes_coco(root, train=3, val=1)
    with pytest.raises(FileExistsError):
        make_shapes_imagefolder(root, 1, 1)
    with pytest.raises(FileExistsError):
        make_shapes_coco(root / shapes.MANIFEST, train=1, val=1)
    assert contents(tmp_path) == before


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "data").mkdir()
    root = make_shapes_coco(tmp_path / "data", train=1, val=1)
    assert json.loads((root / shapes.MANIFEST).read_text())["arguments"]["train"] == 1


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interruption_leaves_nothing_behind(tmp_path, monkeypatch, error):
    render, calls = shapes.render, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return render(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "render", failing)
        with pytest.raises(type(error)):
            make_shapes_coco(tmp_path / "data", train=4, val=2)
    assert list(tmp_path.iterdir()) == []
    make_shapes_coco(tmp_path / "data", train=4, val=2)


def test_a_rival_that_finishes_first_wins(tmp_path, monkeypatch):
    root, rename = tmp_path / "data", shapes.os.rename

    def late(source, target):
        monkeypatch.setattr(shapes.os, "rename", rename)
        make_shapes_coco(root, train=1, val=1)
        rename(source, target)

    monkeypatch.setattr(shapes.os, "rename", late)
    assert make_shapes_coco(root, train=1, val=1) == root
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize("arguments", [{"train": 0}, {"size": 16}, {"seed": -1}, {"max_objects": 0}])
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make_shapes_coco(tmp_path / "data", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    root = str(tmp_path / "data")
    assert shapes.main(["coco", root, "--train", "2", "--val", "1", "--size", "64", "--max-objects", "2"]) == 0
    assert capsys.readouterr().out == f"{root}: 3 images of 64x64 pixels, seed 0\n"
    assert shapes.main(["imagefolder", root]) == 2
    assert "pass another folder" in capsys.readouterr().err


def test_runs_as_a_module_without_warnings(tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "prune_mm.datasets.shapes", "imagefolder"]
    options = [str(tmp_path / "cls"), "--train-per-class", "1", "--val-per-class", "1"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


def test_image_folder_layout(folder_root):
    for part, count in (("train", 3), ("val", 2)):
        assert sorted(path.name for path in (folder_root / part).iterdir()) == sorted(FOLDER_CLASSES)
        for name in FOLDER_CLASSES:
            files = list((folder_root / part / name).glob("*.png"))
            assert len(files) == count
            assert {Image.open(path).size for path in files} == {(64, 64)}


def test_mmdet_reads_images_boxes_and_masks(coco_root):
    # mmdet binds mmcv's operators when first imported: without this, later tests would find them missing.
    compat.install_mmcv_ops()
    pytest.importorskip("mmdet")
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    dataset = CocoDataset(
        data_root=str(coco_root),
        ann_file="annotations/instances_train2017.json",
        data_prefix={"img": "train2017/"},
        metainfo={"classes": COCO_CLASSES},
        filter_cfg={"filter_empty_gt": True, "min_size": 32},
        pipeline=[LoadImageFromFile(), LoadAnnotations(with_bbox=True, with_mask=True)],
    )
    assert len(dataset) == COUNTS["train2017"]
    for sample in (dataset[i] for i in range(5)):
        assert sample["img"].shape == (SIZE, SIZE, 3)
        masks = sample["gt_masks"]
        assert not sample["gt_ignore_flags"].any()
        assert len(masks) == len(sample["gt_bboxes"]) == len(sample["gt_bboxes_labels"]) > 0
        tight = masks.get_bboxes("hbox").tensor.numpy()
        assert np.array_equal(tight, sample["gt_bboxes"].tensor.numpy())


def test_mmpretrain_reads_the_image_folder(folder_root):
    compat.install_mmcv_ops()
    pytest.importorskip("mmpretrain")
    from mmcv.transforms import LoadImageFromFile
    from mmpretrain.datasets import CustomDataset

    dataset = CustomDataset(
        data_root=str(folder_root), data_prefix="train", with_label=True, pipeline=[LoadImageFromFile()]
    )
    assert tuple(dataset.CLASSES) == FOLDER_CLASSES
    assert Counter(int(label) for label in dataset.get_gt_labels()) == dict.fromkeys(range(6), 3)
    assert dataset[0]["img"].shape == (64, 64, 3)


HARD = {"classes": ("cross", "crescent", "bar"), "clutter": 5, "occluders": 4, "occlusion": 0.5, "min_radius": 4.5}


@pytest.fixture(scope="module")
def hard_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "hard"
    return make_shapes_coco(root, train=20, val=3, test=4, size=96, max_objects=5, **HARD)


def test_a_third_split_is_written_only_when_asked_for(hard_root, coco_root):
    assert {path.name for path in hard_root.iterdir()} == {
        "annotations", "shapes.json", "train2017", "val2017", "test2017",
    }  # fmt: skip
    assert len(list((hard_root / "test2017").iterdir())) == 4
    assert not (coco_root / "test2017").exists()
    firsts = {(hard_root / split / "000000000001.jpg").read_bytes() for split in ("train2017", "val2017", "test2017")}
    assert len(firsts) == 3


def test_hard_classes_are_numbered_as_given(hard_root):
    content = json.loads((hard_root / "annotations/instances_test2017.json").read_text())
    assert [(c["id"], c["name"]) for c in content["categories"]] == [(1, "cross"), (2, "crescent"), (3, "bar")]
    assert {annotation["category_id"] for annotation in content["annotations"]} <= {1, 2, 3}


def test_strokes_hide_parts_of_objects_but_never_more_than_allowed():
    difficulty, shares = shapes.Difficulty(**HARD), []
    for seed in range(60):
        drawn, objects = shapes._scene(np.random.default_rng(seed), 96, 5, difficulty)
        assert {shape.name for shape, _ in objects} <= set(HARD["classes"])
        marks = [shape for shape in drawn if shape.name not in HARD["classes"]]
        above = [shape for shape in drawn[drawn.index(objects[-1][0]) + 1 :] if shape in marks]
        for shape, visible in objects:
            assert visible.sum() >= difficulty.min_area
            assert not any((visible & (mark.distance(96) <= 0)).any() for mark in above)
            shares.append(visible.sum() / (shape.distance(96) <= 0).sum())
    assert min(shares) >= 0.5
    assert min(shares) < hardness.DEMO.min_share


def test_small_objects_are_smaller():
    radii = {
        least: min(
            shape.radius
            for seed in range(40)
            for shape, _ in shapes._layout(np.random.default_rng(seed), 96, 4, shapes.Difficulty(min_radius=least))
        )
        for least in (4.5, 6.5)
    }
    assert radii[4.5] < 5.5
    assert radii[6.5] >= 6.5


def test_defaults_are_named_in_the_manifest_as_ever(coco_root, tmp_path):
    manifest = json.loads((coco_root / shapes.MANIFEST).read_text())
    assert set(manifest["arguments"]) == {"train", "val", "size", "seed", "max_objects"}
    same = make_shapes_coco(tmp_path / "same", train=2, val=1, classes=COCO_CLASSES, occlusion=0.4, clutter=0, test=0)
    assert contents(same) == contents(make_shapes_coco(tmp_path / "plain", train=2, val=1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"classes": ("circle", "hook")}, {"classes": ()}, {"classes": ("bar", "bar")}, {"clutter": -1},
        {"occluders": -1}, {"occlusion": 0.95}, {"min_radius": 2}, {"test": -1}, {"colour": 3},
    ],
)  # fmt: skip
def test_bad_difficulties_are_refused_before_anything_is_written(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make_shapes_coco(tmp_path / "data", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bar", "crescent", "blob", "hook", "stroke"])
def test_further_outlines_fit_the_unit_circle(name):
    rows, columns = np.nonzero(Shape(name, 50.0, 50.0, 40.0, 0.3).distance(100) <= 0)
    assert rows.size > 20
    assert np.hypot(columns + 0.5 - 50, rows + 0.5 - 50).max() <= 40
