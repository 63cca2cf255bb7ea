"""Dense against compact, as a table for the terminal and for markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rich import box
from rich.table import Table
from rich.text import Text

Value: TypeAlias = float | None
#: Name, dense value, compact value, and one of :data:`FORMATS`. None: not measured.
Row: TypeAlias = tuple[str, Value, Value, str]

MISSING = "–"
_COLUMNS = ("", "dense", "compact", "change")


@dataclass(frozen=True)
class _Format:
    """How a quantity is written; costs change by a share and are better when lower, scores by a difference."""

    show: Callable[[float, float], str]
    is_score: bool = False


def _macs(value: float, reference: float) -> str:
    # The unit of the larger value serves the whole row, unless the smaller one would lose its digits.
    unit = reference if abs(value) * 100 >= abs(reference) else value
    size, letter = next(((s, x) for s, x in ((1e9, "G"), (1e6, "M"), (1e3, "K")) if abs(unit) >= s), (1.0, ""))
    return f"{value / size:,.3f} {letter}" if letter else f"{value:,.0f}"


def _params(value: float, reference: float) -> str:
    return f"{value / 1e6:,.3f} M" if abs(value) >= 1e4 or value == 0 else f"{value:,.0f}"


def _bytes(value: float, reference: float) -> str:
    return f"{value / 1e6:,.2f} MB" if abs(value) >= 1e4 or value == 0 else f"{value:,.0f} B"


#: Formats of a row: multiply-adds, parameters, milliseconds, bytes (1 MB = 10^6 bytes), average precision, percent
#: right, plain count.
FORMATS: dict[str, _Format] = {
    "macs": _Format(_macs),
    "params": _Format(_params),
    "ms": _Format(lambda value, _: f"{value:,.2f} ms"),
    "bytes": _Format(_bytes),
    "ap": _Format(lambda value, _: f"{value:.3f}", is_score=True),
    "percent": _Format(lambda value, _: f"{value:.2f}", is_score=True),
    "count": _Format(lambda value, _: f"{value:,.0f}"),
}


def comparison_table(title: str, rows: Sequence[Row]) -> Table:
    """Dense against compact for a terminal, at most 80 columns wide with ordinary names.

    The last column holds the change from dense to compact: a percentage for costs, a difference for scores (``ap``);
    green where compact is better, red where it is worse.

    Args:
        title: heading; empty for none.
        rows: ``(name, dense value, compact value, format)`` with raw numbers (MACs, elements, milliseconds, bytes, AP
            between 0 and 1); None is a value nobody measured.

    Raises:
        ValueError: for a format that is not in :data:`FORMATS`.
    """
    # Text, not str: a name like "conv[0]" is not markup.
    heading = Text(title, style="bold") if title else None
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(_COLUMNS[0], overflow="fold")
    for column in _COLUMNS[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        name, dense, compact, change = _cells(row)
        table.add_row(Text(name), dense, compact, Text(change, style=_style(row, change)))
    return table


def to_markdown(title: str, rows: Sequence[Row]) -> str:
    """The table of :func:`comparison_table` as GitHub markdown, with the title in bold above it.

    Raises:
        ValueError: for a format that is not in :data:`FORMATS`.
    """
    cells = [_COLUMNS, *(tuple(cell.replace("|", "\\|") for cell in _cells(row)) for row in rows)]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(_COLUMNS))]
    lines = [_markdown_line(line, widths) for line in cells]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    heading = [f"**{title}**", ""] if title else []
    return "\n".join([*heading, lines[0], rule, *lines[1:]]) + "\n"


def _markdown_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
    return f"| {' | '.join(aligned)} |"


def _cells(row: Row) -> tuple[str, str, str, str]:
    name, dense, compact, kind = row
    if kind not in FORMATS:
        raise ValueError(f"unknown format '{kind}' of row '{name}', choose one of {', '.join(FORMATS)}")
    reference = max((abs(value) for value in (dense, compact) if value is not None), default=0.0)
    shown = [MISSING if value is None else FORMATS[kind].show(value, reference) for value in (dense, compact)]
    return name, shown[0], shown[1], _change(dense, compact, kind)


def _change(dense: Value, compact: Value, kind: str) -> str:
    if dense is None or compact is None:
        return MISSING
    if FORMATS[kind].is_score:
        # What one reads is the difference of what one reads, without a minus before zero.
        return _signed(round(compact, 3) - round(dense, 3), 3)
    return f"{_signed((compact / dense - 1) * 100, 1)} %" if dense else MISSING


def _signed(value: float, digits: int) -> str:
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def _style(row: Row, change: str) -> str:
    if change[0] not in "+-":
        return "dim"
    return "green" if (change[0] == "+") == FORMATS[row[3]].is_score else "red"
