"""Reads files of ``torch.save`` as data; see :mod:`prune_mm.export.pickled`.

Both containers are known: the ZIP archive, and the pickles in a row that PyTorch wrote before 1.6. Nothing is larger in
memory than in the file, and every tensor lies within its storage.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prune_mm.export.pickled import Function, UnknownName, is_key, read_pickle

#: Begin of a file that PyTorch wrote before 1.6: magic number and protocol, one pickle each.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_AXES = 25
#: What reading a damaged file can raise; nothing in here runs code of the file.
_DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, RuntimeError, TypeError,
    ValueError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
#: Types without a storage class of their own, by the name a file calls them.
_TYPES = [t for t in vars(torch).values() if isinstance(t, torch.dtype) and not str(t).startswith("torch.q")]


#: What makes sparse, quantized and other tensors.
_OTHER_TENSORS = (
    "torch.serialization._get_layout", "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_wrapper_subclass",
    "torch._utils._rebuild_device_tensor_from_numpy", "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._tensor._rebuild_from_type_v2",
)  # fmt: skip


class CodeInFile(ValueError):
    """A file holds more than data."""


@dataclass(frozen=True)
class _StorageType:
    """The name of a storage class in a file."""

    dtype: torch.dtype


@dataclass
class _Storage:
    """Bytes of a file that tensors are views of."""

    raw: Tensor
    boolean: bool = False

    def check_boolean(self) -> None:
        """Bytes of booleans are 0 or 1; for any other PyTorch computes nonsense."""
        self.boolean = True
        if bool((self.raw > 1).any()):
            raise ValueError("a boolean is neither true nor false")


@dataclass(frozen=True)
class _Elements:
    """A storage as elements of a type."""

    storage: _Storage
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype is torch.bool and not self.storage.boolean:
            self.storage.check_boolean()


def read_torch_file(path: str | os.PathLike, names: Mapping[str, Any] | None = None) -> Any:
    """What a file of ``torch.save`` holds, on the CPU.

    Args:
        path: of the file.
        names: what more than tensors and plain values it may hold; see :func:`~prune_mm.export.pickled.read_pickle`.

    Returns:
        Plain values, containers and dense tensors. Parameters come as tensors; none requires a gradient.

    Raises:
        CodeInFile: naming what the file holds besides data.
        ValueError: saying what is wrong with the file, without its name.
    """
    known = _NAMES | dict(names or {})
    try:
        with Path(path).open("rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(4)
            if head == b"PK\x03\x04":
                return _read_archive(file, size, known)
            if head[:1] == b"\x80":
                return _read_legacy(file, size, known)
    except UnknownName as error:
        raise CodeInFile(f"it holds a '{error.name}', which is no data") from error
    except _DAMAGE as error:
        raise ValueError(str(error) or type(error).__name__) from error
    raise ValueError("torch.save did not write it")


# -- the archive ----------------------------------------------------------------------------------------------------


def _read_archive(file: BinaryIO, size: int, names: Mapping[str, Any]) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        top = _checked_top(archive.infolist(), size)
        if f"{top}/constants.pkl" in entries:
            raise CodeInFile("it is a TorchScript program, not a file of weights")
        order = archive.read(entries[f"{top}/byteorder"]).decode() if f"{top}/byteorder" in entries else "little"
        if order != sys.byteorder:
            raise ValueError(f"it was written on a machine whose bytes are in another order ({order[:20]})")
        storages: dict[str, _Storage] = {}

        def storage(reference: Any) -> _Elements:
            key, dtype, nbytes, view = _checked_reference(reference)
            if view is not None:
                raise ValueError("it refers to a part of a storage")
            entry = entries.get(f"{top}/data/{key}")
            if entry is None or entry.file_size != nbytes:
                found = "missing" if entry is None else f"{entry.file_size} bytes long"
                raise ValueError(f"storage {key[:40]} must have {nbytes} bytes, it is {found}")
            if key not in storages:
                content = bytearray(archive.read(entry))
                storages[key] = _Storage(_bytes(content))
            return _Elements(storages[key], dtype)

        names = names | _rebuilding(size)
        return read_pickle(archive.read(entries[f"{top}/data.pkl"]), size, names, storage)


def _checked_top(entries: list[zipfile.ZipInfo], size: int) -> str:
    """The folder all entries of an archive are in.

    Raises:
        ValueError: the archive is none that ``torch.save`` writes, such as one that unpacks to more than it is.
    """
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        raise ValueError("it is compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its parts are longer than itself")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("it holds a part twice")
    tops = {entry.filename.partition("/")[0] for entry in entries}
    if len(tops) != 1 or f"{next(iter(tops))}/data.pkl" not in {entry.filename for entry in entries}:
        raise ValueError("it is another kind of ZIP file")
    return tops.pop()


# -- pickles in a row -----------------------------------------------------------------------------------------------


def _read_legacy(file: BinaryIO, size: int, names: Mapping[str, Any]) -> Any:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if read_pickle(content, size, {}) != _LEGACY_MAGIC or read_pickle(content, size, {}) != _LEGACY_PROTOCOL:
            raise ValueError("torch.save did not write it")
        system = read_pickle(content, size, {})
        if type(system) is not dict or system.get("little_endian") is not (sys.byteorder == "little"):
            raise ValueError("it was written on a machine whose bytes are in another order")
        storages: dict[str, _Storage] = {}
        widths: dict[str, int] = {}
        left = size

        def storage(reference: Any) -> _Elements:
            nonlocal left
            key, dtype, nbytes, view = _checked_reference(reference)
            if view is not None:
                raise ValueError("it refers to a part of a storage, as only PyTorch before 0.4 wrote")
            if key not in storages:
                left -= nbytes
                if left < 0:
                    raise ValueError("its storages are longer than itself")
                storages[key] = _Storage(torch.zeros(nbytes, dtype=torch.uint8))
                widths[key] = dtype.itemsize
            if storages[key].raw.numel() != nbytes:
                raise ValueError("a storage has two sizes")
            return _Elements(storages[key], dtype)

        result = read_pickle(content, size, names | _rebuilding(size), storage)
        keys = read_pickle(content, size, {})
        if type(keys) is not list or not all(map(is_key, keys)) or sorted(keys) != sorted(storages):
            raise ValueError("it lists other storages than it uses")
        for key in keys:
            _fill(storages[key], widths[key], content)
        return result


def _fill(storage: _Storage, width: int, content: mmap.mmap) -> None:
    """Read the bytes of a storage, which stand behind the number of its elements."""
    nbytes = storage.raw.numel()
    (count,) = struct.unpack("<q", content.read(8))
    found = bytearray(content.read(nbytes))
    if count * width != nbytes or len(found) != nbytes:
        raise ValueError("it ends within a storage")
    storage.raw.copy_(_bytes(found))
    if storage.boolean:
        storage.check_boolean()


# -- tensors --------------------------------------------------------------------------------------------------------


def _bytes(content: bytearray) -> Tensor:
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _checked_reference(reference: Any) -> tuple[str, torch.dtype, int, Any]:
    """Key, type, size in bytes and view of a storage's persistent id."""
    if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
        raise ValueError("it refers to something that is no storage")
    _, kind, key, _, count = reference[:5]
    if not isinstance(kind, _StorageType) or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("it refers to a storage that cannot be")
    return key, kind.dtype, count * kind.dtype.itemsize, reference[5] if len(reference) == 6 else None


def _rebuilding(file_size: int) -> dict[str, Function]:
    """The functions that make tensors, none of which may have more bytes than the file."""

    def tensor(
        storage: Any, offset: Any, size: Any, stride: Any, grad: Any = False, hooks: Any = None, metadata: Any = None
    ) -> Tensor:
        if not isinstance(storage, _Elements):
            raise ValueError("a tensor has no storage")
        if hooks or metadata:
            raise ValueError("a tensor has hooks or is a negative or conjugate view")
        return _strided(storage, offset, size, stride, file_size)

    def typed(
        storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> Tensor:
        if not isinstance(dtype, torch.dtype) or not isinstance(storage, _Elements):
            raise ValueError("a tensor has no type or storage")
        return tensor(_Elements(storage.storage, dtype), offset, size, stride, grad, hooks, metadata)

    return {
        "torch._utils._rebuild_tensor": Function(tensor),
        "torch._utils._rebuild_tensor_v2": Function(tensor),
        "torch._utils._rebuild_tensor_v3": Function(typed),
    }


def _strided(elements: _Elements, offset: Any, size: Any, stride: Any, most_bytes: int) -> Tensor:
    """A view of a storage.

    Raises:
        ValueError: it would reach out of the storage, or be larger than the file by repeating it.
    """
    lists = [list(value) if type(value) in (tuple, list, torch.Size) else None for value in (size, stride)]
    if lists[0] is None or lists[1] is None or len(lists[0]) != len(lists[1]) or len(lists[0]) > _MAX_AXES:
        raise ValueError("sizes and strides of a tensor do not match")
    sizes, strides = lists
    if any(type(number) is not int or number < 0 for number in (offset, *sizes, *strides)):
        raise ValueError("sizes, strides and offset of a tensor must be whole numbers")
    raw, dtype = elements.storage.raw, elements.dtype
    there, last = raw.numel() // dtype.itemsize, sum((n - 1) * s for n, s in zip(sizes, strides))
    count = math.prod(sizes)
    if count == 0:
        # An empty tensor may have any size along other axes.
        return torch.empty(sizes, dtype=dtype)
    if offset + last >= there:
        raise ValueError(f"a tensor of sizes {str(sizes)[:80]} reaches out of its {there} elements")
    if count * dtype.itemsize > most_bytes:
        raise ValueError(f"a tensor of sizes {str(sizes)[:80]} is larger than the file")
    return raw[: there * dtype.itemsize].view(dtype).as_strided(sizes, strides, offset)


# -- names ----------------------------------------------------------------------------------------------------------


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter is no tensor")
    return tensor


def _no_dense_tensor(*_: Any) -> Any:
    raise ValueError("it must hold dense tensors, and nothing derived from them")


def _ordered(pairs: Any = ()) -> OrderedDict:
    if type(pairs) not in (list, tuple) or not all(type(p) in (list, tuple) and len(p) == 2 for p in pairs):
        raise ValueError("an OrderedDict is not made of pairs")
    if not all(is_key(key) for key, _ in pairs):
        raise ValueError("a key is no name or number")
    return OrderedDict(pairs)


def _counted(counts: Any = ()) -> Counter:
    if type(counts) is not dict and counts != ():
        raise ValueError("a Counter is not made of counts")
    return Counter(counts)


def _set(items: Any = ()) -> set:
    if type(items) not in (list, tuple) or not all(map(is_key, items)):
        raise ValueError("a set must hold names and numbers")
    return set(items)


def _latin1(text: Any, encoding: Any = None) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise ValueError("bytes must be written as latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("a complex number is not made of two numbers")
    return complex(real, imaginary)


def _size(sizes: Any = ()) -> torch.Size:
    if type(sizes) not in (tuple, list) or any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError("a size must be made of whole numbers")
    return torch.Size(sizes)


def _device(kind: Any = "cpu", *index: Any) -> torch.device:
    if type(kind) is not str:
        raise ValueError(f"a device is a {type(kind).__name__}")
    return torch.device("cpu")


_NAMES: dict[str, Any] = {
    "collections.OrderedDict": Function(_ordered),
    "collections.Counter": Function(_counted),
    "builtins.set": Function(_set),
    "builtins.bytes": Function(_no_bytes),
    "builtins.complex": Function(_complex),
    "_codecs.encode": Function(_latin1),
    "torch.Size": Function(_size),
    "torch.device": Function(_device),
    "torch._utils._rebuild_parameter": Function(_parameter),
    "torch._utils._rebuild_parameter_with_state": Function(_parameter),
    **{name: Function(_no_dense_tensor) for name in _OTHER_TENSORS},
    "torch.storage.UntypedStorage": _StorageType(torch.uint8),
    **{f"torch.{name}Storage": _StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in _TYPES},
}
