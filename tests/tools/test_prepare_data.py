"""tools/prepare_data.py finds what is missing in a tree, and says so in a line each."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import tiny
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from prune_mm.datasets.shapes import make_shapes_coco, make_shapes_imagefolder
from prune_mm.engine.launch import check_data

TOOL = run_path(str(tiny.TOOLS / "prepare_data.py"))


@pytest.fixture
def imagenet(tmp_path):
    root = make_shapes_imagefolder(tmp_path / "imagenet", 3, 2, 32)
    for split in ("train", "val"):
        for number, folder in enumerate(sorted((root / split).iterdir())):
            folder.rename(folder.with_name(f"n{number:08d}"))
    return root


@pytest.fixture
def coco(tmp_path):
    return make_shapes_coco(tmp_path / "coco", 6, 4, 64)


def imagenet_findings(root, subset=True, sample=100):
    return list(TOOL["check_imagenet"](root, subset, sample))


def coco_findings(root, splits=("train2017", "val2017"), subset=True, sample=100):
    return list(TOOL["check_coco"](root, splits, subset, sample))


def test_the_tool_reports_and_ends_with_status_1(imagenet, tmp_path):
    end = tiny.tool(tmp_path, "prepare_data.py", "check", "imagenet", imagenet, "--subset")
    assert (end.status, end.out) == (0, f"{imagenet}: complete\n")
    end = tiny.tool(tmp_path, "prepare_data.py", "check", "imagenet", imagenet)
    assert end.status == 1
    assert f"{imagenet}/train: 18 images; ILSVRC 2012 has 1,281,167" in end.out.splitlines()
    assert f"{imagenet}/val: 6 classes; ILSVRC 2012 has 1000" in end.out.splitlines()
    assert f"{imagenet}/val/n00000000: 2 images; ILSVRC 2012 has 50 of each class" in end.out.splitlines()
    end = tiny.tool(tmp_path, "prepare_data.py", "check", "coco", tmp_path / "nowhere")
    assert end.one_line_error == f"no folder '{tmp_path}/nowhere'"


def test_imagenet_folders(imagenet):
    assert imagenet_findings(imagenet) == []
    shutil.rmtree(imagenet / "val" / "n00000002")
    for file in (imagenet / "train" / "n00000004").iterdir():
        file.unlink()
    (imagenet / "train" / "n00000001" / "00001.png").write_bytes(b"no image")
    assert imagenet_findings(imagenet) == [
        f"{imagenet}/train/n00000004: no images",
        f"{imagenet}/train/n00000001/00001.png: cannot be decoded (cannot identify image file "
        f"'{imagenet}/train/n00000001/00001.png')",
        f"{imagenet}: train/ and val/ have different classes, so labels differ: n00000002",
    ]
    assert len(imagenet_findings(imagenet, sample=0)) == 2
    (imagenet / "train" / "meta").mkdir()
    assert any(f"{imagenet}/train: folders that are no WordNet ids" in f for f in imagenet_findings(imagenet, False))
    shutil.rmtree(imagenet / "train")
    assert imagenet_findings(imagenet)[0] == f"{imagenet}/train: missing; unpack ILSVRC 2012 there, one folder a class"


def test_imagenet_with_an_annotation_file(imagenet):
    (imagenet / "meta").mkdir()
    listed = imagenet / "meta" / "val.txt"
    listed.write_text("n00000000/00000.png 0\nn00000001/00001.png 1\n")
    assert imagenet_findings(imagenet) == []
    listed.write_text("n00000000/00000.png 0\ngone.JPEG 1\n")
    assert imagenet_findings(imagenet) == [f"{imagenet}/val: 1 images that val.txt names are missing: gone.JPEG"]
    listed.write_text("n00000000/00000.png 0\ngone.JPEG dog\n")
    assert "meta/val.txt, line 2: 'gone.JPEG dog' is not 'path label'" in imagenet_findings(imagenet)[0]


def test_a_full_imagenet_is_complete(tmp_path):
    """Real numbers of folders and files, though the files are empty."""
    for number in range(1000):
        for split, count in (("train", 1), ("val", 50)):
            folder = tmp_path / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            for index in range(count):
                os.close(os.open(f"{folder}/{index}.JPEG", os.O_CREAT))
    counted = f"{tmp_path}/train: 1,000 images; ILSVRC 2012 has 1,281,167"
    assert imagenet_findings(tmp_path, subset=False, sample=0) == [counted]


def test_coco_folders(coco):
    assert coco_findings(coco) == []
    (coco / "train2017" / "000000000002.jpg").unlink()
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(coco / "val2017" / "000000000001.jpg")
    (coco / "val2017" / "000000000003.jpg").write_bytes((coco / "val2017" / "000000000003.jpg").read_bytes()[:300])
    findings = coco_findings(coco)
    assert findings[0] == f"{coco}/train2017: 1 of 6 images are missing: 000000000002.jpg"
    assert f"{coco}/val2017/000000000001.jpg: 7x9 pixels, but annotated as 64x64" in findings
    assert any(f"{coco}/val2017/000000000003.jpg: cannot be decoded" in finding for finding in findings)
    assert len(findings) == 3


def test_coco_annotations(coco):
    findings = coco_findings(coco, subset=False)
    assert f"{coco}/annotations/instances_train2017.json: 6 images; COCO has 118,287" in findings
    assert f"{coco}/annotations/instances_val2017.json: 3 categories; COCO has 80" in findings
    file = coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["image_id"] = 77
    file.write_text(json.dumps(content))
    assert coco_findings(coco) == [f"{file}: annotations of 1 images that it does not list"]
    file.write_text(file.read_text()[:99])
    assert coco_findings(coco) == [f"{file}: damaged, or no COCO annotations"]
    file.unlink()
    shutil.rmtree(coco / "train2017")
    assert coco_findings(coco) == [
        f"{coco}/train2017: missing; get train2017.zip from cocodataset.org/#download and unpack it in {coco}",
        f"{file}: missing; get annotations_trainval2017.zip from cocodataset.org/#download and unpack it in {coco}",
    ]


def old_names(coco):
    """The generated images as the files of 2014: val2017 is a part of val2014."""
    for split in ("train", "val"):
        content = json.loads((coco / "annotations" / f"instances_{split}2017.json").read_text())
        (coco / f"{split}2014").mkdir()
        for image in content["images"]:
            name = f"COCO_{split}2014_{image['file_name']}"
            shutil.copy(coco / f"{split}2017" / image["file_name"], coco / f"{split}2014" / name)
            image["file_name"] = name
        (coco / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))
    content = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][1:3]
    (coco / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def test_the_minival_split_trains_the_config_that_asks_for_it(coco, tmp_path):
    old_names(coco)
    splits = ("train2014", "valminusminival2014", "minival2014")
    assert any(f"tools/prepare_data.py minival2014 {coco}" in finding for finding in coco_findings(coco, splits))
    end = tiny.tool(tmp_path, "prepare_data.py", "minival2014", coco)
    assert end.status == 0, end
    assert "instances_minival2014.json: 2 images" in end.out
    check = ("prepare_data.py", "check", "coco", coco, "--minival2014", "--subset")
    assert tiny.tool(tmp_path, *check).out == f"{coco}: complete\n"
    again = tiny.tool(tmp_path, "prepare_data.py", "minival2014", coco)
    assert "instances_minival2014.json' is there already" in again.one_line_error

    config = Config.fromfile(tiny.ROOT / "configs/chex_maskrcnn_r50_minival2014.py")
    for dataset in (*config.train_dataloader.dataset.datasets, config.val_dataloader.dataset):
        dataset.update(data_root=f"{coco}/", metainfo={"classes": ("circle", "square", "triangle")})
    check_data(config, "train_dataloader", "val_dataloader")
    init_default_scope("mmdet")
    train, val = (DATASETS.build(config[f"{split}_dataloader"].dataset) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 2)
    assert Path(val.get_data_info(0)["img_path"]).is_file()
    assert {Path(train.get_data_info(i)["img_path"]).parent.name for i in range(8)} == {"train2014", "val2014"}
    assert config.val_evaluator.ann_file.endswith("data/coco/annotations/instances_minival2014.json")


def test_a_split_of_other_files_is_refused(coco, tmp_path):
    old_names(coco)
    file = coco / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"id": 2,', '"id": 999,', 1))
    assert (
        "val2017 must be a part of val2014"
        in tiny.tool(tmp_path, "prepare_data.py", "minival2014", coco).one_line_error
    )
    file.unlink()
    end = tiny.tool(tmp_path, "prepare_data.py", "minival2014", coco)
    assert f"'{file}' is missing; get annotations_trainval2017.zip" in end.one_line_error
