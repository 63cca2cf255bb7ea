"""Group configurations from anyone: read, or refused with one line that names the file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_mm.pruners.group_config import match_groups_to_layers, read_groups

LAYERS = {"conv1": (64, 3), "layer1.0.conv1": (64, 64), "layer1.0.conv2": (64, 32)}
MANY = 300_000
TEXTS = {
    "a.json": ["", "[" * 10**6, '{"a":' * 10**5, '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "1" * 10**5 + "}",
               '{"a": true}', '{"a": 2.0}', '{"a": -1}', '{"a": 0}', '{"a": {"G": [1]}}', '{"a": {}}',
               '{"a": {"G": 1, "F": "64"}}',
               '{"a\\nb": 1}', '{"a": 1, "a": 1}', '{"' + "a" * 600 + '": 1}', "[]", "null", '"groups"', "\ufeff{}"],
    "a.py": ["", "groups", "groups = " + "-" * MANY + "1", "groups = " + "(" * MANY, "groups = a" + ".a" * MANY,
             "groups = 1" + "+1" * MANY, "groups = " + "not " * (MANY // 2) + "1", "groups = a" + "()" * MANY,
             "groups = {[1]: 2}", "groups = {{}: 1}", "groups = dict([1])", "groups = dict(**5)", "groups = \0",
             "groups = 9**9**9**9", "groups = open('was_run', 'w')",
             "groups = __import__('os').system('touch was_run')",
             "groups = {'a': " + "1" * 10**5 + "}", "groups = {'a': 1j}", "groups = {1: 2}", "groups = {'a': 1e999}",
             "groups = [x for x in open('was_run', 'w')]", "groups += {}", "# " + "x" * (1 << 20)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "place"), [(name, place) for name in TEXTS for place in range(len(TEXTS[name]))])
def test_files_that_are_made_to_hurt(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_text(TEXTS[name][place], encoding="utf-8")
    with pytest.raises(ValueError, match=r".") as caught:
        read_groups(path)
    assert type(caught.value) is ValueError
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "was_run").exists()


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.json' is not a group configuration: it is not UTF-8"):
        read_groups(tmp_path / "a.json")


NUMBERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 64, 2**31, 10**30, 1.0, 0.5])
VALUES = st.none() | st.booleans() | NUMBERS | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
ENTRIES = VALUES | st.dictionaries(st.sampled_from(["G", "F", "C", "id", "x"]), VALUES, max_size=4)
NAMES = st.sampled_from(["conv1", "module.conv1", "layer1.0.conv1", "backbone.layer1.0.conv2", "", ".", "conv"])


@given(st.dictionaries(NAMES | st.text(max_size=5), ENTRIES, max_size=3), st.sampled_from(["json", "py"]))
def test_any_content(tmp_path_factory, data, form):
    path = tmp_path_factory.getbasetemp() / f"any_groups.{form}"
    text = json.dumps(data) if form == "json" else f"groups = {data!r}"
    path.write_text(text, encoding="utf-8")
    try:
        counts = match_groups_to_layers(read_groups(path), LAYERS)
    except ValueError as error:
        assert type(error) is ValueError  # noqa: PT017
        return
    assert all(type(n) is int and n >= 1 and LAYERS[k][0] % n == LAYERS[k][1] % n == 0 for k, n in counts.items())
