"""Dense against compact, for a terminal and for markdown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from prune_mm.analysis.table import Row, comparison_table, to_markdown

ROWS: list[Row] = [
    ("MACs", 4_089_184_256, 1_642_201_088, "macs"),
    ("parameters", 25_557_032, 12_381_864, "params"),
    ("file", 102_441_032, 49_740_360, "bytes"),
    ("latency, batch 1, 2 threads", 64.31, 40.123, "ms"),
    ("box AP", 0.382, 0.3797, "ap"),
    ("channels", 26_560, 13_280, "count"),
]


def draw(table: Table, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def change(*row: object) -> str:
    return to_markdown("", [("x", *row)]).splitlines()[-1].split("|")[4].strip()


def values(*row: object) -> tuple[str, str]:
    cells = to_markdown("", [("x", *row)]).splitlines()[-1].split("|")
    return cells[2].strip(), cells[3].strip()


def test_terminal_at_80_columns():
    assert [line.rstrip() for line in draw(comparison_table("Mask R-CNN R50", ROWS)).splitlines()] == [
        "Mask R-CNN R50",
        "                                  dense    compact    change",
        "─" * 60,
        "MACs                            4.089 G    1.642 G   -59.8 %",
        "parameters                     25.557 M   12.382 M   -51.6 %",
        "file                          102.44 MB   49.74 MB   -51.4 %",
        "latency, batch 1, 2 threads    64.31 ms   40.12 ms   -37.6 %",
        "box AP                            0.382      0.380    -0.002",
        "channels                         26,560     13,280   -50.0 %",
    ]


def test_a_long_name_wraps_and_numbers_stay_whole():
    drawn = draw(comparison_table("", [("a long name of a model " * 5, *ROWS[0][1:])]))
    assert all(len(line) <= 80 for line in drawn.splitlines())
    assert "4.089 G   1.642 G   -59.8 %" in drawn


def test_names_are_not_markup():
    assert "conv[0] [bold]" in draw(comparison_table("[red]t[/red]", [("conv[0] [bold]", 1, 1, "count")]))
    assert "[red]t[/red]" in draw(comparison_table("[red]t[/red]", ROWS))


def test_markdown():
    assert to_markdown("Mask R-CNN R50", [*ROWS[:1], ("AP a|b", 0.4, None, "ap")]) == (
        "**Mask R-CNN R50**\n"
        "\n"
        "|         |   dense | compact |  change |\n"
        "|---------|--------:|--------:|--------:|\n"
        "| MACs    | 4.089 G | 1.642 G | -59.8 % |\n"
        "| AP a\\|b |   0.400 |       – |       – |\n"
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((4_089_184_256, 608_502_988, "macs"), ("4.089 G", "0.609 G")),
        ((4_089_184_256, 2_400_000, "macs"), ("4.089 G", "2.400 M")),
        ((43_000_000, 21_500_000, "macs"), ("43.000 M", "21.500 M")),
        ((999, 12, "macs"), ("999", "12")),
        ((0, None, "macs"), ("0", "–")),
        ((8_412, 411, "params"), ("8,412", "411")),
        ((1_234_567_890, 10_000, "params"), ("1,234.568 M", "0.010 M")),
        ((49_740_360, 512, "bytes"), ("49.74 MB", "512 B")),
        ((1234.567, 0.004, "ms"), ("1,234.57 ms", "0.00 ms")),
        ((0.3825, 0.38149, "ap"), ("0.383", "0.381")),
    ],
)
def test_units(row: tuple, expected: tuple[str, str]):
    assert values(*row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((100, 50, "macs"), "-50.0 %"),
        ((100, 100, "macs"), "0.0 %"),
        ((100_000, 99_999, "params"), "0.0 %"),
        ((40.0, 44.0, "ms"), "+10.0 %"),
        ((0, 5, "count"), "–"),
        ((None, 5, "count"), "–"),
        ((0.382, 0.3797, "ap"), "-0.002"),
        ((0.3818, 0.3822, "ap"), "0.000"),
        ((0.0, 0.1, "ap"), "+0.100"),
    ],
)
def test_change(row: tuple, expected: str):
    assert change(*row) == expected


@pytest.mark.parametrize(
    ("row", "style"),
    [
        ((2, 1, "ms"), "green"),
        ((1, 2, "ms"), "red"),
        ((0.1, 0.2, "ap"), "green"),
        ((0.2, 0.1, "ap"), "red"),
        ((0.2, None, "ap"), "dim"),
    ],
)
def test_colours_say_what_is_better(row: tuple, style: str):
    (cell,) = comparison_table("", [("x", *row)]).columns[3].cells
    assert cell.style == style


@pytest.mark.parametrize("function", [comparison_table, to_markdown])
def test_unknown_format(function):
    with pytest.raises(ValueError, match="unknown format 'flops' of row 'MACs'"):
        function("", [("MACs", 1, 2, "flops")])
