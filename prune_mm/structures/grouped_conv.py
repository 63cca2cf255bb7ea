"""A structure that turns a convolution into gather, grouped convolution, gather."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from prune_mm.structures.base import Structure, number, permutation, register_structure, text
from prune_mm.structures.channel_slice import MAX_CHANNELS
from prune_mm.structures.rewrite import gather_around
from prune_mm.structures.slots import set_tensor


@register_structure
@dataclass(frozen=True)
class GroupedConv(Structure):
    """A convolution whose outputs and inputs fall into groups that see nothing of each other.

    In the order ``weight[out_perm][:, in_perm]`` the kernels that stay form ``groups`` equal blocks on the diagonal.
    A convolution that has ``base`` groups already is divided inside each of them.

    Masked: all other kernels are zero.
    Compact: a convolution with ``groups`` groups. Its rows are in the order of the blocks, so inputs are gathered
    before it and outputs put back behind it, unless the order that the rest of the stage gives to its neighbours
    (:class:`~prune_mm.structures.channel_order.ChannelOrder`) makes that unnecessary.

    Attributes:
        name: dotted name of the ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        groups: groups of the compact form, a multiple of ``base``.
        base: groups before.
        out_perm: output channels in the order of the blocks.
        in_perm: input channels in the order of the blocks.
        out_order: how the rest of the stage orders the outputs, None: as they are.
        in_order: how the rest of the stage orders the inputs, None: as they are.
    """

    kind: ClassVar[str] = "GroupedConv"
    name: str
    groups: int
    base: int
    out_perm: tuple[int, ...]
    in_perm: tuple[int, ...]
    out_order: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    in_order: tuple[int, ...] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_perms(
        cls, name: str, groups: int, out_perm: Sequence[int] | Tensor, in_perm: Sequence[int] | Tensor, base: int = 1
    ) -> GroupedConv:
        """From two permutations.

        Raises:
            ValueError: naming the layer, when they are no permutations, leave their base group, or are not divisible.
        """
        what = f"{cls.kind} '{name[:80]}'"
        lists = [perm.tolist() if isinstance(perm, Tensor) else [int(c) for c in perm] for perm in (out_perm, in_perm)]
        number(base, 1, MAX_CHANNELS, f"{what}: base")
        number(groups, 1, MAX_CHANNELS, f"{what}: groups")
        if groups % base:
            raise ValueError(f"{what}: groups={groups} must be a multiple of the {base} groups it has")
        perms = []
        for noun, perm in zip(("out_perm", "in_perm"), lists):
            values = permutation(perm, f"{what}: {noun}")
            if len(values) % groups:
                raise ValueError(f"{what}: {len(values)} channels of {noun} are not divisible by groups={groups}")
            array, width = np.array(values), len(values) // base
            if (array // width != np.arange(array.size) // width).any():
                raise ValueError(f"{what}: {noun} moves channels between the {base} groups the layer has")
            perms.append(values)
        return cls(name, groups, base, perms[0], perms[1])

    @property
    def weight(self) -> str:
        """Dotted name of the weight."""
        return f"{self.name}.weight" if self.name else "weight"

    def mask(self) -> Tensor:
        """Boolean ``(outputs, inputs / base)``: the kernels that stay."""
        rows, columns = self.blocks()
        per_base = columns.reshape(self.base, -1).repeat(len(self.out_perm) // self.base, axis=0)
        return torch.from_numpy(rows[:, None] == per_base)

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """The block that each output and each input channel belongs to."""
        found = []
        for perm in (self.out_perm, self.in_perm):
            blocks = np.empty(len(perm), dtype=np.int64)
            blocks[np.array(perm)] = np.arange(len(perm)) // (len(perm) // self.groups)
            found.append(blocks)
        return found[0], found[1]

    def apply_mask(self, module: nn.Module) -> None:
        """Zero the kernels between groups in place.

        Raises:
            ValueError: naming the layer, when ``module`` is not the network the structure was made for.
        """
        self.check(module)
        weight = module.get_submodule(self.name).weight
        mask = self.mask()
        weight.data.mul_(mask.to(weight).reshape(*mask.shape, *[1] * (weight.ndim - 2)))

    def cuts(self) -> list[tuple[str, int, Tensor]]:
        """Nothing is left out along a whole axis; see :meth:`rewrite`."""
        return []

    def claims(self) -> list[str]:
        """See :meth:`Structure.claims`."""
        return [self.weight, self.weight.removesuffix("weight") + "bias"]

    def within(
        self, cuts: dict[tuple[str, int], Tensor], orders: dict[tuple[str, int], Tensor] | None = None
    ) -> GroupedConv:
        """The orders of its rows and columns.

        Raises:
            ValueError: when the same stage also cuts the layer.
        """
        if (self.weight, 0) in cuts or (self.weight, 1) in cuts:
            raise ValueError(f"damaged plan: '{self.name}' is cut and divided into groups in one stage")
        found = [(orders or {}).get((self.weight, axis)) for axis in (0, 1)]
        if found[0] is None and found[1] is None:
            return self
        per_group = None if found[1] is None else found[1].tolist()
        width = len(self.in_perm) // self.base
        columns = per_group and tuple(g * width + offset for g in range(self.base) for offset in per_group)
        return replace(self, out_order=None if found[0] is None else tuple(found[0].tolist()), in_order=columns or None)

    def check(self, module: nn.Module) -> None:
        """See :meth:`Structure.check`."""
        try:
            conv = module.get_submodule(self.name)
        except AttributeError as error:
            raise ValueError(f"the network has no module '{self.name}'") from error
        if not isinstance(conv, nn.modules.conv._ConvNd) or conv.transposed:
            raise ValueError(f"'{self.name}' is a {type(conv).__name__}, the plan expects a convolution")
        found = (conv.out_channels, conv.in_channels, conv.groups)
        expected = (len(self.out_perm), len(self.in_perm), self.base)
        if found != expected:
            raise ValueError(f"'{self.name}' has (outputs, inputs, groups) {found}, the plan expects {expected}")

    def arrangement(self) -> Arrangement:
        """Rows, columns and gathers of the compact form."""
        return arrange(*self._lying(), self.groups)

    def sequences(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """In which order the blocks of outputs and of inputs lie; None where their channels are mixed."""
        outputs, inputs = self._lying()
        return block_sequence(outputs, self.groups), block_sequence(inputs, self.groups)

    def gathers(self) -> int:
        """How many gathers (0 to 2) the compact form needs."""
        outputs, inputs = self.sequences()
        mixed = (outputs is None) + (inputs is None)
        return mixed if mixed else int(outputs != inputs)

    def _lying(self) -> tuple[np.ndarray, np.ndarray]:
        """The block of each output and input, as the rest of the stage orders them."""
        outputs, inputs = self.blocks()
        return (
            outputs if self.out_order is None else outputs[np.array(self.out_order)],
            inputs if self.in_order is None else inputs[np.array(self.in_order)],
        )

    def rewrite(self, module: nn.Module) -> None:
        """Replace the weight by the blocks, and gather around the layer where needed."""
        conv, found = module.get_submodule(self.name), self.arrangement()
        weight = conv.weight.detach()
        width = weight.shape[1] // (self.groups // self.base)
        rows = torch.from_numpy(found.rows).to(weight.device)
        # Columns of a row's own block, as offsets inside the group the layer had.
        columns = torch.from_numpy(found.columns.reshape(self.groups, -1) % weight.shape[1]).to(weight.device)
        per_row = columns.repeat_interleave(rows.numel() // self.groups, dim=0)
        index = per_row.reshape(*per_row.shape, *[1] * (weight.ndim - 2)).expand(-1, -1, *weight.shape[2:])
        assert per_row.shape[1] == width
        set_tensor(module, self.weight, weight[rows].gather(1, index))
        if conv.bias is not None:
            set_tensor(module, self.weight.removesuffix("weight") + "bias", conv.bias.detach()[rows])
        conv.groups = self.groups
        gather_around(conv, found.gather_in, found.gather_out)

    def reshape(self, shapes: dict[str, list[int]]) -> None:
        """Every row keeps the columns of its group.

        Raises:
            ValueError: naming the weight, when it is not the one the structure was made for.
        """
        shape = shapes.get(self.weight)
        if shape is None:
            return
        expected = [len(self.out_perm), len(self.in_perm) // self.base]
        if shape[:2] != expected:
            found = tuple(shape)
            raise ValueError(f"'{self.weight}' has shape {found}, the plan expects it to begin with {tuple(expected)}")
        shape[1] //= self.groups // self.base

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "type": self.kind,
            "name": self.name,
            "groups": self.groups,
            "base": self.base,
            "out_perm": list(self.out_perm),
            "in_perm": list(self.in_perm),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GroupedConv:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        name = text(data["name"], f"{cls.kind}: name")
        for key in ("out_perm", "in_perm"):
            permutation(data[key], f"{cls.kind} '{name[:80]}': {key}")
        return cls.from_perms(name, data["groups"], data["out_perm"], data["in_perm"], data["base"])


@dataclass(frozen=True)
class Arrangement:
    """How a grouped convolution lies in memory.

    Attributes:
        rows: for each row the present index of the output it makes.
        columns: inputs in the order of the groups, present indices.
        gather_in: index that puts the inputs into the order of ``columns``, None where they are in it.
        gather_out: index that puts the outputs back, None where they need not be.
    """

    rows: np.ndarray
    columns: np.ndarray
    gather_in: np.ndarray | None
    gather_out: np.ndarray | None


def arrange(outputs: np.ndarray, inputs: np.ndarray, groups: int) -> Arrangement:
    """Lay out the blocks of a grouped convolution so that as few gathers as possible remain.

    Blocks may come in any order as long as inputs and outputs agree, and channels of a block in any order. So where
    the inputs (outputs) already lie block by block they need no gather, and where both do and in different orders,
    the narrower side is gathered.

    Args:
        outputs: block of each output channel, ``(O,)``, as they lie behind the layer.
        inputs: block of each input channel, ``(I,)``, as they lie before it.
        groups: number of blocks.
    """
    out_sequence, in_sequence = block_sequence(outputs, groups), block_sequence(inputs, groups)
    both = out_sequence is not None and in_sequence is not None
    if both and out_sequence != in_sequence:
        if inputs.size > outputs.size:
            out_sequence = None
        else:
            in_sequence = None
    sequence = in_sequence or out_sequence or tuple(range(groups))
    rank = np.empty(groups, dtype=np.int64)
    rank[list(sequence)] = np.arange(groups)
    rows, columns = (np.argsort(rank[blocks], kind="stable") for blocks in (outputs, inputs))
    back = np.empty_like(rows)
    back[rows] = np.arange(rows.size)
    identity = [np.array_equal(index, np.arange(index.size)) for index in (columns, back)]
    return Arrangement(rows, columns, None if identity[0] else columns, None if identity[1] else back)


def block_sequence(blocks: np.ndarray, groups: int) -> tuple[int, ...] | None:
    """The order of the blocks when channels lie block by block, else None."""
    chunks = blocks.reshape(groups, -1)
    return tuple(chunks[:, 0].tolist()) if bool((chunks == chunks[:, :1]).all()) else None


def common_divisors(outputs: int, inputs: int) -> list[int]:
    """All numbers of groups that divide both channel counts, ascending."""
    shared = math.gcd(outputs, inputs)
    return [divisor for divisor in range(1, shared + 1) if shared % divisor == 0]
