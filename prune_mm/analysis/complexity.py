"""How much a network computes and holds: multiply-adds, parameters, bytes.

MACs here are the multiply-adds of convolution and linear weights: elements of the weight times the output positions it
is applied at. Biases, norms, activation functions, pooling and products of two activations (the two ``bmm`` of
attention) are not counted.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prune_mm.analysis.mac_counter import MacCounter
from prune_mm.graph.tensors import tensors_in
from prune_mm.graph.trace import in_eval_mode


@dataclass(frozen=True)
class Complexity:
    """Cost of one model.

    Attributes:
        macs: conv and linear multiply-adds of one call, over the whole batch.
        params: elements of all parameters; a shared one counts once.
        bytes: size of the parameters and of the buffers a state dict holds, as they are stored now.
    """

    macs: int
    params: int
    bytes: int


def layer_positions(module: nn.Module, example_inputs: Any) -> dict[str, int]:
    """At how many output positions each conv and linear weight is applied in one forward.

    A convolution's positions are ``N * H_out * W_out``, a transposed convolution's ``N * H_in * W_in``, a linear
    layer's the rows of its input; several uses of one weight add up. So
    ``MACs = sum(numel(weight) * positions)``, which is :func:`prune_mm.structures.plan.count_macs`.

    The forward runs in eval mode, first on a copy without data (device ``meta``), where a large image costs nothing;
    when the code needs values, or an operator has no meta kernel, on the module itself. Neither the module, nor its
    buffers, nor any random number generator changes.

    Args:
        module: any module.
        example_inputs: one tensor, or a tuple of positional arguments. Tensors on the meta device will do, as long
            as the code needs no values.

    Returns:
        Positions by dotted parameter name, relative to ``module``; weights that did not run are absent. A key that
        names a module instead of a parameter stands for multiply-adds that are no whole multiple of one parameter
        (a kernel computed from the input, uneven uses of the parts of a weight). Its value is the MACs themselves,
        as of a weight of shape ``()``.

    Raises:
        TypeError: if ``example_inputs`` holds no tensor.

    Warns:
        UserWarning: naming operators that multiply by a weight in a way that is not counted.
    """
    return _count_forward(module, example_inputs).positions()


def measure_complexity(
    module: nn.Module, forward: Callable[[], Any] | None = None, example_inputs: Any = None
) -> Complexity:
    """Multiply-adds of one call, parameters and bytes of a whole model.

    Args:
        module: the model.
        forward: runs the model in its own way, for instance ``lambda: model.test_step(data)`` for a detector. It is
            called once, in eval mode without gradients.
        example_inputs: instead of ``forward``: one tensor, or a tuple of positional arguments; then the count runs
            on a copy without data where it can, see :func:`layer_positions`.

    Raises:
        ValueError: unless exactly one of ``forward`` and ``example_inputs`` is given.
        TypeError: if ``example_inputs`` holds no tensor.

    Warns:
        UserWarning: naming operators that multiply by a weight in a way that is not counted.
    """
    if (forward is None) == (example_inputs is None):
        raise ValueError("give either forward or example_inputs")
    counter = _count_forward(module, example_inputs) if forward is None else _count_real(module, forward)
    return Complexity(
        macs=sum(counter.macs.values()),
        params=sum(parameter.numel() for parameter in module.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in _stored_tensors(module)),
    )


def _stored_tensors(module: nn.Module) -> list[Tensor]:
    buffers = {
        id(buffer): buffer
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and name not in child._non_persistent_buffers_set
    }
    return [*module.parameters(), *buffers.values()]


def _count_forward(module: nn.Module, example_inputs: Any) -> MacCounter:
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tensors = tensors_in(inputs)
    if not tensors:
        raise TypeError(f"example_inputs must hold a tensor, got {type(example_inputs).__name__}")
    try:
        return _count_on_meta(module, inputs)
    except Exception:  # whatever the network's own code raises when there are no values
        if any(tensor.is_meta for tensor in tensors):
            raise
    return _count_real(module, lambda: module(*inputs))


def _count_on_meta(module: nn.Module, inputs: tuple) -> MacCounter:
    with _random_state_kept(module):
        subject = _without_data(module)
        inputs = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs)
        with torch.device("meta"):
            return _run(subject, lambda: subject(*inputs))


def _count_real(module: nn.Module, forward: Callable[[], Any]) -> MacCounter:
    with _random_state_kept(module), _buffers_kept(module):
        return _run(module, forward)


def _run(module: nn.Module, forward: Callable[[], Any]) -> MacCounter:
    counter = MacCounter(module)
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fused attention kernels hide the linear layers inside them.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with in_eval_mode(module), torch.no_grad(), counter.watching(), counter:
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    _warn_uncounted(counter)
    return counter


def _without_data(module: nn.Module) -> nn.Module:
    """A deep copy whose tensors are all on the meta device; no data is copied on the way."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        for tensor in tensors_in(vars(child)):
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(module, memo)


@contextmanager
def _random_state_kept(module: nn.Module) -> Iterator[None]:
    cuda = sorted({tensor.get_device() for tensor in [*module.parameters(), *module.buffers()] if tensor.is_cuda})
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Undo what a forward does to buffers: counters, caches, running statistics updated outside of training."""
    saved = [
        (child, name, buffer, None if buffer is None else buffer.clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
    ]
    try:
        yield
    finally:
        for child, name, buffer, value in saved:
            child._buffers[name] = buffer
            if buffer is not None and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _warn_uncounted(counter: MacCounter) -> None:
    if counter.uncounted:
        found = ", ".join(f"'{operator}' with {name}" for operator, name in sorted(counter.uncounted.items()))
        warnings.warn(f"multiply-adds of these operators are not counted: {found}", stacklevel=2)
