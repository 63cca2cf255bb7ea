"""A structure that keeps some N x 1 blocks of a weight, and drops the rest."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from prune_mm.structures.base import Structure, number, permutation, register_structure, text
from prune_mm.structures.block_layer import BlockSparseLayer
from prune_mm.structures.block_layers import BlockSparseConv2d, BlockSparseLinear
from prune_mm.structures.channel_slice import MAX_CHANNELS
from prune_mm.structures.rewrite import _replace

__all__ = ["BlockSparse", "BlockSparseConv2d", "BlockSparseLayer", "BlockSparseLinear"]


@register_structure
@dataclass(frozen=True)
class BlockSparse(Structure):
    """A convolution or linear layer of which only some N x 1 blocks stay.

    Row block j is made of the filters ``out_perm[j * n : (j + 1) * n]``; the last one may have fewer. A block is the
    kernels of one row block that read one input channel.

    Masked: the weights of all other blocks are zero.
    Compact: a :class:`BlockSparseConv2d` or :class:`BlockSparseLinear` in the layer's place, with the parameters
    ``<name>.values``, perhaps ``<name>.tail_values``, and ``<name>.bias`` as it was. Where the rest of the stage
    (:class:`~prune_mm.structures.channel_order.ChannelOrder`) brings the filters of each row block together, its
    rows are the outputs in order: the weight is 1xN in memory. Elsewhere the layer holds the output of each row, and
    writes it there at no cost.

    For exact MACs, :meth:`reshape` gives ``<name>.weight`` one axis: the number of values.

    Attributes:
        name: dotted name of an ``nn.Conv2d`` with one group, or an ``nn.Linear``.
        n: filters of a row block.
        inputs: input channels.
        out_perm: filters in the order of the row blocks.
        kept: for each row block, for each input channel one bit: whether the block stays (``numpy.packbits``).
        out_order: how the rest of the stage orders the outputs, None: as they are.
        in_order: how the rest of the stage orders the inputs, None: as they are.
    """

    kind: ClassVar[str] = "BlockSparse"
    name: str
    n: int
    inputs: int
    out_perm: tuple[int, ...]
    kept: bytes = field(repr=False)
    out_order: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    in_order: tuple[int, ...] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_kept(
        cls, name: str, n: int, outputs: int, kept: Tensor, out_perm: Sequence[int] | Tensor | None = None
    ) -> BlockSparse:
        """From the blocks that stay.

        Args:
            name: dotted name of the layer.
            n: filters of a row block.
            outputs: filters O.
            kept: boolean (ceil(O / N), I).
            out_perm: filters in the order of the row blocks; None: as they are.

        Raises:
            ValueError: naming the layer, when a size does not fit or `out_perm` is no permutation.
        """
        what = f"{cls.kind} '{name[:80]}'"
        number(n, 1, MAX_CHANNELS, f"{what}: n")
        number(outputs, 1, MAX_CHANNELS, f"{what}: outputs")
        if kept.ndim != 2 or kept.shape[0] != -(-outputs // n) or kept.shape[1] < 1:
            expected = f"({-(-outputs // n)}, inputs)"
            raise ValueError(f"{what}: kept must have shape {expected}, got {tuple(kept.shape)}")
        order = range(outputs) if out_perm is None else out_perm
        order = order.tolist() if isinstance(order, Tensor) else [int(channel) for channel in order]
        perm = permutation(order, f"{what}: out_perm")
        if len(perm) != outputs:
            raise ValueError(f"{what}: out_perm has {len(perm)} filters of {outputs}")
        bits = np.packbits(kept.cpu().bool().numpy()).tobytes()
        return cls(name, n, kept.shape[1], perm, bits)

    @classmethod
    def from_mask(cls, name: str, n: int, mask: Tensor, out_perm: Sequence[int] | Tensor | None = None) -> BlockSparse:
        """From a mask of the weight (O, I, ...) that is 1xN in the order `out_perm`.

        Raises:
            ValueError: naming the layer, when it is not.
        """
        what = f"{cls.kind} '{name[:80]}'"
        kernels = mask.cpu().bool().reshape(*mask.shape[:2], -1)
        outputs = kernels.shape[0]
        order = torch.arange(outputs) if out_perm is None else torch.as_tensor(out_perm).long().cpu()
        permutation(order.tolist(), f"{what}: out_perm")
        number(n, 1, MAX_CHANNELS, f"{what}: n")
        found = cls.from_kept(name, n, outputs, kernels[order[::n], :, 0], order)
        if not torch.equal(found.mask().unsqueeze(2).expand_as(kernels), kernels):
            raise ValueError(f"{what}: the mask is not made of whole blocks of {n} filters in the order out_perm")
        return found

    @property
    def outputs(self) -> int:
        """Filters O."""
        return len(self.out_perm)

    @property
    def weight(self) -> str:
        """Dotted name of the weight."""
        return f"{self.name}.weight"

    def blocks(self) -> np.ndarray:
        """Boolean (ceil(O / N), I): the blocks that stay."""
        rows = -(-self.outputs // self.n)
        bits = np.unpackbits(np.frombuffer(self.kept, np.uint8), count=rows * self.inputs)
        return bits.reshape(rows, self.inputs).astype(bool)

    def mask(self) -> Tensor:
        """Boolean (O, I), filters as they are: the kernels that stay."""
        mask = np.empty((self.outputs, self.inputs), dtype=bool)
        mask[np.array(self.out_perm)] = self.blocks().repeat(self.n, axis=0)[: self.outputs]
        return torch.from_numpy(mask)

    def apply_mask(self, module: nn.Module) -> None:
        """Zero the weights of the other blocks in place.

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
        return [self.weight, f"{self.name}.bias"]

    def within(
        self, cuts: dict[tuple[str, int], Tensor], orders: dict[tuple[str, int], Tensor] | None = None
    ) -> BlockSparse:
        """The orders of its rows and columns.

        Raises:
            ValueError: when the same stage also cuts the layer.
        """
        if (self.weight, 0) in cuts or (self.weight, 1) in cuts:
            raise ValueError(f"damaged plan: '{self.name}' is cut and made block-sparse in one stage")
        rows, columns = ((orders or {}).get((self.weight, axis)) for axis in (0, 1))
        if rows is None and columns is None:
            return self
        return replace(
            self,
            out_order=None if rows is None else tuple(rows.tolist()),
            in_order=None if columns is None else tuple(columns.tolist()),
        )

    def check(self, module: nn.Module) -> None:
        """See :meth:`Structure.check`."""
        try:
            layer = module.get_submodule(self.name)
        except AttributeError as error:
            raise ValueError(f"the network has no module '{self.name}'") from error
        if layer is module:
            raise ValueError(f"{self.kind}: the network itself cannot be replaced, only a layer in it")
        for known in (nn.Conv2d, nn.Linear):
            # mmcv's wrappers of the same name compute the same; other forwards do something else with the weight.
            if isinstance(layer, known) and known.__name__ in (type(layer).__name__, _owner_of_forward(layer)):
                break
        else:
            raise ValueError(f"'{self.name}' is a {type(layer).__name__}, the plan expects an nn.Conv2d or nn.Linear")
        found = (*layer.weight.shape[:2], getattr(layer, "groups", 1))
        expected = (self.outputs, self.inputs, 1)
        if found != expected:
            raise ValueError(f"'{self.name}' has (outputs, inputs, groups) {found}, the plan expects {expected}")

    def arrangement(self) -> tuple[np.ndarray, np.ndarray | None]:
        """How the compact form lies in memory.

        Returns:
            Blocks that stay, boolean (ceil(O / N), I), columns as the rest of the stage orders them; the output that
            each row makes, None where they are in order.
        """
        kept, rows = self.blocks(), np.array(self.out_perm)
        if self.in_order is not None:
            kept = kept[:, np.array(self.in_order)]
        if self.out_order is not None:
            position = np.empty(self.outputs, dtype=np.int64)
            position[np.array(self.out_order)] = np.arange(self.outputs)
            rows = position[rows]
        # Neither the filters of a row block nor the row blocks themselves need any order.
        full = self.outputs // self.n
        blocks, rest = np.sort(rows[: full * self.n].reshape(full, self.n), axis=1), np.sort(rows[full * self.n :])
        order = np.argsort(blocks[:, 0]) if full else np.arange(0)
        rows = np.concatenate([blocks[order].ravel(), rest])
        kept = np.concatenate([kept[:full][order], kept[full:]])
        return kept, None if np.array_equal(rows, np.arange(rows.size)) else rows

    def rewrite(self, module: nn.Module) -> None:
        """Put the block-sparse layer into the place of the dense one."""
        layer = module.get_submodule(self.name)
        kept, rows = self.arrangement()
        blocks = torch.from_numpy(kept).to(layer.weight.device)
        index = None if rows is None else torch.from_numpy(rows).to(layer.weight.device)
        if isinstance(layer, nn.Conv2d):
            new: BlockSparseLayer = BlockSparseConv2d.from_conv(layer, self.n, blocks, index)
        else:
            new = BlockSparseLinear.from_linear(layer, self.n, blocks, index)
        _inherit(new, layer)
        _replace(module, layer, new)

    def reshape(self, shapes: dict[str, list[int]]) -> None:
        """All that is left of the weight is its values."""
        if self.weight in shapes:
            per_row = self.blocks().sum(1)
            heights = np.minimum(self.n, self.outputs - self.n * np.arange(per_row.size))
            shapes[self.weight] = [int((per_row * heights).sum()) * int(np.prod(shapes[self.weight][2:]))]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the bits in base64."""
        natural = self.out_perm == tuple(range(self.outputs))
        return {
            "type": self.kind,
            "name": self.name,
            "n": self.n,
            "outputs": self.outputs,
            "inputs": self.inputs,
            "out_perm": None if natural else list(self.out_perm),
            "kept": base64.b64encode(self.kept).decode(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockSparse:
        """Read plain data back; see :meth:`Structure.from_dict`."""
        what = f"{cls.kind} '{text(data['name'], f'{cls.kind}: name')[:80]}'"
        n = number(data["n"], 1, MAX_CHANNELS, f"{what}: n")
        outputs = number(data["outputs"], 1, MAX_CHANNELS, f"{what}: outputs")
        inputs = number(data["inputs"], 1, MAX_CHANNELS, f"{what}: inputs")
        perm = tuple(range(outputs))
        if data["out_perm"] is not None:
            perm = permutation(data["out_perm"], f"{what}: out_perm")
        if len(perm) != outputs:
            raise ValueError(f"{what}: out_perm has {len(perm)} filters of {outputs}")
        try:
            kept = base64.b64decode(text(data["kept"], f"{what}: kept"), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{what}: kept must be base64 text ({error})") from error
        bits = -(-outputs // n) * inputs
        if len(kept) != -(-bits // 8) or (bits % 8 and kept[-1] & (0xFF >> bits % 8)):
            raise ValueError(f"{what}: kept must hold one bit for each of {bits} blocks, and zeros behind them")
        return cls(data["name"], n, inputs, perm, kept)


def _owner_of_forward(layer: nn.Module) -> str:
    """Name of the class whose forward the layer runs."""
    return next(cls.__name__ for cls in type(layer).__mro__ if "forward" in vars(cls))


def _inherit(new: nn.Module, old: nn.Module) -> None:
    """Take over what else hangs on a layer: its forward hooks, and the children, buffers and attributes they need."""
    for name, child in old._modules.items():
        new.add_module(name, child)
    for name, buffer in old._buffers.items():
        new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for key, value in vars(old).items():
        # Hooks of loading are about tensors of the dense layer, which are gone.
        if key.startswith("_forward") or not (key in vars(new) or "state_dict" in key):
            vars(new)[key] = value
