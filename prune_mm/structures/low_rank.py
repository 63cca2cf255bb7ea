"""Structures that make pairs of convolutions (:mod:`prune_mm.structures.pair`), cut them and merge them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prune_mm.structures.base import Structure, index_list, number, register_structure, text
from prune_mm.structures.channel_slice import MAX_CHANNELS
from prune_mm.structures.pair import attach_pair, is_paired, merge_pair_, pair_matrix, why_no_pair


class _OfPair(Structure):
    """What structures of pairs share: the tensors' names."""

    @property
    def weight(self) -> str:
        """Dotted name of W, the kernel of the intermediate channels."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def mixer(self) -> str:
        """Dotted name of the 1x1 kernel that holds A."""
        return f"{self.name}.pair.weight" if self.name else "pair.weight"

    def _move_bias(self, shapes: dict[str, list[int]], behind: bool) -> None:
        inner, outer = (name.removesuffix("weight") + "bias" for name in (self.weight, self.mixer))
        source, target = (inner, outer) if behind else (outer, inner)
        if source in shapes:
            shapes[target] = shapes.pop(source)

    def _conv(self, module: nn.Module) -> nn.Module:
        try:
            return module.get_submodule(self.name)
        except AttributeError as error:
            raise ValueError(f"the network has no module '{self.name}'") from error


@register_structure
@dataclass(frozen=True)
class ConvPair(_OfPair):
    """A convolution that becomes a pair and computes what it did. Stands in a stage before the one that cuts it.

    Applied to a network that has the pair already, it only checks its size: so the same plan serves the network that
    was trained and one that is built from the dense config.

    Attributes:
        name: dotted name of the convolution.
        rank: intermediate channels r: the number of outputs, or of weights of a filter.
        outputs: outputs n.
    """

    kind: ClassVar[str] = "ConvPair"
    attaches: ClassVar[bool] = True
    name: str
    rank: int
    outputs: int

    def apply_mask(self, module: nn.Module) -> None:
        """Nothing to mask."""

    def cuts(self) -> list[tuple[str, int, Tensor]]:
        """Nothing to cut."""
        return []

    def check(self, module: nn.Module) -> None:
        """See :meth:`Structure.check`."""
        conv = self._conv(module)
        paired, reason = is_paired(conv), why_no_pair(conv)
        if reason is not None and not paired:
            raise ValueError(f"'{self.name}' cannot become a pair: {reason}")
        outputs = conv.pair.weight.shape[0] if paired else conv.weight.shape[0]
        ranks = (conv.weight.shape[0],) if paired else (outputs, conv.weight[0].numel())
        if outputs != self.outputs or self.rank not in ranks:
            raise ValueError(
                f"'{self.name}' has {outputs} outputs and can have rank {' or '.join(map(str, ranks))}, "
                f"the plan expects {self.outputs} and {self.rank}"
            )

    def claims(self) -> list[str]:
        """See :meth:`Structure.claims`."""
        return [f"{self.name}.pair"]

    def rewrite(self, module: nn.Module) -> None:
        """Attach the pair."""
        conv = self._conv(module)
        if not is_paired(conv):
            attach_pair(conv, self.rank)

    def reshape(self, shapes: dict[str, list[int]]) -> None:
        """One weight becomes two."""
        if self.weight in shapes and self.mixer not in shapes:
            shapes[self.mixer] = [self.outputs, self.rank, *[1] * (len(shapes[self.weight]) - 2)]
            shapes[self.weight][0] = self.rank
            self._move_bias(shapes, behind=True)

    def place(self, positions: dict[str, int]) -> None:
        """The 1x1 kernel is applied wherever the convolution is."""
        if self.weight in positions:
            positions[self.mixer] = positions[self.weight]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"type": self.kind, "name": self.name, "rank": self.rank, "outputs": self.outputs}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConvPair:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        what = f"{cls.kind} '{text(data['name'], f'{cls.kind}: name')[:80]}'"
        sizes = [number(data[key], 1, MAX_CHANNELS, f"{what}: {key}") for key in ("rank", "outputs")]
        return cls(data["name"], *sizes)


@register_structure
@dataclass(frozen=True)
class LowRank(_OfPair):
    """The intermediate channels of a pair that stay.

    Masked: rows of A that belong to the others are zero, and the filters that make them. Compact: a narrower pair, or
    one convolution again. Outputs are the matter of a :class:`~prune_mm.structures.channel_slice.ChannelSlice` of the
    same stage, whose slots name ``<conv>.pair.weight`` and ``<conv>.pair.bias``.

    Attributes:
        name: dotted name of the convolution.
        keep: intermediate channels that stay, ascending.
        rank: number of intermediate channels before.
        merge: whether the compact form is one convolution; see :func:`merging_is_cheaper`.
    """

    kind: ClassVar[str] = "LowRank"
    name: str
    keep: tuple[int, ...]
    rank: int
    merge: bool = False

    @classmethod
    def from_mask(cls, name: str, mask: Tensor, merge: bool = False) -> LowRank:
        """From a boolean vector over the intermediate channels.

        Raises:
            ValueError: when none would stay.
        """
        keep = tuple(torch.nonzero(mask.cpu()).flatten().tolist())
        if not keep:
            raise ValueError(f"{cls.kind} '{name[:80]}': at least one intermediate channel must stay")
        return cls(name, keep, mask.numel(), merge)

    @property
    def mask(self) -> Tensor:
        """Boolean vector over the intermediate channels."""
        mask = torch.zeros(self.rank, dtype=torch.bool)
        mask[list(self.keep)] = True
        return mask

    def apply_mask(self, module: nn.Module) -> None:
        """Zero rows of A and filters of intermediate channels that do not stay, in place.

        Raises:
            ValueError: naming the layer, when ``module`` is not the network the structure was made for.
        """
        self.check(module)
        conv = self._conv(module)
        dead = (~self.mask).to(conv.weight.device)
        conv.weight.data[dead] = 0
        pair_matrix(conv.pair.weight.data)[dead] = 0

    def cuts(self) -> list[tuple[str, int, Tensor]]:
        """Filters of W and rows of A."""
        return [(self.weight, 0, self.mask), (self.mixer, 1, self.mask)]

    def check(self, module: nn.Module) -> None:
        """See :meth:`Structure.check`."""
        conv = self._conv(module)
        if not is_paired(conv):
            raise ValueError(f"'{self.name}' is no pair; a stage before must make it one")
        if conv.groups > 1 or conv.pair.groups > 1:
            raise ValueError(f"the pair '{self.name}' was divided into groups")
        if conv.weight.shape[0] != self.rank:
            raise ValueError(f"the pair '{self.name}' has rank {conv.weight.shape[0]}, the plan expects {self.rank}")

    def claims(self) -> list[str]:
        """A pair is merged once."""
        return [f"{self.name}.pair"] if self.merge else []

    def rewrite(self, module: nn.Module) -> None:
        """Merge what is left of the pair, where that was decided."""
        if self.merge:
            merge_pair_(self._conv(module))

    def reshape(self, shapes: dict[str, list[int]]) -> None:
        """Two weights become one, where that was decided."""
        if self.merge and self.weight in shapes and self.mixer in shapes:
            shapes[self.weight][0] = shapes.pop(self.mixer)[0]
            self._move_bias(shapes, behind=False)

    def place(self, positions: dict[str, int]) -> None:
        """A merged 1x1 kernel is applied nowhere."""
        if self.merge:
            positions.pop(self.mixer, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = {"type": self.kind, "name": self.name, "rank": self.rank, "keep": list(self.keep)}
        return data | {"merge": self.merge}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LowRank:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        what = f"{cls.kind} '{text(data['name'], f'{cls.kind}: name')[:80]}'"
        rank = number(data["rank"], 1, MAX_CHANNELS, f"{what}: rank")
        keep = index_list(data["keep"], rank, f"{what}: keep")
        if not keep:
            raise ValueError(f"{what}: keep is empty, at least one intermediate channel must stay")
        if type(data["merge"]) is not bool:
            raise ValueError(f"{what}: merge must be true or false, got {data['merge']!r:.80}")
        return cls(data["name"], keep, rank, data["merge"])
