"""What a structure is: a decision with a masked and a compact form that compute the same function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

_STRUCTURES: dict[str, type[Structure]] = {}
S = TypeVar("S", bound="type[Structure]")


class Structure(ABC):
    """One decision about one place of a network.

    A structure knows torch only. It masks a dense module, says what its compact form cuts and how the module is
    rewritten after the cut, and is written to and read from plain JSON data. Several structures that are decided
    together form a stage of a :class:`~prune_mm.structures.plan.Plan`: their masks and cuts refer to the network
    before the stage, so a layer that reads two groups is cut once.
    """

    kind: ClassVar[str]
    #: Whether it adds to a network, without changing what it computes, what another stage then cuts.
    attaches: ClassVar[bool] = False
    name: str

    @abstractmethod
    def apply_mask(self, module: nn.Module) -> None:
        """Give the parameters of ``module`` the masked form, in place, shapes unchanged."""

    @abstractmethod
    def cuts(self) -> list[tuple[str, int, Tensor]]:
        """What the compact form leaves out: ``(tensor name, axis, boolean vector of what stays)``."""

    def orders(self) -> list[tuple[str, int, Tensor]]:
        """How the compact form is re-arranged: ``(tensor name, axis, old index per new index)``."""
        return []

    def claims(self) -> list[str]:
        """Tensors and modules that :meth:`rewrite` lays out anew, and that nothing else of the stage may touch."""
        return []

    def within(
        self, cuts: dict[tuple[str, int], Tensor], orders: dict[tuple[str, int], Tensor] | None = None
    ) -> Structure:
        """The structure to cut and rewrite with beside the rest of its stage.

        Args:
            cuts: what the others leave of every tensor axis.
            orders: how the others re-arrange it.
        """
        return self

    def check(self, module: nn.Module) -> None:
        """Make sure before anything is cut that :meth:`rewrite` can work.

        Raises:
            ValueError: naming the module, when it is not the one the structure was made for.
        """

    def prepare(self, module: nn.Module) -> None:
        """Whatever the compact form needs before the cuts of the stage are made, in place."""

    def rewrite(self, module: nn.Module) -> None:
        """Whatever the compact form needs beyond its cuts, in place, after all cuts of the stage are made."""

    def reshape(self, shapes: dict[str, list[int]]) -> None:
        """Whatever :meth:`rewrite` changes about the sizes of weights, for exact MACs without building anything."""

    def place(self, positions: dict[str, int]) -> None:
        """Whatever :meth:`rewrite` changes about the positions weights are applied at, for the same purpose."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with the key ``type``."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: dict[str, Any]) -> Structure:
        """Read back what :meth:`to_dict` wrote.

        Raises:
            ValueError: when a value is out of range.
            KeyError: when a key is missing.
        """


def register_structure(cls: S) -> S:
    """Make a structure readable from plans by its ``kind``."""
    _STRUCTURES[cls.kind] = cls
    return cls


def structure_from_dict(data: Any) -> Structure:
    """Read one structure of a plan.

    Raises:
        ValueError: naming what is wrong with the data.
    """
    if not isinstance(data, dict):
        raise ValueError(f"damaged plan: a structure must be a table, got {type(data).__name__}")
    kind = data.get("type")
    if not isinstance(kind, str) or kind not in _STRUCTURES:
        raise ValueError(f"damaged plan: unknown structure type {kind!r}; known: {', '.join(sorted(_STRUCTURES))}")
    try:
        return _STRUCTURES[kind].from_dict(data)
    except KeyError as error:
        raise ValueError(f"damaged {kind} {str(data.get('name'))[:80]!r}: the key {error} is missing") from error
    except TypeError as error:
        raise ValueError(f"damaged {kind} {str(data.get('name'))[:80]!r}: {error}") from error


def text(value: Any, what: str) -> str:
    """Check a piece of text.

    Raises:
        ValueError: naming ``what``.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, got {value!r:.80}")
    return value


def number(value: Any, low: int, high: int, what: str) -> int:
    """Check an integer in ``low..high``.

    Raises:
        ValueError: naming ``what`` and the offending value.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} must be an integer in {low}..{high}, got {value!r:.80}")
    return value


def index_list(values: Any, length: int, what: str) -> tuple[int, ...]:
    """Check a strictly ascending list of indices in ``range(length)``.

    Raises:
        ValueError: naming ``what`` and the offending value.
    """
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise ValueError(f"{what} must be a list of integers")
    if values and (values[0] < 0 or values[-1] >= length or any(a >= b for a, b in zip(values, values[1:]))):
        raise ValueError(f"{what} must be ascending indices below {length}")
    return tuple(values)


def permutation(values: Any, what: str) -> tuple[int, ...]:
    """Check a permutation of ``range(len(values))``.

    Raises:
        ValueError: naming ``what``.
    """
    if not isinstance(values, (list, tuple)) or not all(type(v) is int for v in values):
        raise ValueError(f"{what} must be a list of integers")
    if sorted(values) != list(range(len(values))) or not values:
        raise ValueError(f"{what} must hold every index below its length, {len(values)}, once")
    return tuple(values)
