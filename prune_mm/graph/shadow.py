"""Shadow execution: which channel does every element of every activation come from?

The real module runs once, in eval mode, inside a :class:`ShadowTracer`. Beside each activation walks a *shadow*: an
int64 tensor of the same shape that holds, per element, the id of the channel it came from (0: no channel).
The rules in :mod:`prune_mm.graph.rules` say what each operator does to the shadows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from prune_mm.structures.slots import Role

NO_CHANNEL = 0


@dataclass(frozen=True)
class Shadow:
    """Provenance of one activation.

    Attributes:
        ids: int64, same shape as the activation; often expanded (stride 0), so it costs no memory.
        zero: whether a dead channel's elements are exactly zero here (true behind a conv or a norm whose
            rows are masked, false behind a sigmoid).
        depth: number of weight layers passed since the input; tells a shortcut from the main branch.
    """

    ids: Tensor
    zero: bool
    depth: int


@dataclass(frozen=True)
class RawSlot:
    """A parameter axis with the ids that were seen there, before ids are grouped."""

    tensor: str
    axis: int
    ids: Tensor
    role: Role


@dataclass
class Block:
    """Ids made together: the output channels of one weight layer, or the result of an addition."""

    first: int
    count: int
    layer: str | None
    depth: int = 0
    reads_input: bool = False


@dataclass
class Tie:
    """Two sets of ids that met in a pointwise operator and so live or die together."""

    operator: str
    where: str
    blocks: tuple[int, ...]
    zero: tuple[bool, ...]
    depths: tuple[int, ...]


@dataclass
class TraceRecord:
    """Everything one shadow execution saw."""

    slots: list[RawSlot] = field(default_factory=list)
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    reshaped: list[tuple[Tensor, str]] = field(default_factory=list)
    group_norms: list[str] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    unknown_operators: dict[str, int] = field(default_factory=dict)
    next_id: int = 1


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


class ShadowTracer(TorchDispatchMode):
    """Runs the rule of every operator that touches an activation or a parameter.

    Args:
        module: the module that is executed; its parameters and buffers are known by their names.
    """

    def __init__(self, module: nn.Module) -> None:
        """Index the parameters and buffers of ``module`` by the storage they live in."""
        super().__init__()
        self.record = TraceRecord()
        self.module = module
        self.module_stack: list[str] = []
        self._shadows: dict[tuple[Any, ...], tuple[Tensor, Shadow]] = {}
        # Tensors stay referenced for the length of the trace, so that no storage address is used twice.
        self._alive: list[Tensor] = []
        self._opaque: dict[int, str] = {}
        self._layer_ids: dict[str, tuple[Tensor, Tensor]] = {}
        self._vector_ids: dict[str, Tensor] = {}
        self._names: dict[int, tuple[str, Tensor]] = {}
        tied: dict[int, str] = {}
        for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            storage = tensor.untyped_storage()._cdata
            if storage in self._names:
                tied[storage] = name
            self._names.setdefault(storage, (name, tensor))
        self.tied_storages = tied

    # -- what rules ask ---------------------------------------------------------------------------------------

    def name_of(self, tensor: Tensor | None) -> str | None:
        """Name of the parameter or buffer that ``tensor`` is, or None for anything else (views included)."""
        if tensor is None:
            return None
        name, own = self._names.get(tensor.untyped_storage()._cdata, (None, None))
        same = own is not None and own.shape == tensor.shape and own.stride() == tensor.stride()
        return name if same else None

    def name_of_transposed(self, tensor: Tensor) -> str | None:
        """Name of the 2-D parameter whose transpose ``tensor`` is."""
        name, own = self._names.get(tensor.untyped_storage()._cdata, (None, None))
        if own is None or own.ndim != 2 or tensor.ndim != 2:
            return None
        return name if own.t().stride() == tensor.stride() and own.t().shape == tensor.shape else None

    def shadow(self, tensor: Tensor) -> Shadow | None:
        """Shadow of an activation; None: it holds no channels."""
        held = self._shadows.get(_geometry(tensor))
        return None if held is None else held[1]

    def operand_shadow(self, tensor: Tensor) -> Shadow | None:
        """As :meth:`shadow`; a vector parameter (a layer scale) that is used as an operand gets ids of its own."""
        held = self.shadow(tensor)
        name = self.name_of(tensor)
        if held is not None:
            return held
        is_vector = sum(size != 1 for size in tensor.shape) == 1
        if name is None or not is_vector or not tensor.dtype.is_floating_point:
            return None
        is_parameter = isinstance(self._names[tensor.untyped_storage()._cdata][1], nn.Parameter)
        ids = self._vector_ids.get(name)
        if ids is None:
            axis = max(range(tensor.ndim), key=lambda d: tensor.shape[d])
            flat = self.fresh(tensor.numel(), layer=None)
            ids = flat.view(tensor.shape)
            self._vector_ids[name] = ids
            self.add_slot(name, axis, flat, "scale" if is_parameter else "mean")
        return Shadow(ids, zero=is_parameter, depth=0)

    def is_parameter_view(self, tensor: Tensor) -> bool:
        """Whether the tensor shares memory with a parameter or buffer, or was computed from one."""
        storage = tensor.untyped_storage()._cdata
        return storage in self._names or storage in self._opaque

    # -- what rules do ----------------------------------------------------------------------------------------

    def set_shadow(self, tensor: Tensor, shadow: Shadow) -> None:
        """Attach a shadow to a result."""
        self._shadows[_geometry(tensor)] = (tensor, shadow)

    def fresh(self, count: int, layer: str | None, depth: int = 0, reads_input: bool = False) -> Tensor:
        """New ids ``(count,)`` that belong together; ``layer`` names the weight that makes them."""
        first = self.record.next_id
        self.record.next_id += count
        self.record.blocks.append(Block(first, count, layer, depth, reads_input))
        return torch.arange(first, first + count)

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Say that ids which meet at the same position live or die together; 0 meets nothing."""
        left, right = torch.broadcast_tensors(left, right)
        for dim in range(left.ndim):
            if left.shape[dim] > 1 and left.stride(dim) == 0 and right.stride(dim) == 0:
                left, right = left.narrow(dim, 0, 1), right.narrow(dim, 0, 1)
        both = (left > 0) & (right > 0) & (left != right)
        if bool(both.any()):
            self.record.edges.append((left[both], right[both]))

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Say that these channels must stay, and why."""
        ids = distinct(ids)
        if ids.numel():
            where = self.where()
            self.record.frozen.append((ids, f"{reason} at {where}" if where else reason))

    def mark_reshaped(self, ids: Tensor, operator: str) -> None:
        """Remember ids that went through an operator with sizes, which the code may have hard-coded."""
        ids = distinct(ids)
        if ids.numel():
            self.record.reshaped.append((ids, f"{operator} at {self.where() or 'the top'}"))

    def add_slot(self, tensor: str, axis: int, ids: Tensor, role: Role) -> None:
        """Record that ``ids`` lie along ``axis`` of the parameter ``tensor``."""
        self.record.slots.append(RawSlot(tensor, axis, ids, role))

    def make_opaque(self, result: Any, why: str) -> None:
        """Remember that these tensors come from parameters or from operators without a rule."""
        for tensor in tensors_in(result):
            self._opaque[tensor.untyped_storage()._cdata] = why

    def layer_ids(self, weight: str) -> tuple[Tensor, Tensor] | None:
        """Input and output ids of a weight that was used before."""
        return self._layer_ids.get(weight)

    def remember_layer(self, weight: str, ids_in: Tensor, ids_out: Tensor) -> None:
        """Keep the ids of the first use of a weight, for later uses to join."""
        self._layer_ids[weight] = (ids_in, ids_out)

    def where(self) -> str:
        """Dotted name of the innermost module that is running."""
        return self.module_stack[-1] if self.module_stack else ""

    # -- execution --------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator on the tensors, then its rule on the shadows."""
        from prune_mm.graph.rules import apply_rule

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._alive.extend(tensors_in(result))
        operands = tensors_in((args, kwargs))
        if any(_geometry(t) in self._shadows or self.is_parameter_view(t) for t in operands):
            apply_rule(self, func, args, kwargs, result)
        return result

    @contextmanager
    def names_on_stack(self) -> Iterator[None]:
        """Keep ``module_stack`` up to date while the module runs."""
        handles = []
        for name, child in self.module.named_modules():
            if name:
                handles.append(child.register_forward_pre_hook(self._push(name)))
                handles.append(child.register_forward_hook(self._pop, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _push(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.module_stack.append(name)

        return hook

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.module_stack.pop()


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def distinct(ids: Tensor) -> Tensor:
    """The different non-zero ids of a shadow, sorted."""
    for dim in range(ids.ndim):
        if ids.shape[dim] > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    ids = torch.unique(ids)
    return ids[ids > 0]


def varies(ids: Tensor, dim: int) -> bool:
    """Whether different ids follow each other along ``dim``."""
    if ids.shape[dim] <= 1 or ids.stride(dim) == 0:
        return False
    return bool((ids != ids.narrow(dim, 0, 1)).any())
