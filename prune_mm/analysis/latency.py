"""Times two models against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prune_mm.graph.tensors import tensors_in
from prune_mm.graph.trace import in_eval_mode


@dataclass(frozen=True)
class Latency:
    """Time of one call in milliseconds.

    Attributes:
        median_ms: median of the repeats.
        low_ms: first quartile.
        high_ms: third quartile.
    """

    median_ms: float
    low_ms: float
    high_ms: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        """Median and quartiles (linear interpolation) of single measurements."""
        low, median, high = (float(value) * 1e3 for value in np.percentile(seconds, (25, 50, 75)))
        return cls(median, low, high)


def compare_latency(
    first: Callable[..., Any],
    second: Callable[..., Any],
    inputs: Any,
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
) -> tuple[Latency, Latency]:
    """Time two models in one process, in turns (A B A B ...), so that whatever else the machine does hits both alike.

    Runs without gradients; modules run in eval mode and get their mode back. With inputs on CUDA, every measurement
    starts and ends with a synchronised device.

    Args:
        first: a module or any callable.
        second: the one to compare it with.
        inputs: one argument, or a tuple of positional arguments; both models get the same.
        repeats: measured calls of each.
        warmup: calls of each before, not measured.
        threads: CPU threads of torch while measuring; None leaves the number as it is.

    Returns:
        Latency of ``first`` and of ``second``.

    Raises:
        ValueError: if ``repeats`` or ``threads`` is below 1 or ``warmup`` below 0.
    """
    if repeats < 1 or warmup < 0 or (threads is not None and threads < 1):
        raise ValueError(f"repeats={repeats} and threads={threads} must be at least 1, warmup={warmup} at least 0")
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    devices = {tensor.device for tensor in tensors_in(arguments) if tensor.is_cuda}
    seconds: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as stack:
        for model in (first, second):
            if isinstance(model, nn.Module):
                stack.enter_context(in_eval_mode(model))
        stack.enter_context(_threads(threads))
        # Not inference_mode: detectors cache anchors, and an inference tensor in a cache breaks later training.
        stack.enter_context(torch.no_grad())
        for turn in range(warmup + repeats):
            for model, measured in zip((first, second), seconds):
                elapsed = _time(model, arguments, devices)
                if turn >= warmup:
                    measured.append(elapsed)
    return Latency.of(seconds[0]), Latency.of(seconds[1])


def _time(model: Callable[..., Any], arguments: tuple, devices: set[torch.device]) -> float:
    for device in devices:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(*arguments)
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
