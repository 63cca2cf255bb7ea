"""Group configurations: every shape is read, nothing that does not fit is passed over."""

from __future__ import annotations

import json
import warnings

import pytest

from prune_mm.pruners.group_config import (
    GroupEntry,
    match_groups_to_layers,
    mcpg,
    read_groups,
    write_groups,
)

LAYERS = {
    "conv1": (64, 3),
    "layer1.0.conv1": (64, 64),
    "layer1.0.conv2": (64, 64),
    "layer4.0.downsample.0": (512, 256),
}
COUNTS = {"conv1": 1, "layer1.0.conv1": 2, "layer1.0.conv2": 8, "layer4.0.downsample.0": 1}


def published(prefix: str = "module.") -> dict:
    return {
        f"{prefix}{name}": {"G": COUNTS[name], "F": shape[0], "C": shape[1], "id": place}
        for place, (name, shape) in enumerate(LAYERS.items())
    }


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "model.module.", "_orig_mod."])
def test_published_files_with_any_prefix(prefix, tmp_path):
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(published(prefix)))
    entries = read_groups(path)
    assert entries[f"{prefix}layer1.0.conv2"] == GroupEntry(8, 64, 64)
    assert match_groups_to_layers(entries, LAYERS) == COUNTS


PYTHON = [
    "groups = dict(**{'layer1.0.conv1': 2, 'layer1.0.conv2': 8})",
    "groups = {'layer1.0.conv1': dict(G=2, F=64, C=64), 'backbone.layer1.0.conv2': 8}",
    "# a comment\nother = open('x')\ngroups: dict = dict({'layer1.0.conv1': 2}, **{'layer1.0.conv2': dict(G=8)})\n",
    "groups = {}\ngroups = {'layer1.0.conv1': 2, 'layer1.0.conv2': 8}",
]


@pytest.mark.parametrize("text", PYTHON)
def test_python_files(text, tmp_path):
    path = tmp_path / "groups.py"
    path.write_text(text)
    assert match_groups_to_layers(read_groups(path), LAYERS) == COUNTS


def test_plain_dicts():
    assert read_groups({"a": 2, "b": {"G": 3, "id": 7}}) == {"a": GroupEntry(2), "b": GroupEntry(3)}
    assert match_groups_to_layers(read_groups({}), LAYERS) == dict.fromkeys(LAYERS, 1)


def test_layers_whose_names_begin_like_a_prefix():
    layers = {"model.conv": (8, 8), "conv": (8, 8)}
    assert match_groups_to_layers(read_groups({"model.conv": 2}), layers) == {"model.conv": 2, "conv": 1}
    assert match_groups_to_layers(read_groups({"module.model.conv": 2, "conv": 4}), layers) == {
        "model.conv": 2,
        "conv": 4,
    }


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("g.json", "{", "is not a group configuration"),
        ("g.json", "[1]", "holds a list, not groups by layer name"),
        ("g.json", '{"a": 1, "a": 2}', "the name 'a' is there twice"),
        ("g.json", '{"a": {"F": 3}}', "the entry of 'a' has no group count 'G'"),
        ("g.json", '{"a": -1}', "'G' of 'a' is -1, the blank of a template"),
        ("g.json", '{"a": {"G": 0}}', "'G' of 'a'=0 must be a whole number of at least 1"),
        ("g.json", '{"a": true}', "'G' of 'a'=True"),
        ("g.json", '{"a": 2.0}', "'G' of 'a'=2.0"),
        ("g.json", '{"a": {"G": 1, "F": "8"}}', "'F' of 'a'='8'"),
        ("g.py", "groups = dict(", "is not a group configuration"),
        ("g.py", "group = {}", "it assigns nothing to 'groups'"),
        ("g.py", "groups: dict", "it assigns nothing to 'groups'"),
        ("g.py", "groups = __import__('os').environ", "it is read, not run"),
        ("g.py", "groups = dict(a=print('run'))", "it is read, not run"),
        ("g.py", "groups = {'a': 1 + n}", "it is read, not run"),
        ("g.py", "groups = {1: 2}", "1 is no layer name"),
    ],
)
def test_files_that_cannot_be_read(name, text, words, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=r".") as caught:
        read_groups(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert capsys.readouterr().out == ""


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no group configuration at"):
        read_groups(tmp_path / "none.json")


# -- matching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"module.layer4.downsample.0": 1}, "names 'module.layer4.downsample.0', which is no layer"),
        ({"module.layer4.downsample.0": 2}, "the nearest are: layer4.0.downsample.0"),
        ({"neck.layer1.0.conv1": 2}, "names 'neck.layer1.0.conv1', which is no layer"),
        ({"layer1.0.conv1": {"G": 2, "F": 128, "C": 64}}, "has F (output channels) = 128 for 'layer1.0.conv1'"),
        (
            {"layer1.0.conv1": {"G": 2, "C": 32}},
            "has C (input channels) = 32 for 'layer1.0.conv1', but the layer has 64",
        ),
        ({"conv1": 2}, "'conv1' cannot have 2 groups: it has 64 outputs and 3 inputs, so the count must divide 1"),
        ({"layer1.0.conv1": 3}, "the count must divide 64"),
        ({"layer1.0.conv1": 2, "module.layer1.0.conv1": 2}, "are the same layer 'layer1.0.conv1'"),
    ],
)
def test_entries_that_do_not_fit(given, words):
    with pytest.raises(ValueError, match=r".") as caught:
        match_groups_to_layers(read_groups(given), LAYERS)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_prefixes():
    entries = read_groups({"neck.layer1.0.conv1": 2, "layer1.0.conv2": 8})
    assert match_groups_to_layers(entries, LAYERS, prefixes=["neck"]) == COUNTS


# -- channels per group -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "groups"), [((16, 32, 8), 4), ((64, 32, 8), 8), ((16, 24, 6), 4), ((16, 32, 32), 1)])
def test_mcpg(case, groups):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mcpg(*case) == groups


@pytest.mark.parametrize("case", [(16, 24, 4), (16, 32, 64), (64, 3, 32), (16, 30, 8)])
def test_mcpg_leaves_other_layers_dense(case):
    with pytest.warns(UserWarning, match="it stays dense"):
        assert mcpg(*case) == 1


def test_mcpg_of_nothing():
    with pytest.raises(ValueError, match="channels_per_group=0"):
        mcpg(16, 32, 0)


# -- writing ----------------------------------------------------------------------------------------------------------


def test_what_is_written_reads_back(tmp_path):
    path = tmp_path / "new" / "groups.json"
    write_groups(path, COUNTS, LAYERS, prefix="module.")
    assert json.loads(path.read_text()) == published()
    assert match_groups_to_layers(read_groups(path), LAYERS) == COUNTS
    assert [p.name for p in path.parent.iterdir()] == ["groups.json"]


def test_a_file_is_replaced_only_when_told(tmp_path):
    path = tmp_path / "groups.json"
    write_groups(path, COUNTS, LAYERS)
    before = path.read_text()
    with pytest.raises(FileExistsError, match="exists; choose another file"):
        write_groups(path, {"layer1.0.conv1": 4}, LAYERS)
    assert path.read_text() == before
    write_groups(path, {"layer1.0.conv1": 4}, LAYERS, overwrite=True)
    assert read_groups(path) == {"layer1.0.conv1": GroupEntry(4, 64, 64)}


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"layer1.0.conv9": 2}, "'layer1.0.conv9' is no layer that can be grouped; the nearest are: layer1.0.conv"),
        ({"layer1.0.conv1": 3}, "cannot have 3 groups"),
        ({"layer1.0.conv1": 0}, "groups of 'layer1.0.conv1'=0"),
    ],
)
def test_nothing_wrong_is_written(groups, words, tmp_path):
    with pytest.raises(ValueError, match=r".") as caught:
        write_groups(tmp_path / "groups.json", groups, LAYERS)
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())
