"""A convolution and a linear layer whose weight is N x 1 block-sparse."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_mm.structures.block_layer import BlockSparseLayer, scratch

#: Mode of ``torch.nn.functional.pad`` for each ``padding_mode`` of a convolution.
_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}

#: The kernel position of a linear layer.
_ONE_TAP = array("q", [0])


class _Geometry(NamedTuple):
    """How a convolution reads and writes memory for one size of image.

    The input is padded, and split into one image for each position modulo the stride. In there an output's position
    is one number, and a kernel position a constant distance, so there is no need to unfold. The price is that rows of
    outputs are as wide as rows of inputs.
    """

    padded: bool
    pads: tuple[int, int, int, int]
    extra: tuple[int, int]
    height: int
    width: int
    row: int
    plane: int
    taps: array
    address: int


@lru_cache(maxsize=1024)
def _geometry(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], pads: tuple, dilation: tuple[int, int]
) -> _Geometry:
    padded = (size[0] + pads[2] + pads[3], size[1] + pads[0] + pads[1])
    out = [(p - d * (k - 1) - 1) // s + 1 for p, k, s, d in zip(padded, kernel, stride, dilation)]
    if kernel == (1, 1):
        return _Geometry(any(pads), pads, (0, 0), *out, out[1], out[0] * out[1], _ONE_TAP, _ONE_TAP.buffer_info()[0])
    extra = [-p % s for p, s in zip(padded, stride)]
    rows, row = ((p + e) // s for p, e, s in zip(padded, extra, stride))
    taps = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            a, b = i * dilation[0], j * dilation[1]
            phase = (a % stride[0]) * stride[1] + b % stride[1]
            taps.append(4 * (phase * rows * row + a // stride[0] * row + b // stride[1]))
    plane = stride[0] * stride[1] * rows * row
    flat = array("q", taps)
    return _Geometry(any(pads) or any(extra), pads, tuple(extra), *out, row, plane, flat, flat.buffer_info()[0])


class BlockSparseConv2d(BlockSparseLayer):
    """A convolution whose weight is N x 1 block-sparse; see :class:`BlockSparseLayer`.

    On CPU, in float32 and without gradients it runs a generated kernel (``block_kernels``), elsewhere the reference.

    Args:
        in_channels: inputs I.
        out_channels: outputs O.
        kernel_size: one number or two.
        n: outputs of a row block.
        blocks: how many blocks of N rows there are.
        tail_blocks: how many blocks of O mod N rows there are.
        stride: as in ``nn.Conv2d``.
        padding: as in ``nn.Conv2d``.
        dilation: as in ``nn.Conv2d``.
        padding_mode: as in ``nn.Conv2d``.
        bias: whether there is a bias.
        permuted: whether rows may be other outputs than their number.
        device: of all tensors.
        dtype: of values and bias.
    """

    groups = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        n: int,
        blocks: int,
        tail_blocks: int = 0,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
        permuted: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Allocate everything; the index is a valid one, the values are zero."""
        # A convolution on no device checks the options and knows what padding='same' means.
        conv = nn.Conv2d(1, 1, kernel_size, stride, padding, dilation, padding_mode=padding_mode, device="meta")
        super().__init__(
            in_channels, out_channels, conv.kernel_size, n, blocks, tail_blocks, bias, permuted, device, dtype
        )
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, padding_mode
        self._pads = tuple(conv._reversed_padding_repeated_twice)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, n: int, kept: Tensor | None = None, rows: Tensor | None = None
    ) -> BlockSparseConv2d:
        """The blocks of a dense convolution.

        Args:
            conv: with one group.
            n: outputs of a row block.
            kept: boolean (ceil(O / N), I), the blocks that stay; None: those with a weight that is not zero.
            rows: (O,), the output of each row of the blocks; None: in order.

        Raises:
            ValueError: the convolution has groups, or a size does not fit.
        """
        if conv.groups != 1 or conv.transposed:
            raise ValueError(f"a block-sparse convolution has one group, this one has {conv.groups}")
        kept = _kept_of(conv.weight, n, kept, rows)
        new = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, n, *_block_counts(kept, conv.out_channels, n),
            stride=conv.stride, padding=conv.padding, dilation=conv.dilation, padding_mode=conv.padding_mode,
            bias=conv.bias is not None, permuted=rows is not None, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        return _filled(new, conv, kept, rows)

    @classmethod
    def from_bsr(
        cls,
        matrix: Tensor,
        kernel_size: int | Sequence[int] = 1,
        out_channels: int | None = None,
        bias: Tensor | None = None,
        **options: Any,
    ) -> BlockSparseConv2d:
        """From a ``torch.sparse_bsr`` matrix (rows, I * taps) with blocks of (N, taps), as :meth:`to_bsr` makes.

        Args:
            matrix: the weight, all blocks of a row block in ascending order.
            kernel_size: one number or two.
            out_channels: outputs O; the rows beyond are left out. None: all rows.
            bias: (O,).
            options: ``stride``, ``padding``, ``dilation`` and ``padding_mode``.

        Raises:
            ValueError: the matrix has another layout, or does not fit the kernel or the outputs.
        """
        size = nn.Conv2d(1, 1, kernel_size, device="meta").kernel_size
        inputs, outputs, n, blocks = _bsr_sizes(matrix, math.prod(size), out_channels)
        new = cls(inputs, outputs, size, n, *blocks, bias=bias is not None, **_kind_of(matrix), **options)
        return _filled_from_bsr(new, matrix, bias)

    def to_conv(self) -> nn.Conv2d:
        """The same convolution with a dense weight."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            bias=self.bias is not None, padding_mode=self.padding_mode, **_kind_of(self.values),
        )  # fmt: skip
        return _dense_again(conv, self)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` to ``(B, O, H', W')``; one image without a batch axis works as well."""
        if x.ndim == 4 and x.shape[1] == self.in_channels and self._is_fast(x):
            geometry = _geometry(x.shape[2:], self.kernel_size, self.stride, self._pads, self.dilation)
            if geometry.height > 0 and geometry.width > 0:
                return self._fast(x, geometry)
        return self.reference(x)

    def reference(self, x: Tensor) -> Tensor:
        """The same in plain PyTorch: scatter to a dense weight, convolve."""
        weight = self.dense_weight()
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)
        x = F.pad(x, self._pads, mode=_PAD_MODES[self.padding_mode])
        return F.conv2d(x, weight, self.bias, self.stride, 0, self.dilation)

    def _fast(self, x: Tensor, geometry: _Geometry) -> Tensor:
        x = self._packed(x, geometry)
        images, height, width, row = x.shape[0], geometry.height, geometry.width, geometry.row
        shape = (images, self.out_channels, height, row)
        y = x.new_empty(shape) if row == width else scratch("y", shape)
        strides = (geometry.plane, self.in_channels * geometry.plane, height * row, self.out_channels * height * row)
        self._product(x, y, images, (height - 1) * row + width, geometry.address, strides)
        return y if row == width else y[..., :width].contiguous()

    def _packed(self, x: Tensor, geometry: _Geometry) -> Tensor:
        """The input, contiguous, as the geometry describes it."""
        (images, channels, height, width), (down, across) = x.shape, self.stride
        if geometry.padded:
            left, right, top, bottom = geometry.pads
            if self.padding_mode != "zeros":
                x, left, right, top, bottom = F.pad(x, geometry.pads, mode=_PAD_MODES[self.padding_mode]), 0, 0, 0, 0
                height, width = x.shape[2:]
            shape = (
                images,
                channels,
                top + height + bottom + geometry.extra[0],
                left + width + right + geometry.extra[1],
            )
            padded = scratch("x", shape).zero_()
            padded[:, :, top : top + height, left : left + width].copy_(x)
            x = padded
        if (down, across) != (1, 1):
            if self.kernel_size == (1, 1):
                x = x[:, :, ::down, ::across]
            else:
                phases = x.reshape(images, channels, x.shape[2] // down, down, geometry.row, across)
                phases = phases.permute(0, 1, 3, 5, 2, 4)
                x = scratch("phases", phases.shape).copy_(phases)
        return x if x.is_contiguous() else x.contiguous()

    def extra_repr(self) -> str:
        """Sizes, and the share of the weight that is there."""
        share = self.columns.numel() / max(1, (self.row_pointers.numel() - 1) * self.in_channels)
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, n={self.n}, blocks={self.columns.numel()} ({share:.0%})"
        )


class BlockSparseLinear(BlockSparseLayer):
    """A linear layer whose weight is N x 1 block-sparse; see :class:`BlockSparseLayer`."""

    def __init__(
        self, in_features: int, out_features: int, n: int, blocks: int, tail_blocks: int = 0, *, bias: bool = True,
        permuted: bool = False, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        """Allocate everything; the index is a valid one, the values are zero."""
        super().__init__(in_features, out_features, (), n, blocks, tail_blocks, bias, permuted, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, n: int, kept: Tensor | None = None, rows: Tensor | None = None
    ) -> BlockSparseLinear:
        """The blocks of a dense layer; arguments and errors as :meth:`BlockSparseConv2d.from_conv`."""
        kept = _kept_of(linear.weight, n, kept, rows)
        new = cls(
            linear.in_features, linear.out_features, n, *_block_counts(kept, linear.out_features, n),
            bias=linear.bias is not None, permuted=rows is not None, device=linear.weight.device,
            dtype=linear.weight.dtype,
        )  # fmt: skip
        return _filled(new, linear, kept, rows)

    @classmethod
    def from_bsr(cls, matrix: Tensor, out_features: int | None = None, bias: Tensor | None = None) -> BlockSparseLinear:
        """From a ``torch.sparse_bsr`` matrix with blocks of (N, 1); see :meth:`BlockSparseConv2d.from_bsr`."""
        inputs, outputs, n, blocks = _bsr_sizes(matrix, 1, out_features)
        return _filled_from_bsr(
            cls(inputs, outputs, n, *blocks, bias=bias is not None, **_kind_of(matrix)), matrix, bias
        )

    def to_linear(self) -> nn.Linear:
        """The same layer with a dense weight."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **_kind_of(self.values))
        return _dense_again(linear, self)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        if not (x.ndim and x.shape[-1] == self.in_features and self._is_fast(x)):
            return self.reference(x)
        count = x.numel() // self.in_features
        # One channel after the other, as in an image of `count` pixels.
        columns = x.reshape(count, self.in_features).t().contiguous()
        y = x.new_empty(self.out_features, count)
        self._product(columns, y, 1, count, _ONE_TAP.buffer_info()[0], (count, 0, count, 0))
        return y.t().reshape(*x.shape[:-1], self.out_features).contiguous()

    def reference(self, x: Tensor) -> Tensor:
        """The same in plain PyTorch: scatter to a dense weight, multiply."""
        return F.linear(x, self.dense_weight(), self.bias)

    def extra_repr(self) -> str:
        """Sizes, and the share of the weight that is there."""
        share = self.columns.numel() / max(1, (self.row_pointers.numel() - 1) * self.in_features)
        return f"{self.in_features}, {self.out_features}, n={self.n}, blocks={self.columns.numel()} ({share:.0%})"


# -- helpers -----------------------------------------------------------------------------------------------------


def _kind_of(tensor: Tensor) -> dict[str, Any]:
    return {"device": tensor.device, "dtype": tensor.dtype}


def _kept_of(weight: Tensor, n: int, kept: Tensor | None, rows: Tensor | None) -> Tensor:
    """The blocks that stay, checked; see :meth:`BlockSparseConv2d.from_conv`."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    outputs, inputs = weight.shape[:2]
    if kept is None:
        alive = weight.detach().reshape(outputs, inputs, -1).ne(0).any(2)
        alive = alive if rows is None else alive[rows.long()]
        return F.pad(alive, (0, 0, 0, -outputs % n)).reshape(-1, n, inputs).any(1)
    if kept.shape != (-(-outputs // n), inputs):
        raise ValueError(f"kept must have shape {(-(-outputs // n), inputs)}, got {tuple(kept.shape)}")
    return kept.bool()


def _block_counts(kept: Tensor, outputs: int, n: int) -> tuple[int, int]:
    """Blocks of N rows, and of fewer rows."""
    full = outputs // n
    return int(kept[:full].sum()), int(kept[full:].sum())


def _filled(new: Any, dense: nn.Module, kept: Tensor, rows: Tensor | None) -> Any:
    """Give a new layer the blocks of a dense one, and whatever else hangs on it."""
    new.set_index(kept, rows)
    new.set_weight(dense.weight.detach())
    if new.bias is not None:
        new.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=dense.bias.requires_grad)
    for values in (new.values, new.tail_values):
        if values is not None:
            values.requires_grad_(dense.weight.requires_grad)
    return new.train(dense.training)


def _bsr_sizes(matrix: Tensor, taps: int, outputs: int | None) -> tuple[int, int, int, tuple[int, int]]:
    """Inputs, outputs, N, and how many blocks of N and of fewer rows there are."""
    if matrix.layout is not torch.sparse_bsr or matrix.ndim != 2:
        raise ValueError(f"need a matrix of layout torch.sparse_bsr, got {matrix.ndim} axes of {matrix.layout}")
    rows, columns = matrix.shape
    n, width = matrix.values().shape[1:]
    if width != taps:
        raise ValueError(f"blocks are {width} wide, a kernel of {taps} positions needs blocks of (N, {taps})")
    outputs = rows if outputs is None else outputs
    if not rows - n < outputs <= rows:
        raise ValueError(f"{rows} rows in blocks of {n} are {rows - n + 1} to {rows} outputs, not {outputs}")
    split = int(matrix.crow_indices()[outputs // n])
    return columns // taps, outputs, n, (split, matrix.col_indices().numel() - split)


@torch.no_grad()
def _filled_from_bsr(new: Any, matrix: Tensor, bias: Tensor | None) -> Any:
    new.columns.copy_(matrix.col_indices())
    new.row_pointers.copy_(matrix.crow_indices())
    new.index_changed()
    split, size = new.values.shape[0], new.values.shape[2:]
    values = matrix.values().unflatten(2, size) if size else matrix.values().squeeze(2)
    new.values.copy_(values[:split])
    if new.tail_values is not None:
        new.tail_values.copy_(values[split:, : new.tail_values.shape[1]])
    if bias is not None:
        new.bias.copy_(bias)
    return new


@torch.no_grad()
def _dense_again(dense: Any, layer: BlockSparseLayer) -> Any:
    dense.weight.copy_(layer.dense_weight())
    if layer.bias is not None:
        dense.bias.copy_(layer.bias)
    return dense.train(layer.training)
