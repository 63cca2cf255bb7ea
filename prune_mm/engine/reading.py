"""Training checkpoints as data: what MMEngine saves is read, what would run code is refused."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from prune_mm.export.pickled import Built, Function
from prune_mm.export.torch_file import CodeInFile, read_torch_file
from prune_mm.structures.json_text import one_line

#: Set to 1 to load checkpoints by pickle, which runs whatever code they hold.
TRUST = "PRUNE_MM_TRUST_CHECKPOINTS"
#: NumPy types that hold plain numbers or text.
_PLAIN_TYPE = re.compile(r"[biufc]\d{1,2}|[SU]\d{1,6}")


def read_checkpoint(path: str | os.PathLike) -> dict:
    """What a checkpoint holds, on the CPU.

    Plain values, tensors, NumPy numbers and arrays, and MMEngine's ``HistoryBuffer`` are read; nothing else is, unless
    the environment variable ``PRUNE_MM_TRUST_CHECKPOINTS`` is 1.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: one line naming the file, when it is damaged, no checkpoint, or holds more than data.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at '{path}'")
    found = _trusted(path) if os.environ.get(TRUST) == "1" else _data(path)
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds a {type(found).__name__}, not a checkpoint")
    return found


def _data(path: Path) -> Any:
    try:
        return read_torch_file(path, _NAMES)
    except CodeInFile as error:
        raise ValueError(
            f"'{path}' is not loaded: {one_line(error)}, and reading it could run code; set {TRUST}=1 if you trust "
            "where it comes from"
        ) from error
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged or not a checkpoint: {one_line(error)}") from error


def _trusted(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle may raise anything
        raise ValueError(f"'{path}' is damaged or not a checkpoint: {type(error).__name__}") from error


def guard_mmengine() -> None:
    """Let MMEngine read local files (``load_from``, ``--resume``, ``Pretrained``) by :func:`read_checkpoint`.

    MMEngine itself tries ``weights_only=True`` and, where that fails, runs what the file holds.
    """
    CheckpointLoader.register_scheme("", load_from_local, force=True)


# The name, without its first ten letters, is what MMEngine logs.
def load_from_local(filename: str, map_location: Any = None) -> dict:
    """Loader of MMEngine for local files; see :func:`read_checkpoint`."""
    checkpoint = read_checkpoint(filename)
    kept = map_location is None or callable(map_location) or isinstance(map_location, dict)
    return checkpoint if kept else _moved(checkpoint, torch.device(map_location))


def _moved(value: Any, device: torch.device) -> Any:
    """The same with all tensors on a device; tables and lists are changed in place."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _moved(item, device)
    elif isinstance(value, list):
        value[:] = [_moved(item, device) for item in value]
    elif type(value) is tuple:
        return tuple(_moved(item, device) for item in value)
    return value


# -- what MMEngine's checkpoints hold besides tensors and plain values ----------------------------------------------


class _Type(Built):
    """A NumPy type: made by its name, completed by its byte order."""

    def __init__(self, name: Any, *_: Any) -> None:
        if type(name) is not str or not _PLAIN_TYPE.fullmatch(name):
            raise ValueError(f"the NumPy type {name!r:.40} is no plain one")
        self.name, self.order = name, "|"

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("a NumPy type has no byte order")
        if any(part is not None for part in state[2:5]):
            raise ValueError("a NumPy type has fields")
        self.order = state[1]

    @property
    def value(self) -> np.dtype:  # type: ignore[override]
        return np.dtype(self.name).newbyteorder(self.order)


class _Array(Built):
    """A NumPy array: made empty, completed by shape, type and bytes."""

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("a NumPy array has no shape, type and bytes")
        _, shape, dtype, columns_first, content = state
        sizes = shape if type(shape) is tuple else (-1,)
        if len(sizes) > 32 or any(type(n) is not int or n < 0 for n in sizes) or type(columns_first) is not bool:
            raise ValueError("a NumPy array has an impossible shape")
        flat = _from_bytes(dtype, content, math.prod(sizes))
        self.value = flat.reshape(sizes, order="F" if columns_first else "C")


def _from_bytes(dtype: Any, content: Any, count: int) -> np.ndarray:
    if not isinstance(dtype, _Type) or type(content) is not bytes:
        raise ValueError("a NumPy array is not made of a type and bytes")
    found = dtype.value
    if len(content) != count * found.itemsize:
        raise ValueError(f"a NumPy array of {count} elements cannot have {len(content)} bytes")
    return np.frombuffer(content, found).copy() if content else np.empty(count, found)


class _History(Built):
    """MMEngine's record of a logged number. The methods it wants to register are left out: MMEngine has its own."""

    def build(self, state: Any) -> None:
        if type(state) is not dict or type(state.get("max_length")) is not int or state["max_length"] < 1:
            raise ValueError("a HistoryBuffer has no length")
        parts = []
        for key in ("_log_history", "_count_history"):
            part = getattr(state.get(key), "value", None)
            if not isinstance(part, np.ndarray) or part.ndim != 1 or part.dtype.kind not in "biuf":
                raise ValueError("a HistoryBuffer is not made of numbers")
            parts.append(part)
        if len(parts[0]) != len(parts[1]):
            raise ValueError("a HistoryBuffer is not made of as many numbers as counts")
        self.value = HistoryBuffer(max_length=state["max_length"])
        self.value._log_history, self.value._count_history = parts


def _scalar(dtype: Any, content: Any) -> np.generic:
    return _from_bytes(dtype, content, 1)[0]


def _made(kind: type[Built]) -> Function:
    return Function(lambda *_: kind())


_HISTORY = _made(_History)


def _method(owner: Any, name: Any) -> None:
    """``getattr`` stands only for the methods that a HistoryBuffer registers, which are left out."""
    if owner is not _HISTORY or type(name) is not str:
        raise ValueError("it looks something up by getattr")


_NAMES: dict[str, Any] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _HISTORY,
    "builtins.getattr": Function(_method),
    "numpy.dtype": Function(_Type),
    "numpy.ndarray": Function(_Array),
    **{f"numpy.{core}.multiarray.{name}": what
       for core in ("core", "_core")
       for name, what in (("scalar", Function(_scalar)), ("_reconstruct", _made(_Array)))},
}  # fmt: skip
