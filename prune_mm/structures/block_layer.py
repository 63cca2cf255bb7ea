"""What layers with an N x 1 block-sparse weight have in common: values, block columns, row pointers, and the kernel."""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from prune_mm.structures.block_kernels import Kernel, block_kernel, run_job, split_work, useful_threads


class _Share(NamedTuple):
    """How the kernel computes the row blocks of one height, all but the addresses of tensors; sizes are in bytes."""

    name: str
    kernel: Kernel
    tasks: array
    address: int
    count: int
    threads: int
    pointers: int
    before: int
    first: int


class BlockSparseLayer(nn.Module):
    """What a convolution and a linear layer share: the weight, its reference form, and the kernel's job.

    Row block ``b`` is made of N outputs and holds the blocks ``row_pointers[b]`` to ``row_pointers[b + 1]``; block
    ``k`` is the N kernels that read input ``columns[k]``. When N does not divide the outputs, the last row block has
    fewer rows, and its blocks are in ``tail_values``.

    Args:
        in_channels: inputs I.
        out_channels: outputs O.
        kernel_size: sizes of the kernel, empty for a linear layer.
        n: outputs of a row block.
        blocks: how many blocks of N rows there are.
        tail_blocks: how many blocks of O mod N rows there are.
        bias: whether there is a bias, one for each output.
        permuted: whether the rows of the blocks are other outputs than their number, see ``rows``.
        device: of all tensors.
        dtype: of values and bias.

    Attributes:
        values: parameter (blocks, N, *kernel_size).
        tail_values: parameter (tail_blocks, O mod N, *kernel_size), or None.
        bias: parameter (O,) in the order of the outputs, or None.
        columns: int32 (blocks + tail_blocks,), ascending in each row block.
        row_pointers: int32 (ceil(O / N) + 1,).
        rows: int32 (O,), the output that row i of the blocks makes; None: output i.
        block_rows: int32 (blocks + tail_blocks,), the row block of each block; not stored.

    Raises:
        ValueError: a size is not positive.
    """

    values: Tensor
    columns: Tensor
    row_pointers: Tensor
    block_rows: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        n: int,
        blocks: int,
        tail_blocks: int = 0,
        bias: bool = True,
        permuted: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Allocate everything; the index is a valid one, the values are zero."""
        super().__init__()
        if min(in_channels, out_channels, n, *kernel_size, 1) < 1:
            raise ValueError(
                f"sizes must be at least 1, got in_channels={in_channels}, out_channels={out_channels}, n={n}, "
                f"kernel_size={kernel_size}"
            )
        self.in_channels, self.out_channels, self.n = in_channels, out_channels, n
        full, rest = divmod(out_channels, n)
        if not 0 <= blocks <= full * in_channels or not 0 <= tail_blocks <= (in_channels if rest else 0):
            raise ValueError(
                f"{out_channels} x {in_channels} weights have at most {full * in_channels} blocks of {n} rows and "
                f"{in_channels if rest else 0} of {rest}, got {blocks} and {tail_blocks}"
            )
        options = {"device": device, "dtype": dtype}
        self.values = nn.Parameter(_outputs_last(torch.zeros(blocks, n, *kernel_size, **options)))
        tail = _outputs_last(torch.zeros(tail_blocks, rest, *kernel_size, **options)) if rest else None
        self.register_parameter("tail_values", None if tail is None else nn.Parameter(tail))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels, **options)) if bias else None)
        index = {"device": device, "dtype": torch.int32}
        # The first blocks there are room for.
        ends = [min(in_channels * b, blocks) for b in range(full + 1)] + [blocks + tail_blocks] * bool(rest)
        within = [*(k % in_channels for k in range(blocks)), *range(tail_blocks)]
        self.register_buffer("columns", torch.tensor(within, **index))
        self.register_buffer("row_pointers", torch.tensor(ends, **index))
        self.register_buffer("block_rows", None, persistent=False)
        self.register_buffer("rows", torch.arange(out_channels, **index) if permuted else None)
        self._taps, self._rest = math.prod(kernel_size), rest
        self._shares: dict[tuple[int, int, int], list[_Share]] = {}
        self.index_changed()

    def set_index(self, kept: Tensor, rows: Tensor | None = None) -> None:
        """Say which blocks there are.

        Args:
            kept: boolean (ceil(O / N), I).
            rows: (O,), the output of each row; None: in order.
        """
        with torch.no_grad():
            self.columns.copy_(kept.nonzero()[:, 1])
            self.row_pointers[1:] = kept.sum(1).cumsum(0)
            if self.rows is not None and rows is not None:
                self.rows.copy_(rows)
        self.index_changed()

    def index_changed(self) -> None:
        """To be called after the index was written to: what is computed from it is computed anew."""
        counts = self.row_pointers.diff()
        numbers = torch.arange(counts.numel(), device=counts.device, dtype=counts.dtype)
        self.block_rows = torch.repeat_interleave(numbers, counts, output_size=self.columns.numel())
        self._shares.clear()

    # -- the weight ----------------------------------------------------------------------------------------------

    def _places(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Values of N rows and of fewer rows, each with the outputs (b, N) and the inputs (b, 1) they lie at."""
        split, found = self.values.shape[0], []
        for values, part in ((self.values, slice(0, split)), (self.tail_values, slice(split, None))):
            if values is not None:
                height = torch.arange(values.shape[1], device=values.device)
                rows = (self.block_rows[part].long() * self.n).unsqueeze(1) + height
                rows = rows if self.rows is None else self.rows.long()[rows]
                found.append((values, rows, self.columns[part].long().unsqueeze(1)))
        return found

    def dense_weight(self) -> Tensor:
        """The weight as a dense tensor (O, I, *kernel_size), outputs in order; differentiable in the values."""
        dense = self.values.new_zeros(self.out_channels, self.in_channels, *self.values.shape[2:])
        for values, rows, columns in self._places():
            dense = dense.index_put((rows, columns.expand_as(rows)), values)
        return dense

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Take the values of the blocks from a dense weight (O, I, *kernel_size), outputs in order."""
        for values, rows, columns in self._places():
            values.copy_(weight[rows, columns])

    def to_bsr(self) -> Tensor:
        """The weight as ``torch.sparse_bsr`` (rows, I * taps) with blocks of (N, taps), rows in block order.

        Rows are padded with zeros to a multiple of N.
        """
        values = self.values.flatten(2) if self.values.ndim > 2 else self.values.unsqueeze(2)
        if self.tail_values is not None:
            tail = self.tail_values.reshape(*self.tail_values.shape[:2], values.shape[2])
            values = torch.cat([values, F.pad(tail, (0, 0, 0, self.n - tail.shape[1]))])
        size = ((self.row_pointers.numel() - 1) * self.n, self.in_channels * values.shape[2])
        return torch.sparse_bsr_tensor(
            self.row_pointers.long(), self.columns.long(), values.detach().contiguous(), size, check_invariants=True
        )

    # -- the kernel ----------------------------------------------------------------------------------------------

    def _is_fast(self, x: Tensor) -> bool:
        """Whether the kernel can compute what the reference would."""
        values = self._parameters["values"]
        return (
            type(x) is Tensor
            and x.dtype is values.dtype is torch.float32
            and x.is_cpu
            and values.is_cpu
            and x.layout is torch.strided
            and not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())))
            and not _is_watched()
            and x.numel() > 0
            and (self.out_channels < self.n or block_kernel(self.n, self._taps == 1) is not None)
            and (self._rest == 0 or block_kernel(self._rest, self._taps == 1) is not None)
        )

    def _product(self, x: Tensor, y: Tensor, images: int, pixels: int, taps: int, strides: tuple[int, ...]) -> None:
        """Write the product to ``y``.

        Args:
            x: contiguous input.
            y: contiguous output.
            images: size of the batch.
            pixels: outputs of one channel.
            taps: address of where the kernel positions lie.
            strides: elements from channel to channel and from image to image, in x and in y.
        """
        outputs, bias, rows = self.out_channels, self._parameters["bias"], self._buffers["rows"]
        if bias is None:
            bias = _zeros(outputs)
        elif rows is not None:
            bias = bias[rows.long()]
        rows = _counting(outputs) if rows is None else rows
        key = (images, pixels, torch.get_num_threads())
        shares = self._shares.get(key) or self._share(key)
        x_channel, x_image, y_channel, y_image = strides
        for share in shares:
            values = self._parameters[share.name]
            if self._taps > 1:
                values = values.permute(0, *range(2, values.ndim), 1)
            if not values.is_contiguous():
                values = values.contiguous()
            job = (
                0, share.count, share.address, x.data_ptr(), y.data_ptr(), self._buffers["columns"].data_ptr(),
                self._buffers["row_pointers"].data_ptr() + share.pointers, values.data_ptr() - share.before,
                bias.data_ptr() + share.first, rows.data_ptr() + share.first, taps, self._taps,
                4 * x_channel, 4 * x_image, 4 * y_channel, 4 * y_image,
            )  # fmt: skip
            run_job(share.kernel, job, share.threads)

    def _share(self, key: tuple[int, int, int]) -> list[_Share]:
        """How the work on the row blocks of N and of fewer rows is divided, for so many images, pixels and threads."""
        images, pixels, available = key
        full, blocks = self.out_channels // self.n, self.values.shape[0]
        pointers, found = self.row_pointers.tolist(), []
        # The row pointers of the rest count all blocks: its values seem to start as much earlier.
        for name, height, first, last, skipped in (
            ("values", self.n, 0, full, 0),
            ("tail_values", self._rest, full, full + 1, blocks),
        ):
            if height == 0 or first == last:
                continue
            kernel = block_kernel(height, self._taps == 1)
            size = height * self._taps
            threads = useful_threads(self._parameters[name].numel() * pixels * images, available)
            tasks = split_work(pointers[first : last + 1], images, pixels, kernel.width, threads)
            flat = array("q", [number for task in tasks for number in task])
            found.append(
                _Share(name, kernel, flat, flat.buffer_info()[0], len(tasks), min(threads, len(tasks)), 4 * first,
                       4 * skipped * size, 4 * first * self.n)
            )  # fmt: skip
        if len(self._shares) >= 64:
            self._shares.clear()
        self._shares[key] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        """All but what is only remembered."""
        return self.__dict__ | {"_shares": {}}

    def _load_from_state_dict(self, state: dict, prefix: str, *args: Any) -> None:
        """Refuse an index that leads out of the weight: the kernel follows it blindly."""
        index = {}
        for name in ("columns", "row_pointers", "rows"):
            new, own = state.get(prefix + name), getattr(self, name)
            fits = new is not None and own is not None and new.shape == own.shape
            index[name] = new if fits else own
        problem = self._problem(**index)
        if problem:
            args[-1].append(f"damaged index of '{prefix[:-1]}': {problem}")
            return
        super()._load_from_state_dict(state, prefix, *args)
        self.index_changed()

    def _problem(self, columns: Tensor, row_pointers: Tensor, rows: Tensor | None) -> str:
        """What is wrong with an index of the right shape, empty: nothing."""
        if any(index is not None and index.is_floating_point() for index in (columns, row_pointers, rows)):
            return "it must hold integers"
        pointers, full = row_pointers.long().cpu(), self.out_channels // self.n
        ends = (int(pointers[0]), int(pointers[full]), int(pointers[-1]))
        if ends != (0, self.values.shape[0], columns.numel()) or bool((pointers.diff() < 0).any()):
            return f"row_pointers must rise from 0 to {columns.numel()}, the blocks there are"
        columns = columns.long().cpu()
        if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < self.in_channels:
            return f"columns must be in 0..{self.in_channels - 1}"
        starts = torch.repeat_interleave(torch.arange(pointers.numel() - 1), pointers.diff()) * self.in_channels
        if bool(((starts + columns).diff() <= 0).any()):
            return "columns must ascend in each row block"
        if rows is not None and not torch.equal(rows.long().cpu().sort().values, torch.arange(self.out_channels)):
            return f"rows must hold every output below {self.out_channels} once"
        return ""


def _outputs_last(values: Tensor) -> Tensor:
    """The same values, N being the fastest axis in memory, as the kernel reads them."""
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


def _is_watched() -> bool:
    """Whether something looks at the operators that are run: they must be PyTorch's then."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


@lru_cache(maxsize=64)
def _zeros(count: int) -> Tensor:
    """The bias of a layer without one."""
    return torch.zeros(count)


@lru_cache(maxsize=64)
def _counting(count: int) -> Tensor:
    """The rows of a layer whose rows are in order."""
    return torch.arange(count, dtype=torch.int32)


_SCRATCH = threading.local()
#: Larger buffers (numbers of float32) are not kept.
_SCRATCH_LIMIT = 1 << 24


def scratch(name: str, shape: Sequence[int]) -> Tensor:
    """A float32 CPU tensor to be used until this thread asks for the same name again; its contents are undefined.

    Fresh memory of this size would have to be mapped page by page, which can take longer than the convolution.
    """
    size = math.prod(shape)
    buffer = getattr(_SCRATCH, name, None)
    if buffer is None or buffer.numel() < size:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            buffer = torch.empty(size)
        if size <= _SCRATCH_LIMIT:
            setattr(_SCRATCH, name, buffer)
    return buffer[:size].view(*shape)
