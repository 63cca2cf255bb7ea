"""A report from anyone: shown, or refused with one line that names the file and what is wrong."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_mm.analysis import comparison_table, to_markdown
from prune_mm.analysis.report import layer_lines, read_metrics, read_report, report_rows

ROOT = Path(__file__).resolve().parents[2]
REPORT = {
    "model": "MaskRCNN", "scope": "backbone", "input_size": [64, 96], "pruner": "CHEX", "target": "macs=0.5",
    "law_relative_difference": 1e-7, "macs": {"dense": 100, "compact": 49}, "params": {"dense": 20, "compact": 9},
    "model_params": {"dense": 30, "compact": 19}, "bytes": {"dense": 120, "compact": 80},
    "gathers": {"unfolded": 3, "folded": 1},
    "layers": {"conv1.weight": {"dense": [8, 3, 3, 3], "compact": [4, 3, 3, 3], "positions": 9},
               "conv1.pair.weight": {"dense": None, "compact": [4, 2, 1, 1], "positions": 9}},
    "latency": [{"what": "backbone", "batch": 1, "device": "CPU", "threads": 1, "dense_ms": 2.0, "compact_ms": 1.0}],
    "metrics": {"masked": {"coco/bbox_mAP": 0.1, "coco/segm_mAP": None}, "compact": {"coco/bbox_mAP": 0.1}},
}  # fmt: skip


def write(folder, text) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return folder


def shown(report) -> str:
    rows = report_rows(report)
    comparison_table("", rows)
    return to_markdown("", rows) + str(layer_lines(report))


def test_a_report_is_read_and_shown(tmp_path):
    report = read_report(write(tmp_path, json.dumps(REPORT)))
    assert report == REPORT
    assert "box AP" in shown(report)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe", "not UTF-8"),
        ("[" * 10**6, "nested"),
        ("[" * 30 + "]" * 30, "nested more than 16 levels deep"),
        ("[]", "the report must be a table"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        (json.dumps({**REPORT, "macs": None}), "'macs' must be a table"),
        (json.dumps({**REPORT, "macs": {"dense": 1}}), "macs.compact must be a number, got NoneType"),
        (json.dumps({**REPORT, "macs": {"dense": True, "compact": 1}}), "macs.dense must be a number, got bool"),
        (json.dumps({**REPORT, "law_relative_difference": float("nan")}), "NaN is not a number"),
        (json.dumps({**REPORT, "input_size": [10**9, 10**9]}), "'input_size' must be two sides of at most 16384"),
        (json.dumps({**REPORT, "input_size": [64.0, 64]}), "'input_size'"),
        (json.dumps({**REPORT, "scope": "\x1b[2J"}), "'scope' must be a short text"),
        (json.dumps({**REPORT, "model": "a\nb"}), "'model' must be a short text"),
        (json.dumps({**REPORT, "layers": {"a": {"dense": 1, "compact": [1]}}}), "must have a list of sizes"),
        (json.dumps({**REPORT, "latency": [1]}), "an entry of 'latency' must be a table"),
        (json.dumps({**REPORT, "metrics": {"compact": {"coco/bbox_mAP": "x"}}}), "coco/bbox_mAP must be a number"),
        (json.dumps(REPORT).replace("100", "1" * 5000), "a number has 5000 digits"),
        (json.dumps(REPORT).replace("100", "1e400"), "is too large"),
    ],
)
def test_damage_is_named(text, words, tmp_path):
    with pytest.raises(ValueError, match=r".") as caught:
        read_report(write(tmp_path, text))
    assert type(caught.value) is ValueError
    assert str(tmp_path / "report.json") in str(caught.value)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_file_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("prune_mm.structures.json_text.MAX_TEXT", 1000)
    with pytest.raises(ValueError, match="characters, at most 1000"):
        read_report(write(tmp_path, json.dumps(REPORT | {"x": "a" * 2000})))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("[/bold]\x1b[2J"),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


def paths(node, path=()):
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from paths(value, (*path, key))


@given(st.sampled_from(list(paths(REPORT))), JUNK, st.booleans())
def test_any_change(tmp_path_factory, path, junk, delete):
    report = copy.deepcopy(REPORT)
    parent = report
    for key in path[:-1]:
        parent = parent[key]
    if delete:
        del parent[path[-1]]
    else:
        parent[path[-1]] = junk
    folder = write(tmp_path_factory.getbasetemp() / "any_report", json.dumps(report))
    try:
        found = read_report(folder)
    except ValueError as error:
        assert str(folder) in str(error)  # noqa: PT017
        return
    shown(found)


def test_metrics(tmp_path):
    (tmp_path / "m.json").write_text('{"accuracy/top1": 76.1, "other": NaN, "coco/bbox_mAP": -Infinity}')
    assert read_metrics(tmp_path / "m.json") == {"accuracy/top1": 76.1, "other": None, "coco/bbox_mAP": None}
    for text in ("", "[]", '{"accuracy/top1": "x"}', '{"accuracy/top1": [1]}'):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(ValueError, match=r"m\.json' holds no metrics: "):
            read_metrics(tmp_path / "m.json")
    with pytest.raises(FileNotFoundError, match="no metrics at"):
        read_metrics(tmp_path / "none.json")


def test_the_tool_shows_text_as_it_is(tmp_path):
    """Names are no markup."""
    report = {**REPORT, "target": "[/bold] [red]x", "layers": {"[/b]": {"dense": [1], "compact": [1]}}}
    write(tmp_path, json.dumps(report))
    command = [sys.executable, ROOT / "tools/report.py", tmp_path, "--no-latency", "--layers"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[/bold] [red]x" in done.stdout
    assert "[/b]" in done.stdout
