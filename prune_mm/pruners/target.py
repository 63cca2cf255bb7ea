"""Budgets: how small the pruned scope must become."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("macs", "params", "channels")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Target:
    """A budget for the scope that is pruned.

    Attributes:
        kind: ``macs`` (multiply-adds of one image), ``params``, ``channels`` (of the prunable layers), or ``weights``
            (of the convolutions that can be divided into groups).
        value: a share of the dense scope in (0, 1], or an absolute number (an int, or text such as ``'2.05G'``).
    """

    kind: str
    value: float | int

    @classmethod
    def parse(cls, given: Any, kinds: Sequence[str] = KINDS) -> Target:
        """Read ``dict(macs=0.5)`` and its relatives.

        Args:
            given: a table with one of ``kinds``, or a target.
            kinds: what the method can count.

        Raises:
            ValueError: naming the value and what would be right.
        """
        if isinstance(given, cls):
            given = {given.kind: given.value}
        if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in kinds:
            raise ValueError(f"target must be a dict with one of the keys {', '.join(kinds)}, got {given!r}")
        kind, value = next(iter(given.items()))
        if isinstance(value, str):
            match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)\s*", value)
            if match is None:
                raise ValueError(f"target {kind}={value!r} is not a number such as '2.05G' or '900M'")
            return cls(kind, round(float(match[1]) * _UNITS[match[2]]))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"target {kind}={value!r} must be a number")
        if isinstance(value, float) and not 0.0 < value <= 1.0:
            raise ValueError(
                f"target {kind}={value!r} must be a share in (0, 1]; write an absolute budget as an int or '2.05G'"
            )
        if value <= 0:
            raise ValueError(f"target {kind}={value!r} must be positive")
        return cls(kind, 1.0 if value == 1 else value)

    def check(self, dense: int) -> None:
        """Raise ValueError when an absolute budget is above the cost of the dense scope."""
        if isinstance(self.value, int) and self.value > dense:
            raise ValueError(f"target {self} is above the dense scope, which has {dense:,} {self.noun}")

    def budget(self, dense: int) -> float:
        """The budget in the unit of ``dense``, the cost of the dense scope."""
        return self.value * dense if isinstance(self.value, float) else float(self.value)

    @property
    def noun(self) -> str:
        """The cost in a sentence: ``MACs``, ``params`` or ``channels``."""
        return "MACs" if self.kind == "macs" else self.kind

    def __str__(self) -> str:
        """As in a sentence: ``50 % of its MACs``."""
        return (
            f"{self.value * 100:g} % of its {self.noun}"
            if isinstance(self.value, float)
            else f"{self.value:,} {self.noun}"
        )
