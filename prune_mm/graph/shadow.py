"""Shadow execution: which channel does every element of every activation come from?

The real module runs once, in eval mode, inside a :class:`ShadowTracer`. Beside each activation walks a *shadow*: an
int64 tensor of the same shape that holds, per element, the id of the channel it came from (0: no channel).
The rules in :mod:`prune_mm.graph.rules` say what each operator does to the shadows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from prune_mm.graph.record import Block, RawSlot, Shadow, TraceRecord
from prune_mm.graph.tensors import distinct, tensors_in, tensors_of
from prune_mm.structures.slots import Role

#: Factories whose result holds nothing yet. A module that returns one that no visible operator has written to was
#: computed by a kernel the dispatcher does not see.
_FACTORIES = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "zeros",
    "zeros_like",
    "new_zeros",
}

_UNSEEN = "passes through code that the tracer cannot see (a compiled kernel)"


@dataclass(frozen=True)
class _Opaque:
    """A tensor without channels that was computed from parameters ``names``, ``depth`` weight layers deep."""

    names: frozenset[str]
    depth: int


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def operator_name(func: Any) -> str:
    """``add`` for ``aten::add_.Tensor``."""
    return func._schema.name.split("::")[-1].rstrip("_")


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
        self._stack: list[tuple[str, list[Tensor]]] = []
        self._shadows: dict[int, dict[tuple[Any, ...], Shadow]] = {}
        # Tensors stay referenced for the length of the trace, so that no storage address is used twice.
        self._alive: list[Tensor] = []
        self._opaque: dict[int, _Opaque] = {}
        self._seen: set[int] = set()
        self._blank: set[int] = set()
        self._starts: list[int] = []
        self._slots: dict[tuple[str, int], RawSlot] = {}
        self._layer_ids: dict[str, tuple[Tensor, Tensor]] = {}
        self._vector_ids: dict[str, Tensor] = {}
        self._names: dict[int, tuple[str, Tensor]] = {}
        self._tied: dict[str, str] = {}
        for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            self._names.setdefault(_storage(tensor), (name, tensor))
            # One module under two names is cut once for both; one parameter in two modules is not.
            first = self.tied_to(name, tensor)
            if first is not None:
                self._tied[first] = name

    def _owner(self, name: str) -> nn.Module:
        return self.module.get_submodule(name.rpartition(".")[0])

    # -- what rules ask ---------------------------------------------------------------------------------------

    def name_of(self, tensor: Any) -> str | None:
        """Name of the parameter or buffer that ``tensor`` is, or None for anything else (views included)."""
        if not isinstance(tensor, Tensor):
            return None
        name, own = self._names.get(_storage(tensor), (None, None))
        return name if own is not None and _geometry(own) == _geometry(tensor) else None

    def name_of_transposed(self, tensor: Tensor) -> str | None:
        """Name of the 2-D parameter whose transpose ``tensor`` is."""
        name, own = self._names.get(_storage(tensor), (None, None))
        if own is None or own.ndim != 2 or tensor.ndim != 2:
            return None
        return name if _geometry(own.t()) == _geometry(tensor) else None

    def names_behind(self, tensor: Tensor) -> frozenset[str]:
        """Names of the parameters that a tensor without channels is a view of, or was computed from."""
        storage = _storage(tensor)
        if storage in self._names:
            return frozenset({self._names[storage][0]})
        return self._opaque[storage].names if storage in self._opaque else frozenset()

    def shadow(self, tensor: Tensor) -> Shadow | None:
        """Shadow of an activation; None: it holds no channels."""
        return self._shadows.get(_storage(tensor), {}).get(_geometry(tensor))

    def operand_shadow(self, tensor: Tensor) -> Shadow | None:
        """As :meth:`shadow`; a vector parameter (a layer scale) that is used as an operand gets ids of its own."""
        held = self.shadow(tensor)
        if held is not None:
            return held
        name = self.name_of(tensor)
        is_vector = sum(size != 1 for size in tensor.shape) == 1
        if name is None or not is_vector or not tensor.dtype.is_floating_point:
            return None
        is_parameter = isinstance(self._names[_storage(tensor)][1], nn.Parameter)
        ids = self._vector_ids.get(name)
        if ids is None:
            axis = max(range(tensor.ndim), key=lambda d: tensor.shape[d])
            flat = self.fresh(tensor.numel(), layer=None, vector=True)
            ids = self._vector_ids[name] = flat.view(tensor.shape)
            self.add_slot(name, axis, flat, "scale" if is_parameter else "mean")
        return Shadow(ids, zero=is_parameter, depth=0)

    def depth(self, operands: Any) -> int:
        """Number of weight layers behind the deepest of the tensors."""
        depths = [0]
        for tensor in tensors_in(operands):
            shadow, opaque = self.shadow(tensor), self._opaque.get(_storage(tensor))
            depths.append(shadow.depth if shadow else opaque.depth if opaque else 0)
        return max(depths)

    def has_views(self, tensor: Tensor) -> bool:
        """Whether other views of the tensor's memory have shadows."""
        return any(key != _geometry(tensor) for key in self._shadows.get(_storage(tensor), {}))

    def was_used(self, parameter: Tensor) -> bool:
        """Whether a visible operator has read a parameter."""
        return _storage(parameter) in self._seen or any(n in self.record.lost for n in self.names_behind(parameter))

    def block_of(self, ids: Tensor) -> int | None:
        """Index of the block all ids of a shadow belong to; None when they come from several."""
        present = distinct(ids)
        if not present.numel():
            return None
        index = bisect_right(self._starts, int(present[0])) - 1
        block = self.record.blocks[index]
        return index if int(present[-1]) < block.first + block.count else None

    def first_name(self, parameter: Tensor) -> str:
        """The first of the names of a parameter."""
        return self._names[_storage(parameter)][0]

    def tied_to(self, name: str, parameter: Tensor) -> str | None:
        """Name of the parameter of another module that is the same tensor."""
        first = self.first_name(parameter)
        return first if first != name and self._owner(first) is not self._owner(name) else None

    # -- what rules do ----------------------------------------------------------------------------------------

    def set_shadow(self, tensor: Tensor, shadow: Shadow) -> None:
        """Attach a shadow to a result; a write that makes dead channels non-zero shows in every view of the memory."""
        views = self._shadows.setdefault(_storage(tensor), {})
        if not shadow.zero:
            views.update({key: replace(view, zero=False) for key, view in views.items() if view.zero})
        views[_geometry(tensor)] = shadow

    def fresh(
        self, count: int, layer: str | None, depth: int = 0, reads_input: bool = False, vector: bool = False
    ) -> Tensor:
        """New ids ``(count,)`` that belong together; ``layer`` names the weight that makes them."""
        first = self.record.next_id
        self.record.next_id += count
        self.record.blocks.append(Block(first, count, layer, depth, reads_input, vector))
        self._starts.append(first)
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

    def slot(self, tensor: str, axis: int) -> RawSlot | None:
        """The slot of a parameter axis, when the parameter was used before."""
        return self._slots.get((tensor, axis))

    def add_slot(self, tensor: str, axis: int, ids: Tensor, role: Role) -> None:
        """Record that ``ids`` lie along ``axis`` of the parameter ``tensor``; only its first use makes a slot."""
        if (tensor, axis) in self._slots:
            return
        slot = self._slots[tensor, axis] = RawSlot(tensor, axis, ids, role)
        self.record.slots.append(slot)
        if tensor in self._tied:
            self.freeze(ids, f"'{tensor}' is tied to '{self._tied[tensor]}'")

    def lose(self, names: Iterable[str], reason: str) -> None:
        """Remember parameters that were used in a way no slot describes."""
        where = self.where()
        for name in names:
            self.record.lost.setdefault(name, f"{reason} at {where}" if where else reason)

    def make_opaque(self, result: Any, operands: Any) -> None:
        """Remember that these tensors hold no channels, and which parameters they come from."""
        names = frozenset().union(*(self.names_behind(t) for t in tensors_in(operands)))
        opaque = _Opaque(names, self.depth(operands))
        for tensor in tensors_in(result):
            self._opaque.setdefault(_storage(tensor), opaque)

    def layer_ids(self, weight: str) -> tuple[Tensor, Tensor] | None:
        """Input and output ids of a weight that was used before."""
        return self._layer_ids.get(weight)

    def remember_layer(self, weight: str, ids_in: Tensor, ids_out: Tensor) -> None:
        """Keep the ids of the first use of a weight, for later uses to join."""
        self._layer_ids[weight] = (ids_in, ids_out)

    def where(self) -> str:
        """Dotted name of the innermost module that is running."""
        return self._stack[-1][0] if self._stack else ""

    # -- execution --------------------------------------------------------------------------------------------

    def add_input(self, tensor: Tensor) -> None:
        """Say that a tensor comes from outside: it holds no channels that could be removed."""
        self._alive.append(tensor)
        self._seen.add(_storage(tensor))
        ids = torch.zeros(1, dtype=torch.int64).expand(tensor.shape)
        self.set_shadow(tensor, Shadow(ids, zero=False, depth=0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator on the tensors, then its rule on the shadows."""
        from prune_mm.graph.rules import apply_rule

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results, operands = tensors_in(result), tensors_in((args, kwargs))
        self._alive.extend(results)
        self._note_storages(func, operands, results)
        if any(
            self.shadow(t) is not None or _storage(t) in self._names or _storage(t) in self._opaque for t in operands
        ):
            apply_rule(self, func, args, kwargs, result)
        return result

    def _is_known(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        return storage in self._names or storage in self._opaque or self.shadow(tensor) is not None

    def _note_storages(self, func: Any, operands: list[Tensor], results: list[Tensor]) -> None:
        """Keep track of memory that no visible operator has written to: blank, or from outside."""
        read, made = {_storage(t) for t in operands}, {_storage(t) for t in results}
        self._blank |= read - self._seen - self._names.keys()
        self._seen |= read | made
        if func._schema.is_mutable:
            self._blank -= made
        elif operator_name(func) in _FACTORIES or read & self._blank:
            self._blank |= made

    @contextmanager
    def names_on_stack(self) -> Iterator[None]:
        """Keep track of the running module, and look at what modules return, while the module runs."""
        handles = []
        for name, child in self.module.named_modules():
            handles.append(child.register_forward_pre_hook(self._push(name), with_kwargs=True))
            handles.append(child.register_forward_hook(self._pop, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _push(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append((name, tensors_in((args, kwargs))))

        return hook

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        with _disable_current_modes():
            if any(self._is_unexplained(tensor) for tensor in tensors_of(output)):
                self._freeze_unseen(module, output)
        self._stack.pop()

    def _is_unexplained(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        return not self._is_known(tensor) and (storage in self._blank or storage not in self._seen)

    def _freeze_unseen(self, module: nn.Module, output: Any) -> None:
        """The running module returns what no visible operator computed: all it reads must stay."""
        name, operands = self._stack[-1]
        for tensor in operands:
            shadow = self.shadow(tensor)
            if shadow is not None:
                self.freeze(shadow.ids, _UNSEEN)
        own = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
        self.lose([key for key in own if not any(slot.tensor == key for slot in self.record.slots)], _UNSEEN)
        self.make_opaque([t for t in tensors_of(output) if self._is_unexplained(t)], operands)
