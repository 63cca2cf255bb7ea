"""Compiles and runs the CPU kernels for block-sparse weights.

`llvmlite <https://llvmlite.readthedocs.io>`_ (it comes with numba) turns generated text (``block_code``) into machine
code in a fraction of a second, once per N and process, and no compiler is needed. Without it there is no kernel, and
layers compute their reference. The threads are those of PyTorch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from prune_mm.structures.block_code import Machine, kernel_text, row_chunks

#: Blocks of more rows have no kernel: the code would only grow longer.
MAX_ROWS = 64

#: Fewer multiply-adds than this are not worth waking a thread.
_MACS_A_THREAD = 500_000


@dataclass(frozen=True)
class Kernel:
    """Machine code for blocks of some number of rows.

    Attributes:
        run: computes the job at an address, alone or beside other threads that run the same job.
        width: pixels of its widest tile.
        owner: keeps the code alive.
    """

    run: Callable[[int], None]
    width: int
    owner: object


def host_machine() -> Machine:
    """The processor this runs on, as LLVM sees it."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return Machine(16, 32)
    if features.get("avx"):
        return Machine(8, 16)
    return Machine(4, 32 if platform.machine().lower() in ("aarch64", "arm64") else 16)


@lru_cache(maxsize=64)
def block_kernel(n: int, pointwise: bool) -> Kernel | None:
    """The kernel for blocks of ``n`` rows, compiled when first asked for; None where there is none.

    Args:
        n: rows of a block.
        pointwise: whether the convolution has one kernel position.
    """
    if not 1 <= n <= MAX_ROWS or os.environ.get("PRUNE_MM_KERNELS") == "0":
        return None
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None
    try:
        return _compile(llvm, n, pointwise, host_machine())
    except Exception as error:  # whatever a version of LLVM or a processor may object to
        warnings.warn(f"block-sparse layers run their slower reference: no kernel for N={n} ({error})", stacklevel=2)
        return None


def _compile(llvm: Any, n: int, pointwise: bool, machine: Machine) -> Kernel:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(kernel_text(n, pointwise, machine))
    module.verify()
    host = {"cpu": llvm.get_host_cpu_name(), "features": llvm.get_host_cpu_features().flatten()}
    engine = llvm.create_mcjit_compiler(module, llvm.Target.from_default_triple().create_target_machine(**host, opt=3))
    engine.finalize_object()
    # Calls through ctypes let go of the interpreter lock.
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("run"))
    return Kernel(run, row_chunks(n, machine)[1] * machine.lanes, engine)


def run_job(kernel: Kernel, fields: tuple[int, ...], threads: int) -> None:
    """Compute a job, its fields in the order of ``block_code.JOB``, with some threads."""
    job = array("q", fields)
    address = job.buffer_info()[0]
    if threads == 1:
        kernel.run(address)
        return
    parallel = _torch_threads()
    if parallel is not None:
        parallel(kernel.run, address, threads, 0)
        return
    others = [_executor(os.getpid()).submit(kernel.run, address) for _ in range(threads - 1)]
    kernel.run(address)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _torch_threads() -> Callable[..., None] | None:
    """``GOMP_parallel`` of the OpenMP library that PyTorch uses.

    A second pool of threads would wait for a processor on which the first one still spins.
    """
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.restype = None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return parallel


@lru_cache(maxsize=1)
def _executor(process: int) -> ThreadPoolExecutor:
    """Threads of our own, for systems where those of PyTorch are out of reach; new ones after a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="block_sparse")


def useful_threads(macs: int, available: int) -> int:
    """How many of the available threads a product of so many multiply-adds is worth."""
    return max(1, min(available, macs // _MACS_A_THREAD))


def split_work(pointers: Sequence[int], images: int, pixels: int, width: int, threads: int) -> list[tuple[int, ...]]:
    """Divide a product among threads, which draw the parts in turn.

    Args:
        pointers: where the blocks of each row block start, and the end of the last one's.
        images: size of the batch.
        pixels: outputs of one channel.
        width: pixels of the kernel's widest tile.
        threads: how many threads share the work.

    Returns:
        ``(image, first and last row block, first and last pixel)`` of every part; bounds are half open.
    """
    parts = 1 if threads == 1 else -(-4 * threads // images)
    tiles_ = max(1, pixels // width)
    columns = min(tiles_, parts)
    pixel_cuts = [tiles_ * part // columns * width for part in range(columns)] + [pixels]
    row_blocks = len(pointers) - 1
    groups = min(row_blocks, -(-parts // columns))
    # A row block costs its blocks, and about four more for its bias and results.
    cost = [pointers[b] - pointers[0] + 4 * b for b in range(row_blocks + 1)]
    row_cuts = [bisect_left(cost, cost[-1] * group / groups) for group in range(groups)] + [row_blocks]
    return [
        (image, *rows, *between)
        for image in range(images)
        for between in zip(pixel_cuts, pixel_cuts[1:])
        for rows in zip(row_cuts, row_cuts[1:])
        if rows[0] < rows[1] and between[0] < between[1]
    ]
