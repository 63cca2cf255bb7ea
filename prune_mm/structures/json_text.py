"""JSON that may come from anyone: read within bounds, and refused with one clear error."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

#: Longest text, in characters (bytes of a file). The plan of a large network has a few million.
MAX_TEXT = 1 << 25
#: Deepest nesting; a plan has seven levels.
MAX_DEPTH = 16
#: Longest number, in digits.
MAX_DIGITS = 40


def read_json(text: Any, not_finite: bool = False) -> Any:
    """Parse JSON text strictly.

    Refused besides what is no JSON: more than :data:`MAX_TEXT` characters, more than :data:`MAX_DEPTH` levels, a key
    that is there twice, NaN, Infinity and numbers that do not fit.

    Args:
        text: to parse.
        not_finite: read NaN and Infinity as None instead.

    Raises:
        ValueError: one line saying what is wrong.
    """
    if not isinstance(text, str):
        raise ValueError(f"it must be text, got {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise ValueError(f"it has {len(text)} characters, at most {MAX_TEXT} are read")
    try:
        data = json.loads(
            text, object_pairs_hook=_table, parse_int=_whole, parse_float=_fraction,
            parse_constant=_nothing if not_finite else _no_constant,
        )  # fmt: skip
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(one_line(error)) from error
    _check_depth(data)
    return data


def read_json_file(path: str | os.PathLike, not_finite: bool = False) -> Any:
    """Parse a JSON file strictly; see :func:`read_json`.

    Raises:
        ValueError: one line saying what is wrong, without the name of the file.
    """
    return read_json(read_text(path), not_finite)


def read_text(path: str | os.PathLike, most: int = MAX_TEXT) -> str:
    """The text of a UTF-8 file of at most ``most`` bytes.

    Raises:
        ValueError: one line saying what is wrong, without the name of the file.
    """
    with Path(path).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes, at most so many are read")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error


def one_line(message: Any, most: int = 300) -> str:
    """A message on one line of printable characters: parts of it may come from the file it is about."""
    text = str(message)[: 4 * most]
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else f"{text[:most]} ..."


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the name '{one_line(twin, 80)}' is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _nothing(name: str) -> None:
    return None


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _fraction(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:MAX_DIGITS]} is too large")
    return number


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for node in level
            if isinstance(node, (dict, list))
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
