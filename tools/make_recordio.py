"""Pack an image folder into RecordIO: ``tools/make_recordio.py pack data/imagenet_train data/imagenet/train``.

Does what MXNet's im2rec does, without MXNet. ``list`` writes PREFIX.lst (a line ``key<TAB>label<TAB>path`` per image,
in MMPretrain's order) and PREFIX.classes.txt; ``pack`` writes PREFIX.rec and PREFIX.idx from the list, which it makes
first when there is none. The format is MXNet's, described with its source in ``prune_mm/datasets/recordio.py``; DALI's
``fn.readers.mxnet`` reads it, and so does ``prune_mm.RecordIODataset``.
"""

from __future__ import annotations

import argparse
import io
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prune_mm.datasets.recordio import frame_record, pack_image_record
from prune_mm.engine.launch import run_tool
from prune_mm.files import write_atomically, write_text_atomically

#: What MMPretrain takes for an image.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif")


def parse_args() -> argparse.Namespace:
    """Command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("prefix", help="where to write: PREFIX.lst, PREFIX.classes.txt, PREFIX.rec, PREFIX.idx")
    shared.add_argument("root", type=Path, help="folder of the images, ROOT/<class>/...; with --ann-file any")
    shared.add_argument("--ann-file", type=Path, help="a line 'path label' per image; default: labels from the folders")
    shared.add_argument("--shuffle", type=int, metavar="SEED", help="list the images in a random order")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", parents=[shared], help="write the list only")
    pack = commands.add_parser("pack", parents=[shared], help="write the list, unless it is there, and the records")
    pack.add_argument("--pass-through", action="store_true", help="pack the files as they are, byte by byte")
    pack.add_argument("--resize", type=int, metavar="PIXELS", help="scale larger images down to this shorter edge")
    pack.add_argument("--quality", type=int, default=95, help="JPEG quality without --pass-through (default: 95)")
    pack.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: one per core")
    args = parser.parse_args()
    if args.command == "pack":
        _check_pack(args)
    return args


def _check_pack(args: argparse.Namespace) -> None:
    if args.pass_through and args.resize is not None:
        raise ValueError("--pass-through leaves files as they are, --resize does not; give one of them")
    for name, low, high in (("resize", 1, 65535), ("quality", 1, 100), ("threads", 1, 1024)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} is {value}; it must be from {low} to {high}")


def list_images(root: Path, ann_file: Path | None) -> tuple[list[tuple[str, int]], list[str]]:
    """Paths from ``root`` with their labels, and the names of the classes (none with an annotation file).

    Raises:
        FileNotFoundError: there is no such folder or file, or it holds no images.
        ValueError: a line of the annotation file cannot be read.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder '{root}'")
    if ann_file is not None:
        return _read_annotations(ann_file), []
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    images = []
    for label, name in enumerate(classes):
        files = [path.relative_to(root / name) for path in (root / name).rglob("*") if path.is_file()]
        shown = sorted(str(file) for file in files if not any(part.startswith(".") for part in file.parts))
        images += [(f"{name}/{file}", label) for file in shown if file.lower().endswith(EXTENSIONS)]
    if not images:
        raise FileNotFoundError(f"'{root}' holds no images in folders, one folder a class ({', '.join(EXTENSIONS)})")
    return images, classes


def _read_annotations(ann_file: Path) -> list[tuple[str, int]]:
    if not ann_file.is_file():
        raise FileNotFoundError(f"no annotation file '{ann_file}'")
    images = []
    for number, line in enumerate(ann_file.read_text().splitlines(), 1):
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdigit():
            raise ValueError(f"'{ann_file}', line {number}: {line!r} is not 'path label'")
        images.append((path, int(label)))
    if not images:
        raise FileNotFoundError(f"'{ann_file}' names no images")
    return images


def read_list(file: Path) -> list[tuple[int, float, str]]:
    """Key, label and path of each line.

    Raises:
        ValueError: naming the first line that is something else.
    """
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            key, label, path = line.split("\t")
            rows.append((int(key), float(label), path))
        except ValueError:
            raise ValueError(f"'{file}', line {number}: {line!r} is not 'key<TAB>label<TAB>path'") from None
    if not rows:
        raise ValueError(f"'{file}' lists no images")
    return rows


def write_list(args: argparse.Namespace) -> Path:
    """PREFIX.lst and PREFIX.classes.txt."""
    file, names = Path(f"{args.prefix}.lst"), Path(f"{args.prefix}.classes.txt")
    _refuse_to_overwrite(file, names)
    images, classes = list_images(args.root, args.ann_file)
    if args.shuffle is not None:
        random.Random(args.shuffle).shuffle(images)
    write_text_atomically(file, "".join(f"{key}\t{label:f}\t{path}\n" for key, (path, label) in enumerate(images)))
    if classes:
        write_text_atomically(names, "".join(f"{name}\n" for name in classes))
    print(f"{file}: {len(images)} images, {len({label for _, label in images})} classes")
    return file


def write_records(args: argparse.Namespace, rows: list[tuple[int, float, str]]) -> None:
    """PREFIX.rec and PREFIX.idx; each appears when it is whole.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: an image is damaged.
    """
    record_file, index_file = Path(f"{args.prefix}.rec"), Path(f"{args.prefix}.idx")
    index: list[str] = []

    def write(temporary: str) -> None:
        offset = 0
        with open(temporary, "wb") as out:
            for (key, _, _), record in zip(rows, _in_order(lambda row: make_record(args, *row), rows, args.threads)):
                out.write(record)
                index.append(f"{key}\t{offset}\n")
                offset += len(record)

    write_atomically(record_file, write)
    write_text_atomically(index_file, "".join(index))
    print(f"{record_file}: {len(rows)} images, {record_file.stat().st_size / 1e6:,.1f} MB")


def make_record(args: argparse.Namespace, key: int, label: float, path: str) -> bytes:
    """One image as a record."""
    file = args.root / path
    if not file.is_file():
        raise FileNotFoundError(f"no image '{file}', which the list names")
    image = file.read_bytes()
    if not image:
        raise ValueError(f"the image '{file}' is empty")
    if not args.pass_through:
        try:
            image = _encode(image, args.resize, args.quality)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"the image '{file}' cannot be decoded: {error}") from None
    return frame_record(pack_image_record(label, key, image))


def _encode(image: bytes, shorter: int | None, quality: int) -> bytes:
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    if shorter is not None and min(picture.size) > shorter:
        scale = shorter / min(picture.size)
        size = tuple(max(shorter, round(edge * scale)) for edge in picture.size)
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _in_order(function: Callable[[Any], bytes], items: list[Any], threads: int) -> Iterator[bytes]:
    """Results in the order of the items, few enough ahead to stay small in memory."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ThreadPoolExecutor(threads) as pool, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("pack", total=len(items))
        ahead: deque[Future[bytes]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 4 * threads:
                    progress.advance(task)
                    yield ahead.popleft().result()
            while ahead:
                progress.advance(task)
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _refuse_to_overwrite(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise FileExistsError(f"'{file}' is there already; move it away, or choose another prefix")


def main() -> None:
    """List and pack."""
    args = parse_args()
    listed = Path(f"{args.prefix}.lst")
    if args.command == "list":
        write_list(args)
        return
    _refuse_to_overwrite(Path(f"{args.prefix}.rec"), Path(f"{args.prefix}.idx"))
    if not listed.exists():
        write_list(args)
    elif args.ann_file is not None or args.shuffle is not None:
        raise ValueError(f"'{listed}' is there already; --ann-file and --shuffle are for making a new list")
    write_records(args, read_list(listed))


if __name__ == "__main__":
    run_tool(main)
