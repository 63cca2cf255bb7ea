"""Where the channels of a group sit in the parameters of a network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Role = Literal["out", "bias", "in", "depthwise", "scale", "shift", "mean", "var"]

#: Roles whose entries are set to zero while a channel is dead. Running statistics are only cut.
MASKED_ROLES: frozenset[str] = frozenset({"out", "bias", "in", "depthwise", "scale", "shift"})


@dataclass(frozen=True)
class Slot:
    """One axis of one parameter (or buffer) along which channels of a group lie.

    Attributes:
        tensor: Dotted name of the parameter or buffer, relative to the traced module.
        axis: The axis of the tensor.
        channels: For each index along that axis the channel of the group it belongs to, or -1 where the
            index belongs to another group (a consumer of a concatenation) or to no channel.
        role: What the entries do: ``out`` rows of the weight that makes the channels, ``in`` columns of a
            weight that reads them, ``bias``, ``depthwise`` weights, ``scale``/``shift`` of a norm or of an
            elementwise parameter, ``mean``/``var`` running statistics.
    """

    tensor: str
    axis: int
    channels: tuple[int, ...]
    role: Role

    @property
    def module(self) -> str:
        """Dotted name of the module that owns the tensor (empty for the traced module itself)."""
        return self.tensor.rpartition(".")[0]

    @cached_property
    def _index(self) -> Tensor:
        return torch.from_numpy(np.array(self.channels, dtype=np.int64))

    def kept(self, keep: Tensor) -> Tensor:
        """Boolean vector over the axis: which indices stay when only the channels in ``keep`` live.

        Args:
            keep: Boolean tensor with one entry per channel of the group.
        """
        index = self._index.to(keep.device)
        return keep[index.clamp(min=0)] | (index < 0)


def get_tensor(root: nn.Module, name: str) -> Tensor:
    """The parameter or buffer ``name`` of ``root``.

    Raises:
        AttributeError: if there is no such module or tensor.
    """
    owner, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(owner), attribute)


def set_tensor(root: nn.Module, name: str, value: Tensor) -> None:
    """Replace the parameter or buffer ``name`` by ``value`` (not copied), keeping its kind and ``requires_grad``."""
    owner, _, attribute = name.rpartition(".")
    module = root.get_submodule(owner)
    old = getattr(module, attribute)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value.detach(), requires_grad=old.requires_grad)
    setattr(module, attribute, value)


def along_axis(vector: Tensor, axis: int, ndim: int) -> Tensor:
    """View a 1-D ``vector`` so that it broadcasts along ``axis`` of an ``ndim``-dimensional tensor."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.view(shape)
