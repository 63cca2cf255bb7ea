"""Small questions about tensors in nests, and about ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def tensors_of(outputs: Any) -> list[Tensor]:
    """All tensors that a module returns, in containers and in attributes of objects, each once."""
    found: dict[int, Tensor] = {}
    visited: set[int] = set()
    waiting = [outputs]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            found.setdefault(id(item), item)
        elif id(item) not in visited and not isinstance(item, (str, bytes, type, nn.Module)):
            visited.add(id(item))
            waiting.extend(reversed(_parts(item)))
    return list(found.values())


def _parts(item: Any) -> list[Any]:
    parts: list[Any] = []
    if isinstance(item, Mapping):
        parts += item.values()
    elif isinstance(item, (list, tuple, set, frozenset)):
        parts += item
    parts += getattr(item, "__dict__", {}).values()
    slots = getattr(type(item), "__slots__", ())
    for slot in (slots,) if isinstance(slots, str) else slots:
        parts.append(getattr(item, slot, None))
    return parts


def distinct(ids: Tensor) -> Tensor:
    """The different non-zero ids of a shadow, sorted."""
    for dim in range(ids.ndim):
        if ids.shape[dim] > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    ids = torch.unique(ids)
    return ids[ids > 0]


def varies(ids: Tensor, dim: int) -> bool:
    """Whether different ids follow each other along ``dim``."""
    if ids.shape[dim] <= 1 or ids.stride(dim) == 0:
        return False
    return bool((ids != ids.narrow(dim, 0, 1)).any())
