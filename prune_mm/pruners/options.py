"""Checks of a pruner's options: each raises ValueError naming the option, its value and what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any


def check_integer(name: str, value: Any, least: int) -> None:
    """A whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def check_share(name: str, value: Any) -> None:
    """A number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value!r} must be a share in [0, 1)")


def check_positive(name: str, value: Any) -> None:
    """A number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not value > 0.0:
        raise ValueError(f"{name}={value!r} must be a positive number")


def check_flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """One of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


def check_matches(name: str, patterns: Iterable[str], known: Iterable[str], noun: str = "layer") -> None:
    """Each regular expression matches one of the ``known`` names, from its start."""
    known = list(known)
    for pattern in patterns:
        if not any(re.match(pattern, item) for item in known):
            raise ValueError(f"{name} pattern '{pattern}' matches no {noun}; there are: {', '.join(known[:5])}, ...")


def check_patterns(name: str, value: Any) -> None:
    """A list of regular expressions."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(p, str) for p in value):
        raise ValueError(f"{name}={value!r} must be a list of regular expressions, such as ['layer4']")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: '{pattern}' is not a regular expression ({error})") from error
