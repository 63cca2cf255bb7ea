"""Verify ImageNet and COCO trees before a long training: ``tools/prepare_data.py check imagenet data/imagenet``.

``check`` prints one line for each thing that is missing or wrong and exits with status 1 when there is any.
``minival2014`` writes the annotation files of COCO's 2014 minival split, which many papers train and test on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from prune_mm.engine.launch import run_tool
from prune_mm.files import write_text_atomically

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif")
#: Images of ILSVRC 2012, in 1000 classes.
IMAGENET = {"train": 1_281_167, "val": 50_000}
#: Images and annotated instances, in 80 categories. 2014: train + valminusminival is train2017, minival is val2017.
COCO = {
    "train2017": (118_287, 860_001),
    "val2017": (5_000, 36_781),
    "train2014": (82_783, 604_907),
    "valminusminival2014": (35_504, None),
    "minival2014": (5_000, None),
}
FOLDERS = {"valminusminival2014": "val2014", "minival2014": "val2014"}


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("root", type=Path, help="folder of the data")
    shared.add_argument("--sample", type=int, default=100, metavar="N", help="decode N images of each split (100)")
    shared.add_argument("--subset", action="store_true", help="do not compare with the published numbers of images")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("check", help="verify a tree").add_subparsers(dest="data", required=True)
    data.add_parser("imagenet", parents=[shared], help="ROOT/{train,val}/<class>/, or ROOT/val/ with ROOT/meta/val.txt")
    coco = data.add_parser("coco", parents=[shared], help="ROOT/{train2017,val2017}/, ROOT/annotations/")
    coco.add_argument("--minival2014", action="store_true", help="the 2014 images with the minival split instead")
    minival = commands.add_parser(
        "minival2014", help="make the split from instances_val2014.json and instances_val2017.json"
    )
    minival.add_argument("root", type=Path, help="folder of the data")
    args = parser.parse_args(words)
    if args.command == "check" and args.sample < 0:
        raise ValueError(f"--sample is {args.sample}; it must not be negative")
    if not args.root.is_dir():
        raise FileNotFoundError(f"no folder '{args.root}'")
    return args


# -- ImageNet ---------------------------------------------------------------------------------------------------------


def check_imagenet(root: Path, subset: bool, sample: int) -> Iterator[str]:
    """What is wrong with an ImageNet tree, a line each."""
    classes: dict[str, list[str]] = {}
    for split, count in IMAGENET.items():
        folder, listed = root / split, root / "meta" / f"{split}.txt"
        if not folder.is_dir():
            yield f"{folder}: missing; unpack ILSVRC 2012 there, one folder a class"
            continue
        if listed.is_file():
            images = yield from _annotated(folder, listed, subset)
        else:
            classes[split], images = _class_folders(folder)
            yield from _check_classes(folder, classes[split], images, subset)
        if not subset and len(images) != count:
            yield f"{folder}: {len(images):,} images; ILSVRC 2012 has {count:,}"
        yield from _undecodable([folder / image for image in images], sample)
    if len(classes) == 2 and classes["train"] != classes["val"]:
        odd = sorted(set(classes["train"]) ^ set(classes["val"]))
        yield f"{root}: train/ and val/ have different classes, so labels differ: {_some(odd)}"


def _class_folders(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the classes, and paths of all images."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    images = []
    for name in track(classes, f"{folder.name}/", console=Console(stderr=True), transient=True):
        for place, _, files in os.walk(folder / name):
            inner = os.path.relpath(place, folder)
            images += [f"{inner}/{file}" for file in files if file.lower().endswith(EXTENSIONS)]
    return classes, images


def _check_classes(folder: Path, classes: list[str], images: list[str], subset: bool) -> Iterator[str]:
    if not classes:
        yield f"{folder}: no class folders, and no {folder.parent}/meta/{folder.name}.txt to give labels"
        return
    full = Counter(image.partition("/")[0] for image in images)
    for name in classes:
        if not full[name]:
            yield f"{folder / name}: no images"
        elif not subset and folder.name == "val" and full[name] != 50:
            yield f"{folder / name}: {full[name]} images; ILSVRC 2012 has 50 of each class"
    if not subset:
        if len(classes) != 1000:
            yield f"{folder}: {len(classes)} classes; ILSVRC 2012 has 1000"
        odd = [name for name in classes if not re.fullmatch(r"n\d{8}", name)]
        if odd:
            yield f"{folder}: folders that are no WordNet ids, which shift the labels: {_some(odd)}"


def _annotated(folder: Path, listed: Path, subset: bool) -> Iterator[str]:
    """Findings about an annotation file; returns the paths of the images."""
    images, labels = [], set()
    for number, line in enumerate(listed.read_text().splitlines(), 1):
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdigit() or int(label) >= 1000:
            yield f"{listed}, line {number}: {line!r} is not 'path label' with a label from 0 to 999"
            return []
        images.append(path)
        labels.add(int(label))
    if not subset and len(labels) != 1000:
        yield f"{listed}: {len(labels)} different labels; ILSVRC 2012 has 1000"
    there = _files_below(folder)
    missing = sorted(set(images) - there)
    if missing:
        yield f"{folder}: {len(missing):,} images that {listed.name} names are missing: {_some(missing)}"
    return [image for image in images if image in there]


# -- COCO -------------------------------------------------------------------------------------------------------------


def check_coco(root: Path, splits: tuple[str, ...], subset: bool, sample: int) -> Iterator[str]:
    """What is wrong with a COCO tree, a line each."""
    for split in splits:
        folder, file = root / FOLDERS.get(split, split), root / "annotations" / f"instances_{split}.json"
        if not folder.is_dir():
            yield f"{folder}: missing; get {folder.name}.zip from cocodataset.org/#download and unpack it in {root}"
        if not file.is_file():
            yield f"{file}: missing; {_source_of(split, root)}"
            continue
        try:
            content = json.loads(file.read_bytes())
            images, annotations, categories = (content[key] for key in ("images", "annotations", "categories"))
            sizes = {image["file_name"]: (image["width"], image["height"]) for image in images}
            known, used = {image["id"] for image in images}, {annotation["image_id"] for annotation in annotations}
        except (ValueError, KeyError, TypeError):
            yield f"{file}: damaged, or no COCO annotations"
            continue
        yield from _check_counts(file, split, (len(images), len(annotations)), len(categories), subset)
        if used - known:
            yield f"{file}: annotations of {len(used - known):,} images that it does not list"
        if folder.is_dir():
            there = _files_below(folder)
            missing = sorted(set(sizes) - there)
            if missing:
                yield f"{folder}: {len(missing):,} of {len(sizes):,} images are missing: {_some(missing)}"
            yield from _undecodable([folder / name for name in sizes if name in there], sample, sizes)


def _check_counts(file: Path, split: str, found: tuple[int, int], categories: int, subset: bool) -> Iterator[str]:
    if subset:
        return
    for count, published, what in zip(found, COCO[split], ("images", "instances")):
        if published is not None and count != published:
            yield f"{file}: {count:,} {what}; COCO has {published:,}"
    if categories != 80:
        yield f"{file}: {categories} categories; COCO has 80"


def _source_of(split: str, root: Path) -> str:
    if split in FOLDERS:
        return f"make it with tools/prepare_data.py minival2014 {root}"
    return f"get annotations_trainval{split[-4:]}.zip from cocodataset.org/#download and unpack it in {root}"


def make_minival(root: Path) -> None:
    """Divide the annotations of val2014 into minival, whose images are those of val2017, and the rest.

    Raises:
        FileExistsError: they are there already.
        FileNotFoundError: an annotation file is missing.
        ValueError: the files do not belong together.
    """
    folder = root / "annotations"
    targets = {name: folder / f"instances_{name}2014.json" for name in ("minival", "valminusminival")}
    for target in targets.values():
        if target.exists():
            raise FileExistsError(f"'{target}' is there already")
    contents: dict[str, dict[str, Any]] = {}
    for year in ("2014", "2017"):
        file = folder / f"instances_val{year}.json"
        if not file.is_file():
            raise FileNotFoundError(f"'{file}' is missing; {_source_of(f'val{year}', root)}")
        contents[year] = json.loads(file.read_bytes())
    chosen = {image["id"] for image in contents["2017"]["images"]}
    if not chosen < {image["id"] for image in contents["2014"]["images"]}:
        raise ValueError(f"'{folder}': val2017 must be a part of val2014, and is not; are both files COCO's?")
    for name, target in targets.items():
        part = dict(contents["2014"])
        part["images"] = [image for image in part["images"] if (image["id"] in chosen) == (name == "minival")]
        part["annotations"] = [a for a in part["annotations"] if (a["image_id"] in chosen) == (name == "minival")]
        write_text_atomically(target, json.dumps(part))
        print(f"{target}: {len(part['images']):,} images, {len(part['annotations']):,} instances")


# -- both -------------------------------------------------------------------------------------------------------------


def _files_below(folder: Path) -> set[str]:
    return {os.path.relpath(os.path.join(place, file), folder) for place, _, files in os.walk(folder) for file in files}


def _undecodable(files: list[Path], sample: int, sizes: dict[str, tuple[int, int]] | None = None) -> Iterator[str]:
    """Decode some of the images; a line for each that cannot be, or whose size is not the annotated one."""
    for file in random.Random(0).sample(files, min(sample, len(files))):
        try:
            with Image.open(file) as image:
                image.load()
                size = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            yield f"{file}: cannot be decoded ({error})"
            continue
        if sizes and sizes[file.name] != size:
            yield f"{file}: {size[0]}x{size[1]} pixels, but annotated as {sizes[file.name][0]}x{sizes[file.name][1]}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def main() -> None:
    """Check, or make the split."""
    args = parse_args()
    if args.command == "minival2014":
        make_minival(args.root)
        return
    if args.data == "imagenet":
        findings = check_imagenet(args.root, args.subset, args.sample)
    else:
        years = ("train2014", "valminusminival2014", "minival2014") if args.minival2014 else ("train2017", "val2017")
        findings = check_coco(args.root, years, args.subset, args.sample)
    count = 0
    for finding in findings:
        print(finding, flush=True)
        count += 1
    print(f"{args.root}: {f'{count} finding(s)' if count else 'complete'}", file=sys.stderr if count else sys.stdout)
    if count:
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
