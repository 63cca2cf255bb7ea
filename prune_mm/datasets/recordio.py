"""RecordIO, the format of MXNet's ``.rec`` and ``.idx`` files, and a dataset that reads it.

Source of the format: ``dmlc-core/include/dmlc/recordio.h`` (framing) and ``mxnet/python/mxnet/recordio.py``
(``IRHeader``, ``MXIndexedRecordIO``). All numbers are little-endian. A record is::

    uint32  magic 0xced7230a
    uint32  flag (upper 3 bits) and length in bytes (lower 29)
    bytes   content, padded with zeros to a multiple of 4

Content that holds the magic at a multiple of 4 is split there, the magic left out, into parts with flag 1 (first), 2
(middle) and 3 (last); flag 0 means whole. The content of an image record is ``IRHeader`` and the image file::

    uint32  n, the number of labels when there are several; 0: one label
    float32 label
    uint64  id
    uint64  second id
    float32 x n labels

An ``.idx`` file has a line ``key<TAB>offset`` for each record.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from mmengine.dataset import BaseDataset, Compose
from numpy.typing import NDArray

from prune_mm.registry import DATASETS

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_HEADER = struct.Struct("<IfQQ")
_LONGEST = (1 << 29) - 1


def pack_image_record(label: float, key: int, image: bytes) -> bytes:
    """Content of an image record with one label.

    Args:
        label: class number.
        key: the number that the index file gives the record.
        image: the image file.
    """
    return _HEADER.pack(0, label, key, 0) + image


def frame_record(content: bytes) -> bytes:
    """A record as it stands in a file.

    Raises:
        ValueError: longer than the format can say.
    """
    if len(content) > _LONGEST:
        raise ValueError(f"a record of {len(content)} bytes; RecordIO allows {_LONGEST}")
    parts, start, at = [], 0, content.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            parts.append(content[start:at])
            start = at + 4
            at = content.find(_MAGIC_BYTES, start)
        else:
            at = content.find(_MAGIC_BYTES, at + 1)
    parts.append(content[start:])
    flags = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    return b"".join(
        struct.pack("<II", MAGIC, flag << 29 | len(part)) + part + bytes(-len(part) % 4)
        for flag, part in zip(flags, parts)
    )


def parse_record(framed: bytes) -> tuple[bytes, int]:
    """Content of the record at the start of ``framed``, and the number of bytes it takes there.

    Raises:
        ValueError: when there is no whole record.
    """
    content, at = bytearray(), 0
    while True:
        if len(framed) < at + 8:
            raise ValueError("the record is cut short")
        magic, word = struct.unpack_from("<II", framed, at)
        flag, length = word >> 29, word & _LONGEST
        if magic != MAGIC or flag not in ((0, 1) if at == 0 else (2, 3)):
            raise ValueError("no record starts there")
        if len(framed) < at + 8 + length:
            raise ValueError("the record is cut short")
        content += framed[at + 8 : at + 8 + length]
        at += 8 + length + -length % 4
        if flag in (0, 3):
            return bytes(content), at
        content += _MAGIC_BYTES


def parse_image_record(content: bytes) -> tuple[int, bytes]:
    """Class number and image file of an image record; of several labels the first.

    Raises:
        ValueError: when it is too short.
    """
    if len(content) < _HEADER.size:
        raise ValueError("the record is too short for an image")
    count, label, _, _ = _HEADER.unpack_from(content)
    start = _HEADER.size + 4 * count
    if len(content) <= start:
        raise ValueError("the record holds no image")
    return int(struct.unpack_from("<f", content, _HEADER.size)[0] if count else label), content[start:]


def read_image_record(path: str, offset: int, length: int) -> tuple[int, NDArray[np.uint8]]:
    """Class number and bytes of the image file in a record.

    Args:
        path: ``.rec`` file.
        offset: where the record starts.
        length: bytes up to the next record.

    Raises:
        ValueError: naming the file, when there is no record at that place.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        framed = os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
    try:
        label, image = parse_image_record(parse_record(framed)[0])
    except ValueError as error:
        raise ValueError(f"'{path}' at byte {offset}: {error}; does the .idx file belong to it?") from None
    return label, np.frombuffer(image, np.uint8)


def read_index(idx_file: str | os.PathLike[str], rec_file: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Records of a ``.rec`` file in the order of its ``.idx`` file.

    Returns:
        ``(records, 3)``: key, offset, length with padding; in bytes.

    Raises:
        FileNotFoundError: one of the two is missing.
        ValueError: the index is empty, is no index, or does not fit the file.
    """
    for file in (idx_file, rec_file):
        if not Path(file).is_file():
            raise FileNotFoundError(f"'{file}' is missing; tools/make_recordio.py writes .rec and .idx files")
    try:
        table = np.loadtxt(idx_file, dtype=np.int64, ndmin=2, usecols=(0, 1)) if Path(idx_file).stat().st_size else None
    except (ValueError, IndexError):
        raise ValueError(f"'{idx_file}' is no index: each line is a key, a tab and an offset") from None
    if table is None or not len(table):
        raise ValueError(f"'{idx_file}' lists no records")
    size, order = Path(rec_file).stat().st_size, np.argsort(table[:, 1], kind="stable")
    ends = np.append(table[order[1:], 1], size)
    lengths = np.empty(len(table), np.int64)
    lengths[order] = ends - table[order, 1]
    if table[order[0], 1] != 0 or (lengths < 8).any() or (table[:, 1] % 4).any():
        raise ValueError(f"'{idx_file}' does not belong to '{rec_file}' of {size} bytes: its offsets do not fit")
    _check_frame(rec_file, int(table[order[-1], 1]), int(lengths[order[-1]]))
    return np.column_stack([table, lengths])


def _check_frame(rec_file: str | os.PathLike[str], offset: int, length: int) -> None:
    """The last record must start where the index says, and end with the file."""
    file: BinaryIO
    with open(rec_file, "rb") as file:
        file.seek(offset)
        try:
            whole = parse_record(file.read(length))[1] == length
        except ValueError:
            whole = False
    if not whole:
        raise ValueError(f"'{rec_file}' is cut short or its .idx file is another's: no whole record at byte {offset}")


@DATASETS.register_module()
class RecordIODataset:
    """Images in RecordIO, for :class:`~prune_mm.datasets.dali.DALIDataLoader`.

    Args:
        data_root: folder; empty: the current one.
        rec_file: ``.rec`` file in it.
        idx_file: its index; None: the same name with ``.idx``.
        pipeline: transforms as for MMPretrain's datasets.
        metainfo: facts about the data, e.g. ``dict(classes=(...))``. None: the classes in ``<name>.classes.txt``, which
            tools/make_recordio.py writes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the two files do not belong together.
    """

    def __init__(
        self,
        rec_file: str,
        data_root: str = "",
        idx_file: str | None = None,
        pipeline: Sequence[dict] = (),
        metainfo: dict | None = None,
    ) -> None:
        """See the class."""
        self.rec_file = os.path.join(data_root, rec_file)
        stem = os.path.splitext(self.rec_file)[0]
        self.index = read_index(os.path.join(data_root, idx_file) if idx_file else f"{stem}.idx", self.rec_file)
        classes = Path(f"{stem}.classes.txt")
        if metainfo is None and classes.is_file():
            metainfo = {"classes": str(classes)}
        self.metainfo = BaseDataset._load_metainfo(metainfo)
        self.pipeline = Compose(list(pipeline))

    @property
    def CLASSES(self) -> tuple[str, ...] | None:
        """Names of the classes, as MMPretrain's datasets have them."""
        return self.metainfo.get("classes")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index)

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Where an image is; its label stands in the record."""
        key, offset, length = self.index[idx].tolist()
        record = (self.rec_file, offset, length)
        return {"sample_idx": idx, "img_path": f"{self.rec_file}:{key}", "record": record}

    def __getitem__(self, idx: int) -> None:
        """Not for PyTorch's loader.

        Raises:
            TypeError: always.
        """
        raise TypeError("RecordIODataset is read by dict(type='prune_mm.DALIDataLoader'), not by PyTorch's loader")
