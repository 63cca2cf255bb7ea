"""Generated demo data: textured shapes, as COCO instance segmentation or as an image folder.

A pruning run can be tried in minutes without a download::

    python -m prune_mm.datasets.shapes coco data/shapes
    python -m prune_mm.datasets.shapes imagefolder data/shapes_cls

The instance-segmentation data can be made harder: more classes, marks that are no objects behind and across the
objects, more of them hidden, smaller ones; and it can have a third split.

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from prune_mm.datasets.drawing import BUSY, CALM, MARKS, OBJECTS, Shape, render
from prune_mm.datasets.hardness import COCO_CLASSES, DEMO, MIN_RADIUS, Difficulty, difficulty_of

__all__ = ["COCO_CLASSES", "FOLDER_CLASSES", "make_shapes_coco", "make_shapes_imagefolder"]

# Alphabetical: the order in which folder-reading data sets number their classes.
FOLDER_CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")

# Raise it whenever the same arguments would no longer give the same files.
FORMAT_VERSION = 1
MANIFEST = "shapes.json"
MIN_SIZE = 32

Mask = NDArray[np.bool_]


def _layout(
    rng: np.random.Generator, size: int, max_objects: int, difficulty: Difficulty = DEMO
) -> list[tuple[Shape, Mask]]:
    """One to ``max_objects`` shapes in drawing order, each with its visible mask (size, size).

    A candidate that would hide too much of an earlier shape is never drawn: all there is to see is annotated.
    """
    least = difficulty.min_radius
    radii = (least if least < MIN_RADIUS else max(least, size / 16), max(least, size / 4))
    target = int(rng.integers(1, max_objects + 1))
    shapes: list[Shape] = []
    visible: list[Mask] = []
    needed: list[float] = []
    for _ in range(4 * target):
        shape = Shape.sample(rng, str(rng.choice(difficulty.classes)), size, radii)
        mask = shape.distance(size) <= 0
        remaining = [earlier & ~mask for earlier in visible]
        if any(left.sum() < least for left, least in zip(remaining, needed)):
            continue
        shapes.append(shape)
        visible = [*remaining, mask]
        needed.append(max(difficulty.min_area, difficulty.min_share * mask.sum()))
        if len(shapes) == target:
            break
    return list(zip(shapes, visible))


def _clutter(rng: np.random.Generator, size: int, most: int) -> list[Shape]:
    """Up to ``most`` marks that lie behind the objects."""
    radii = (size / 24, size / 5)
    return [Shape.sample(rng, str(rng.choice(MARKS)), size, radii) for _ in range(int(rng.integers(most + 1)))]


def _occlude(
    rng: np.random.Generator, size: int, objects: list[tuple[Shape, Mask]], difficulty: Difficulty
) -> tuple[list[Shape], list[tuple[Shape, Mask]]]:
    """Up to ``difficulty.occluders`` strokes over the objects, and the objects with what is still seen of them."""
    strokes: list[Shape] = []
    for _ in range(int(rng.integers(difficulty.occluders + 1))):
        stroke = Shape.sample(rng, "stroke", size, (size / 8, size / 3))
        seen = [(shape, mask & ~(stroke.distance(size) <= 0)) for shape, mask in objects]
        wholes = [(shape.distance(size) <= 0).sum() for shape, _ in objects]
        limits = [max(difficulty.min_area, difficulty.min_share * whole) for whole in wholes]
        if all(mask.sum() >= limit for (_, mask), limit in zip(seen, limits)):
            strokes.append(stroke)
            objects = seen
    return strokes, objects


def _scene(
    rng: np.random.Generator, size: int, max_objects: int, difficulty: Difficulty
) -> tuple[list[Shape], list[tuple[Shape, Mask]]]:
    """All that is drawn, in order, and the objects among it with their visible masks."""
    below = _clutter(rng, size, difficulty.clutter) if difficulty.clutter else []
    objects = _layout(rng, size, max_objects, difficulty)
    above: list[Shape] = []
    if difficulty.occluders:
        above, objects = _occlude(rng, size, objects, difficulty)
    return [*below, *(shape for shape, _ in objects), *above], objects


# Folders.


def _publish(root: str | os.PathLike[str], kind: str, args: dict[str, Any], write: Callable[[Path], None]) -> Path:
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


def _write_coco_split(
    folder: Path, split: str, split_id: int, count: int, args: dict[str, Any], difficulty: Difficulty
) -> None:
    # Only this layout needs pycocotools; the image folder is for installations without a detector.
    from pycocotools import mask as mask_utils

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    size = args["size"]
    (folder / split).mkdir(parents=True)
    for index in _progress(count, f"shapes {split}"):
        rng = np.random.default_rng([args["seed"], split_id, index])
        drawn, objects = _scene(rng, size, args["max_objects"], difficulty)
        name = f"{index + 1:012d}.jpg"
        picture = render(rng, drawn, size, BUSY)
        # Full colour resolution: halving it would blur the outlines of the smallest shapes.
        picture.save(folder / split / name, quality=95, subsampling=0)
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for shape, mask in objects:
            rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": difficulty.classes.index(shape.name) + 1,
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
        "categories": [{"id": i, "name": name} for i, name in enumerate(difficulty.classes, 1)],
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
    test: int = 0,
    **difficulty: Any,
) -> Path:
    """Write an instance-segmentation data set in the layout of COCO 2017; of circles, squares and triangles by default.

    ``root`` gets ``train2017/``, ``val2017/`` (JPEG) and ``annotations/instances_{train,val}2017.json``; with ``test``
    also ``test2017/``. Category ids are 1, 2, ... in the order of ``classes``; masks are compressed RLE of what one
    sees of an object and do not overlap.

    Args:
        root: folder to make. Left as it is when it already holds this very data set.
        train: number of training images.
        val: number of validation images.
        size: side of the square images in pixels, at least 32. Radii: size/16 (6.5 at least) to size/4.
        seed: not negative; another seed gives other images.
        max_objects: most objects in an image; every image has at least one.
        test: number of test images; 0: no such split.
        difficulty: fields of :class:`Difficulty`: ``classes``, ``clutter``, ``occluders``, ``occlusion``,
            ``min_radius``.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` holds anything else; it is not touched.
        ValueError: an argument is out of range.
    """
    _check(size, seed, train=train, val=val, max_objects=max_objects)
    if test < 0:
        raise ValueError(f"test must not be negative, got {test}")
    hardness = difficulty_of(difficulty)
    # Only what is not as in the demo: its folders stay what they are.
    odd = {key: value for key, value in asdict(hardness).items() if value != getattr(DEMO, key)}
    odd = {key: list(value) if isinstance(value, tuple) else value for key, value in odd.items()}
    args = {"train": train, "val": val, "size": size, "seed": seed, "max_objects": max_objects, **odd}
    args |= {"test": test} if test else {}

    def write(folder: Path) -> None:
        for split_id, (split, count) in enumerate((("train2017", train), ("val2017", val), ("test2017", test))):
            if count:
                _write_coco_split(folder, split, split_id, count, args, hardness)

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
        (coco, "--test", 0, "images of a third split"),
        (coco, "--clutter", 0, "most marks behind the objects of an image"),
        (coco, "--occluders", 0, "most strokes across them"),
        (folder, "--train-per-class", 200, "training images of each class"),
        (folder, "--val-per-class", 40, "validation images of each class"),
        (folder, "--size", 64, "side of an image in pixels"),
    ):
        layout.add_argument(name, type=int, default=default, help=f"{text} (default: {default})")
    coco.add_argument("--classes", nargs="+", default=COCO_CLASSES, help=f"out of {', '.join(OBJECTS)}")
    coco.add_argument("--occlusion", type=float, default=0.4, help="largest hidden share of an object (default: 0.4)")
    coco.add_argument("--min-radius", type=float, default=MIN_RADIUS, help="in pixels (default: %(default)s)")
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
