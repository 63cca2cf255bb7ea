"""Generated demo data: textured shapes, as COCO instance segmentation or as an image folder.

A pruning run can be tried in minutes without a download::

    python -m prune_mm.datasets.shapes coco data/shapes
    python -m prune_mm.datasets.shapes imagefolder data/shapes_cls

Every image has its own random generator, seeded by (seed, split, index): the same arguments give the same
bytes, and a larger data set starts with the images of the smaller one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from prune_mm.datasets.drawing import BUSY, CALM, Shape, render

__all__ = ["COCO_CLASSES", "FOLDER_CLASSES", "make_shapes_coco", "make_shapes_imagefolder"]

COCO_CLASSES = ("circle", "square", "triangle")
# Alphabetical: the order in which folder-reading data sets number their classes.
FOLDER_CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")

# Raise it whenever the same arguments would no longer give the same files.
FORMAT_VERSION = 1
MANIFEST = "shapes.json"
MIN_SIZE = 32
MIN_RADIUS = 6.5
MIN_VISIBLE_SHARE = 0.6
MIN_VISIBLE_AREA = 40

Mask = NDArray[np.bool_]


def _layout(rng: np.random.Generator, size: int, max_objects: int) -> list[tuple[Shape, Mask]]:
    """One to ``max_objects`` shapes in drawing order, each with its visible mask (size, size).

    A candidate that would hide too much of an earlier shape is never drawn: all there is to see is annotated.
    """
    radii = (max(MIN_RADIUS, size / 16), max(MIN_RADIUS, size / 4))
    target = int(rng.integers(1, max_objects + 1))
    shapes: list[Shape] = []
    visible: list[Mask] = []
    needed: list[float] = []
    for _ in range(4 * target):
        shape = Shape.sample(rng, str(rng.choice(COCO_CLASSES)), size, radii)
        mask = shape.distance(size) <= 0
        remaining = [earlier & ~mask for earlier in visible]
        if any(left.sum() < least for left, least in zip(remaining, needed)):
            continue
        shapes.append(shape)
        visible = [*remaining, mask]
        needed.append(max(MIN_VISIBLE_AREA, MIN_VISIBLE_SHARE * mask.sum()))
        if len(shapes) == target:
            break
    return list(zip(shapes, visible))


# Folders.


def _publish(root: str | os.PathLike[str], kind: str, args: dict[str, int], write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary sibling of ``root``, then rename it to ``root``; return ``root``.

    Does nothing when ``root`` holds this data set already, and leaves nothing behind when ``write`` fails.
    """
    root = Path(root).expanduser()
    target = root.resolve()
    manifest = {"format_version": FORMAT_VERSION, "kind": kind, "arguments": args}
    if _is_complete(target, manifest):
        return root
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    folder.mkdir()
    try:
        write(folder)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        try:
            os.rename(folder, target)
        except OSError:
            # Another process (a second rank, say) may have finished the same data set first.
            if not _is_complete(target, manifest):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return root


def _is_complete(root: Path, manifest: dict[str, Any]) -> bool:
    """Whether ``root`` already holds the data set of ``manifest``.

    Raises:
        FileExistsError: it holds anything else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        found = None
    if found == manifest:
        return True
    what = "files that are not" if found is None else f"another data set ({found}) than"
    raise FileExistsError(
        f"{root} holds {what} the shapes data set asked for. Nothing was changed: pass another folder, "
        "or move or delete this one yourself."
    )


def _check(size: int, seed: int, **counts: int) -> None:
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} pixels, got {size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _progress(count: int, text: str) -> Iterable[int]:
    """Count from 0 to ``count`` - 1 under a bar on stderr, which is left out where nobody watches."""
    console = Console(stderr=True)
    return track(range(count), text, console=console, transient=True, disable=not console.is_terminal)


def _write_coco_split(folder: Path, split: str, split_id: int, count: int, args: dict[str, int]) -> None:
    # Only this layout needs pycocotools; the image folder is for installations without a detector.
    from pycocotools import mask as mask_utils

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    size = args["size"]
    (folder / split).mkdir(parents=True)
    for index in _progress(count, f"shapes {split}"):
        rng = np.random.default_rng([args["seed"], split_id, index])
        objects = _layout(rng, size, args["max_objects"])
        name = f"{index + 1:012d}.jpg"
        picture = render(rng, [shape for shape, _ in objects], size, BUSY)
        # Full colour resolution: halving it would blur the outlines of the smallest shapes.
        picture.save(folder / split / name, quality=95, subsampling=0)
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for shape, mask in objects:
            rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": COCO_CLASSES.index(shape.name) + 1,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                    "bbox": mask_utils.toBbox(rle).tolist(),
                    "area": int(mask_utils.area(rle)),
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": "prune_mm shapes", "version": str(FORMAT_VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(COCO_CLASSES, 1)],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def make_shapes_coco(
    root: str | os.PathLike[str],
    train: int = 600,
    val: int = 150,
    size: int = 128,
    seed: int = 0,
    max_objects: int = 4,
) -> Path:
    """Write an instance-segmentation data set of circles, squares and triangles in the layout of COCO 2017.

    ``root`` gets ``train2017/``, ``val2017/`` (JPEG) and ``annotations/instances_{train,val}2017.json``.
    Category ids are 1 to 3 in the order of :data:`COCO_CLASSES`; masks are compressed RLE of what one sees of
    an object and do not overlap.

    Args:
        root: folder to make. Left as it is when it already holds this very data set.
        train: number of training images.
        val: number of validation images.
        size: side of the square images in pixels, at least 32. Radii: size/16 (6.5 at least) to size/4.
        seed: not negative; another seed gives other images.
        max_objects: most objects in an image; every image has at least one.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` holds anything else; it is not touched.
        ValueError: an argument is out of range.
    """
    _check(size, seed, train=train, val=val, max_objects=max_objects)
    args = {"train": train, "val": val, "size": size, "seed": seed, "max_objects": max_objects}

    def write(folder: Path) -> None:
        _write_coco_split(folder, "train2017", 0, train, args)
        _write_coco_split(folder, "val2017", 1, val, args)

    return _publish(root, "coco", args, write)


def make_shapes_imagefolder(
    root: str | os.PathLike[str],
    train_per_class: int = 200,
    val_per_class: int = 40,
    size: int = 64,
    seed: int = 0,
) -> Path:
    """Write a classification data set of six shapes as ``root/{train,val}/<class>/<index>.png``.

    Every image shows one shape of :data:`FOLDER_CLASSES`, whose (alphabetical) order is that of the labels.

    Args:
        root: folder to make. Left as it is when it already holds this very data set.
        train_per_class: number of training images of each class.
        val_per_class: number of validation images of each class.
        size: side of the square images in pixels, at least 32.
        seed: not negative; another seed gives other images.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` holds anything else; it is not touched.
        ValueError: an argument is out of range.
    """
    _check(size, seed, train_per_class=train_per_class, val_per_class=val_per_class)
    args = {"train_per_class": train_per_class, "val_per_class": val_per_class, "size": size, "seed": seed}

    def write(folder: Path) -> None:
        _write_folder_split(folder / "train", 0, train_per_class, size, seed)
        _write_folder_split(folder / "val", 1, val_per_class, size, seed)

    return _publish(root, "imagefolder", args, write)


def _write_folder_split(folder: Path, split_id: int, per_class: int, size: int, seed: int) -> None:
    radii = (0.3 * size, 0.45 * size)
    for name in FOLDER_CLASSES:
        (folder / name).mkdir(parents=True)
    for index in _progress(per_class, f"shapes {folder.name}"):
        for label, name in enumerate(FOLDER_CLASSES):
            rng = np.random.default_rng([seed, split_id, index, label])
            shape = Shape.sample(rng, name, size, radii)
            render(rng, [shape], size, CALM).save(folder / name / f"{index:05d}.png")


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("root", type=Path, help="folder to make")
    shared.add_argument("--seed", type=int, default=0, help="another seed gives other images (default: 0)")
    parser = argparse.ArgumentParser(
        prog="python -m prune_mm.datasets.shapes", description="Generate the demo data of prune_mm."
    )
    layouts = parser.add_subparsers(dest="layout", required=True)
    coco = layouts.add_parser("coco", parents=[shared], help="instance segmentation, laid out like COCO 2017")
    folder = layouts.add_parser("imagefolder", parents=[shared], help="classification, one folder a class")
    for layout, name, default, text in (
        (coco, "--train", 600, "training images"),
        (coco, "--val", 150, "validation images"),
        (coco, "--size", 128, "side of an image in pixels"),
        (coco, "--max-objects", 4, "most objects in an image"),
        (folder, "--train-per-class", 200, "training images of each class"),
        (folder, "--val-per-class", 40, "validation images of each class"),
        (folder, "--size", 64, "side of an image in pixels"),
    ):
        layout.add_argument(name, type=int, default=default, help=f"{text} (default: {default})")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 2 when the arguments or the folder are refused."""
    options = vars(_parser().parse_args(argv))
    make = {"coco": make_shapes_coco, "imagefolder": make_shapes_imagefolder}[options.pop("layout")]
    try:
        root = make(**options)
    except (FileExistsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(path.suffix in {".jpg", ".png"} for path in root.rglob("*"))
    print(f"{root}: {count} images of {options['size']}x{options['size']} pixels, seed {options['seed']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
