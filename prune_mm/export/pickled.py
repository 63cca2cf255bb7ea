"""Reads the pickles inside files of ``torch.save`` as data: no class is imported, nothing in a file is called.

``torch.load(weights_only=True)`` keeps code out, but is not made to survive a hostile file: a key of nested tuples ends
the process, and what it calls can be made to run for hours. Here every name in a file stands for one small function of
the reader, which checks its arguments, and values are bounded in depth and in number. ``pickletools`` decodes the
operations; those that ``torch.save`` does not write are refused.
"""

from __future__ import annotations

import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Deepest nesting of containers.
MAX_DEPTH = 64
#: Most operations of one pickle. A tensor takes about thirty, a million are a few seconds of reading.
MAX_OPERATIONS = 1_000_000
#: What may be a key: hashing these does not follow references.
_KEYS = (str, int, float, type(None))
_LEAVES = (str, bytes, int, float, complex, type(None), set, np.generic, Tensor, torch.Size, torch.dtype, torch.device)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS_AND_TEXT = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
#: Python 2 called its built-in functions so, and protocol 2 still does.
_MODULES = {"__builtin__": "builtins"}


@dataclass(frozen=True)
class Function:
    """A name that a file may apply to arguments: ``call`` checks them, and raises ValueError."""

    call: Callable[..., Any]


class Built:
    """A value that a file makes first and gives its state later."""

    #: What stands in the result; None until it is built.
    value: Any = None

    def build(self, state: Any) -> None:
        """Check and take over the state.

        Raises:
            ValueError: naming what is wrong with it.
        """
        raise NotImplementedError


class UnknownName(ValueError):
    """A file names something that is not data the reader knows."""

    def __init__(self, name: str) -> None:
        """Keep the name for the message."""
        super().__init__(f"it holds a '{name[:80]}'")
        self.name = name[:80]


def read_pickle(data: Any, size: int, names: Mapping[str, Any], storage: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle, up to its end.

    Args:
        data: bytes, or a seekable binary file at the pickle's first byte.
        size: bytes of the file, which bound the work.
        names: what each dotted name in the pickle stands for.
        storage: makes a storage from its persistent id.

    Returns:
        Values as :func:`plain` allows.

    Raises:
        UnknownName: the pickle holds a name that ``names`` lacks.
        ValueError: saying what is wrong with it.
    """
    machine = _Machine(names, storage, 16 * size + 100_000)
    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name == "STOP":
            return _Plain(64 * number + 1000).of(machine.pop(), 0)
        if number > MAX_OPERATIONS:
            raise ValueError(f"it has more than {MAX_OPERATIONS} parts")
        machine.run(operation.name, argument)
    raise ValueError("a pickle has no end")


def is_key(value: Any) -> bool:
    """Whether a value may be a key or an element of a set."""
    return isinstance(value, _KEYS)


class _Machine:
    """The stack that the operations of a pickle work on."""

    def __init__(self, names: Mapping[str, Any], storage: Callable[[Any], Any] | None, budget: int) -> None:
        self.names, self.storage, self.budget = names, storage, budget
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _NUMBERS_AND_TEXT:
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        else:
            raise ValueError(f"torch.save does not write the operation {name}")

    def pop(self) -> Any:
        return self.stack.pop()

    def top(self) -> Any:
        return self.stack[-1]

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_since_mark(self, _: Any) -> None:
        items = tuple(self.since_mark())
        self.stack.append(items)

    def tuple_of(self, count: int) -> None:
        items = tuple(self.pop() for _ in range(count))
        self.stack.append(items[::-1])

    def extend(self, items: list[Any]) -> None:
        if type(self.top()) is not list:
            raise ValueError(f"it appends to a {type(self.top()).__name__}")
        self.top().extend(items)

    def set_items(self, items: list[Any]) -> None:
        table = self.top()
        if type(table) not in (dict, OrderedDict) or len(items) % 2:
            raise ValueError(f"it sets items of a {type(table).__name__}")
        for key, value in zip(items[::2], items[1::2]):
            if not is_key(key):
                raise ValueError(f"a key is a {type(key).__name__}")
            table[key] = value

    def name(self, argument: str) -> None:
        module, _, attribute = argument.partition(" ")
        name = f"{_MODULES.get(module, module)}.{attribute}"
        if name not in self.names:
            raise UnknownName(name)
        self.stack.append(self.names[name])

    def call(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise ValueError(f"it calls a {type(function).__name__}")
        self.pay(arguments)
        self.stack.append(function.call(*arguments))

    def build(self, _: Any) -> None:
        state, value = self.pop(), self.top()
        if isinstance(value, Built):
            self.pay(state)
            value.build(state)
        elif type(value) is OrderedDict and type(state) is dict and set(state) == {"_metadata"}:
            # Versions of a state dict's modules, which loading it looks at.
            value._metadata = state["_metadata"]
        else:
            raise ValueError(f"it gives a state to a {type(value).__name__}")

    def pay(self, arguments: Any) -> None:
        """A few bytes can hand the same long text to a function again and again."""
        for value in arguments if type(arguments) is tuple else ():
            self.budget -= len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 1
        if self.budget < 0:
            raise ValueError("it repeats itself beyond measure")

    def persistent(self, _: Any) -> None:
        if self.storage is None:
            raise ValueError("it refers to a storage")
        self.stack.append(self.storage(self.pop()))


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_since_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


class _Plain:
    """Puts the values of what was built into the result, and makes sure that walking through it ends.

    A file may refer to the same list many times, or to one from within itself, so its tree can be endless.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def of(self, value: Any, depth: int) -> Any:
        self.budget -= 1
        if depth > MAX_DEPTH or self.budget < 0:
            raise ValueError("it is nested too deeply, or refers to itself")
        if isinstance(value, Built):
            return value.value
        if type(value) in (dict, OrderedDict, Counter):
            for key, item in value.items():
                value[key] = self.of(item, depth + 1)
            if hasattr(value, "_metadata"):
                value._metadata = self.of(value._metadata, depth + 1)
        elif type(value) is list:
            value[:] = [self.of(item, depth + 1) for item in value]
        elif type(value) is tuple:
            return tuple(self.of(item, depth + 1) for item in value)
        elif not isinstance(value, _LEAVES):
            raise ValueError(f"it holds a {type(value).__name__} where data belongs")
        return value
