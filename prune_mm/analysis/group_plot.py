"""A picture of a group configuration: groups, weights left and norm kept, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, PercentFormatter

_DENSE, _LEFT, _TEXT, _GRID = "#d6dbe3", "#2f6db5", "#3a3f47", "#e6e9ee"


@dataclass(frozen=True)
class GroupBar:
    """One layer of the picture.

    Attributes:
        name: of the layer.
        groups: its group count.
        dense: weights of the dense layer.
        left: weights that are left.
        kept: share of its kernel norm that is kept, in [0, 1].
    """

    name: str
    groups: int
    dense: int
    left: int
    kept: float


def check_image_path(path: str | os.PathLike) -> None:
    """Look at the name of an image before anything is computed for it.

    Raises:
        ValueError: its ending is no format that matplotlib writes.
    """
    known = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"'{path}' must end in a format of images: .{', .'.join(sorted(known))}")


def plot_groups(path: str | os.PathLike, bars: Sequence[GroupBar], title: str) -> None:
    """Draw the group count, the weights and the kept norm of every layer as an image.

    Args:
        path: file to write; its ending says the format, such as ``.png`` or ``.pdf``. Its folder is created.
        bars: layers, from the top.
        title: heading, one line or a few.

    Raises:
        ValueError: there are no layers, or the ending is no format that matplotlib writes.
    """
    if not bars:
        raise ValueError("there are no layers to draw")
    check_image_path(path)
    figure = Figure(figsize=(11, 1.5 + 0.2 * max(len(bars), 6)), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    figure.suptitle(title, color=_TEXT, fontsize=12, x=0.01, ha="left")
    for axes, heading in ((left, "groups"), (middle, "weights, dense and left"), (right, "norm kept")):
        _prepare(axes, heading, len(bars))
    left.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=8, color=_TEXT)
    left.set_ylim(len(bars) - 0.4, -0.6)
    _draw_groups(left, bars)
    _draw_weights(middle, bars)
    right.hlines(range(len(bars)), [bar.kept for bar in bars], 1.0, color=_DENSE, linewidth=2)
    right.scatter([bar.kept for bar in bars], range(len(bars)), color=_LEFT, s=18, zorder=3)
    right.set_xlim(0, 1.03)
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _prepare(axes: Axes, heading: str, rows: int) -> None:
    """Heading, scale above and below, and faint lines to follow."""
    axes.set_title(heading, fontsize=10, color=_TEXT, loc="left")
    axes.tick_params(axis="x", labelsize=8, labelcolor=_TEXT, length=0, labeltop=rows > 30)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for row in range(0, rows, 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f7f8fa", zorder=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_groups(axes: Axes, bars: Sequence[GroupBar]) -> None:
    """Bars on a scale of powers of two, from half a step before 1 so that a dense layer shows too."""
    counts, start = [bar.groups for bar in bars], 2**-0.35
    colors = [_LEFT if count > 1 else _DENSE for count in counts]
    axes.set_xscale("log", base=2)
    axes.barh(range(len(bars)), [count - start for count in counts], left=start, height=0.62, color=colors)
    for row, count in enumerate(counts):
        text = str(count) if count > 1 else "dense"
        axes.annotate(
            text, (count, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7, color=_TEXT
        )
    most = max(max(counts), 2)
    axes.set_xlim(start, most * 1.5)
    axes.xaxis.set_major_locator(FixedLocator([2**power for power in range(most.bit_length())]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _draw_weights(axes: Axes, bars: Sequence[GroupBar]) -> None:
    """Weights left over the weights of the dense layer."""
    rows = range(len(bars))
    axes.barh(rows, [bar.dense for bar in bars], height=0.62, color=_DENSE, label="dense")
    axes.barh(rows, [bar.left for bar in bars], height=0.62, color=_LEFT, label="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.legend(fontsize=8, frameon=False, labelcolor=_TEXT, loc="best")


def _short(value: float) -> str:
    size, letter = next(((size, letter) for size, letter in ((1e6, " M"), (1e3, " k")) if value >= size), (1, ""))
    return f"{value / size:g}{letter}"
