"""Counts multiply-adds operator by operator, below autograd, and attributes them to the weights they come from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

from prune_mm.graph.tensors import tensors_in


def _convolution(args: tuple, result: Tensor) -> tuple[int, list[Tensor]]:
    x, weight, transposed = args[0], args[1], args[6]
    positions = x.shape[0] * math.prod((x if transposed else result).shape[2:])
    return weight.numel() * positions, [weight]


def _deformable(args: tuple, result: Tensor) -> tuple[int, list[Tensor]]:
    return args[1].numel() * result.shape[0] * math.prod(result.shape[2:]), [args[1]]


def _product(args: tuple, result: Tensor) -> tuple[int, list[Tensor]]:
    left, right = args[-2:]
    return left.numel() * right.shape[-1], [right, left]


def _vector_product(args: tuple, result: Tensor) -> tuple[int, list[Tensor]]:
    return args[-2].numel(), [args[-2], args[-1]]


#: Operator name to rule. A rule returns the MACs and the operands that may be the weight, the likelier one first.
_RULES: dict[str, Callable[[tuple, Tensor], tuple[int, list[Tensor]]]] = {
    "convolution": _convolution,
    "deform_conv2d": _deformable,
    **dict.fromkeys(("mm", "addmm", "_addmm_activation", "bmm", "baddbmm"), _product),
    **dict.fromkeys(("mv", "addmv", "dot", "vdot"), _vector_product),
}
_CONVOLUTIONS = ("convolution", "deform_conv2d")

#: Operators where a matrix that is a parameter meets activations without being multiplied with them.
_NO_PRODUCTS = {"cat", "stack", "copy", "copy_", "native_layer_norm", "index_put", "index_put_", "slice_scatter"}


class MacCounter(TorchDispatchMode):
    """Sums the multiply-adds of conv and linear weights while it is entered.

    A weight is recognised by the storage it lives in, so views of it (transposed, reshaped, a part) are too, and so
    are tensors computed from parameters and buffers alone (standardised, masked or cast weights).

    Args:
        module: the module that will run; weights get their names relative to it.

    Attributes:
        macs: multiply-adds by parameter name, or by module name for weights that are no parameter.
        uncounted: operators that mix a weight matrix with activations and have no rule, each with one such weight.
    """

    def __init__(self, module: nn.Module) -> None:
        """Index the parameters and buffers of ``module`` by the storage they live in."""
        super().__init__()
        self.macs: Counter[str] = Counter()
        self.uncounted: dict[str, str] = {}
        self._module = module
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self._spans: dict[int, list[tuple[int, int, str]]] = {}
        for name, parameter in self._parameters.items():
            storage = _storage(parameter)
            if storage is not None:
                self._spans.setdefault(storage, []).append((*_span(parameter), name))
        self._constants = {_storage(buffer) for buffer in module.buffers()} - set(self._spans)
        # Held tensors keep their storage, so that no address is used twice.
        self._computed: dict[int, tuple[Tensor, frozenset[str]]] = {}
        self._running: list[tuple[str, int]] = []
        self._counted = 0

    def positions(self) -> dict[str, int]:
        """MACs of every weight divided by its elements; what does not divide is left under the module's name."""
        positions: Counter[str] = Counter()
        for name, macs in self.macs.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                positions[name] += macs
                continue
            whole, rest = divmod(macs, parameter.numel())
            positions[name] += whole
            if rest:
                positions[name.rpartition(".")[0]] += rest
        return dict(positions)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which module is running, for weights that have no name and kernels the dispatcher does not see."""
        with ExitStack() as handles:
            for name, child in self._module.named_modules():
                handles.enter_context(child.register_forward_pre_hook(self._enter(name)))
                handles.enter_context(child.register_forward_hook(self._leave, always_call=True))
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        rule = _RULES.get(name)
        if rule is None and torch.is_inference_mode_enabled():
            # Inference mode skips the dispatch keys that would take composite operators (linear, conv2d) apart.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if rule is not None:
            macs, operands = rule(args, result)
            self._count(name, macs, operands)
        else:
            self._follow(func, name, tensors_in((args, kwargs)), result)
        return result

    # -- which weight is it -----------------------------------------------------------------------------------

    def _count(self, operator: str, macs: int, operands: list[Tensor]) -> None:
        names = [self._parameter_of(tensor) for tensor in operands] + [self._source_of(t) for t in operands]
        name = next((name for name in names if name is not None), None)
        if name is None:
            if operator not in _CONVOLUTIONS:
                return
            name = self._weight_of_running_module(operands[0])
        self.macs[name] += macs
        self._counted += 1

    def _parameter_of(self, tensor: Tensor) -> str | None:
        """Name of the parameter that ``tensor`` is, or is a view of."""
        for start, stop, name in self._spans.get(_storage(tensor), ()):
            if start <= tensor.storage_offset() < stop:
                return name
        return None

    def _source_of(self, tensor: Tensor) -> str | None:
        """Name of the parameter that ``tensor`` was computed from; of several, the one of its size."""
        held = self._computed.get(_storage(tensor))
        if held is None:
            return None
        matrices = [name for name in sorted(held[1]) if self._parameters[name].ndim >= 2]
        same_size = [name for name in matrices if self._parameters[name].numel() == tensor.numel()]
        candidates = same_size or matrices
        return candidates[0] if len(candidates) == 1 else self._weight_of_running_module(tensor)

    def _weight_of_running_module(self, tensor: Tensor) -> str:
        """Name of the running module's parameter of this shape, ``weight`` first; else the module's own name."""
        where = self._running[-1][0] if self._running else ""
        own = self._module.get_submodule(where).named_parameters(prefix=where)
        # A linear layer multiplies by the transpose.
        fitting = [name for name, parameter in own if parameter.shape in (tensor.shape, tensor.shape[::-1])]
        fitting.sort(key=lambda name: name.rpartition(".")[2] != "weight")
        return fitting[0] if fitting else where

    def _follow(self, func: Any, operator: str, operands: list[Tensor], result: Any) -> None:
        """Remember results computed from parameters alone; report weights used in a way that has no rule."""
        operands = [t for t in operands if t.is_floating_point() and t.numel() > 1]
        direct = [name for name in map(self._parameter_of, operands) if name is not None]
        storages = [_storage(tensor) for tensor in operands]
        computed = [self._computed[storage][1] for storage in storages if storage in self._computed]
        if not direct and not computed:
            return
        known = len(direct) + len(computed) + sum(storage in self._constants for storage in storages)
        if known == len(operands):
            sources = frozenset(direct).union(*computed)
            for tensor in tensors_in(result):
                storage = _storage(tensor)
                if storage is not None and storage not in self._spans:
                    self._computed[storage] = (tensor, sources)
            return
        matrices = [name for name in direct if self._parameters[name].ndim >= 2]
        silent = torch.Tag.pointwise in func.tags or operator in _NO_PRODUCTS or "scaled_dot_product" in operator
        if matrices and not silent:
            self.uncounted.setdefault(operator, matrices[0])

    # -- which module is running ------------------------------------------------------------------------------

    def _enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._running.append((name, self._counted))

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name, counted_before = self._running.pop()
        weight = getattr(module, "weight", None)
        if self._counted > counted_before or not _is_convolution(module, weight, output):
            return
        # A compiled kernel that bypasses the dispatcher (mmcv's deformable convolutions).
        self.macs[self._parameter_of(weight) or name] += weight.numel() * output.shape[0] * math.prod(output.shape[2:])
        self._counted += 1


def _is_convolution(module: nn.Module, weight: Any, output: Any) -> bool:
    return (
        isinstance(weight, Tensor)
        and isinstance(output, Tensor)
        and weight.ndim >= 3
        and output.ndim == weight.ndim
        and output.shape[1] == weight.shape[0]
        and hasattr(module, "kernel_size")
        and hasattr(module, "stride")
        and not isinstance(module, _ConvTransposeNd)
    )


def _storage(tensor: Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and one past the last element of the storage that a tensor reaches."""
    start = tensor.storage_offset()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return start, start + reach + 1
