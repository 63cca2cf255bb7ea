"""An artifact that was cut short or edited is refused with one line, whatever was done to it."""

from __future__ import annotations

import contextlib
import json
import random
import shutil

import pytest
import tiny
import torch
from mmengine.registry import init_default_scope

from prune_mm.engine.compact import compact_model
from prune_mm.engine.exporter import export
from prune_mm.export.compact_file import _digest


@pytest.fixture(scope="module")
def artifact(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "artifact"
    config, checkpoint = trained("classifier")
    export(config, checkpoint, folder)
    return config, folder


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmpretrain")


def refusal(config, path):
    """The message compact_model refuses a file with; any other error, or none, fails the test."""
    with pytest.raises(ValueError, match=r".") as caught:
        compact_model(config.model.model, str(path))
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert "\n" not in message, message
    assert len(message) < 600
    assert str(path) in message
    return message


def damaged(folder, tmp_path, change):
    """A copy of the artifact's file in which ``change`` edited the data."""
    data = torch.load(folder / "compact.pth", weights_only=True)
    change(data)
    with contextlib.suppress(Exception):  # an honest digest, so that what comes after it is looked at
        data["sha256"] = _digest(data["plan"], data["state_dict"])
    torch.save(data, tmp_path / "compact.pth")
    return tmp_path / "compact.pth"


def test_a_file_cut_short(artifact, tmp_path):
    config, folder = artifact
    whole, path, rng = (folder / "compact.pth").read_bytes(), tmp_path / "compact.pth", random.Random(0)
    lengths = [0, 1, 4, 30, len(whole) - 1, len(whole) - 22] + [rng.randrange(len(whole)) for _ in range(40)]
    for length in lengths:
        path.write_bytes(whole[:length])
        assert "damaged or not a compact artifact" in refusal(config, path)


def test_bytes_turned_over(artifact, tmp_path):
    config, folder = artifact
    right, messages = torch.load(folder / "compact.pth", weights_only=True)["state_dict"], []
    whole, path, rng = (folder / "compact.pth").read_bytes(), tmp_path / "compact.pth", random.Random(1)
    for _ in range(60):
        data = bytearray(whole)
        start = rng.choice([0, rng.randrange(len(whole) - 3000), len(whole) - 3000])
        for _ in range(rng.choice([1, 4, 64])):
            data[start + rng.randrange(3000)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            model = compact_model(config.model.model, str(path))
        except ValueError as error:
            messages.append(str(error))
        else:
            assert tiny.same(dict(model.state_dict()), right) == []
    assert len(messages) > 30
    assert not [message for message in messages if "\n" in message]


def test_other_files(artifact, trained, tmp_path):
    config, folder = artifact
    path = tmp_path / "compact.pth"
    for content in (b"", b"hello\n", b"PK\x03\x04" + bytes(100), bytes(5000)):
        path.write_bytes(content)
        refusal(config, path)
    for content in ([], {}, 1, "text", torch.zeros(3), {"state_dict": {}}, {"format": "prune_mm.compact"}):
        torch.save(content, path)
        refusal(config, path)
    shutil.copy(trained("classifier")[1], path)  # a training checkpoint
    refusal(config, path)
    shutil.copy(folder / "model.safetensors", path)
    refusal(config, path)
    with pytest.raises(FileNotFoundError, match=r"no compact artifact at .*; tools/export\.py writes one"):
        compact_model(config.model.model, str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match="no compact artifact at"):
        compact_model(config.model.model, str(tmp_path))


class Payload:
    """What a pickle may do when it is loaded."""

    def __reduce__(self):
        return (open, ("pickle_was_run", "w"))


def test_a_pickle_is_not_run(artifact, tmp_path, monkeypatch):
    config, folder = artifact
    monkeypatch.chdir(tmp_path)
    for place in ("meta", "plan", "state_dict", "format"):
        path = damaged(folder, tmp_path, lambda data, place=place: data.update({place: Payload()}))
        refusal(config, path)
    assert not (tmp_path / "pickle_was_run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(version=2), "version 2, this prune_mm reads version 1"),
        (lambda d: d.update(version="1"), "version '1'"),
        (lambda d: d.pop("version"), "version None"),
        (lambda d: d.pop("plan"), "'plan' must be text"),
        (lambda d: d.update(plan=b"{}"), "'plan' must be text"),
        (lambda d: d.pop("meta"), "'meta' a table"),
        (lambda d: d.pop("state_dict"), "'state_dict' must hold dense tensors"),
        (lambda d: d.update(state_dict={"a": 1}), "'state_dict' must hold dense tensors"),
        (lambda d: d["state_dict"].update(a=torch.zeros(2, device="meta")), "must hold dense tensors"),
        (lambda d: d["state_dict"].pop("head.fc.weight"), "the file has no tensor 'head.fc.weight'"),
        (lambda d: d["state_dict"].update(extra=torch.zeros(1)), "has no tensor 'extra'"),
        (lambda d: d["state_dict"].update({1: torch.zeros(1)}), "has no tensor '1'"),
        (lambda d: d["state_dict"].update({"head.fc.weight": torch.zeros(2, 2)}), "'head.fc.weight' has shape (2, 2)"),
        (lambda d: d["state_dict"].update({"head.fc.bias": torch.zeros(())}), "'head.fc.bias' has shape ()"),
        (lambda d: d["state_dict"].update({"head.fc.bias": torch.zeros(6).to_sparse()}), "must hold dense tensors"),
        (lambda d: d["state_dict"].update({"head.fc.bias": torch.zeros(6, dtype=torch.complex64)}), "head.fc.bias"),
        (lambda d: d.update(plan="{"), "not valid JSON"),
        (lambda d: d.update(plan="[" * 10**5), "not valid JSON"),
        (lambda d: d.update(plan="null"), "not a plan"),
        (lambda d: d.update(plan="{}"), "not a plan"),
    ],
)
def test_edited_data(change, words, artifact, tmp_path):
    config, folder = artifact
    assert words in refusal(config, damaged(folder, tmp_path, change))


def test_a_changed_weight(artifact, tmp_path):
    config, folder = artifact
    data = torch.load(folder / "compact.pth", weights_only=True)
    data["state_dict"]["head.fc.bias"][0] += 1
    torch.save(data, tmp_path / "compact.pth")
    assert "was changed after it was written" in refusal(config, tmp_path / "compact.pth")


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(version=0),
        lambda p: p.update(version=1.0),
        lambda p: p.update(version=True),
        lambda p: p.update(scope="nowhere"),
        lambda p: p.update(scope="head"),
        lambda p: p.update(scope=None),
        lambda p: p.update(stages={}),
        lambda p: p.update(stages=[[]]),
        lambda p: p.update(stages=[]),
        lambda p: p["stages"].append(p["stages"][0]),
        lambda p: p["stages"][0].append(p["stages"][0][0]) or p["stages"][0][-1].update(type="Nothing"),
        lambda p: p["stages"][0].pop(),
        lambda p: p["stages"][0][0].update(type=["ChannelSlice"]),
    ],
)
def test_edited_plan(change, artifact, tmp_path):
    config, folder = artifact

    def edit(data):
        plan = json.loads(data["plan"])
        change(plan)
        data["plan"] = json.dumps(plan)

    refusal(config, damaged(folder, tmp_path, edit))


JUNK = (None, True, -1, 0, 1, 3, 10**9, 10**30, 0.5, float("nan"), "", "weight", "layer1.0.conv1", [], [0], [-1],
        [0, 0], [[0]], {}, {"type": "ChannelSlice"}, "x" * 5000)  # fmt: skip


def places(node, path=()):
    """All paths into nested JSON data."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(plan, rng):
    """The plan with one value dropped, or replaced by junk."""
    plan = json.loads(plan)
    path = rng.choice(list(places(plan)))
    node = plan
    for key in path[:-1]:
        node = node[key]
    if rng.random() < 0.25:
        del node[path[-1]]
    else:
        node[path[-1]] = rng.choice(JUNK)
    return json.dumps(plan)


def test_random_edits_of_the_plan(artifact, tmp_path):
    # Some edits change nothing, or only what a verified load cannot know; no edit may end in another exception.
    config, folder = artifact
    rng, messages = random.Random(2), []
    for _ in range(120):
        path = damaged(folder, tmp_path, lambda data: data.update(plan=mutated(data["plan"], rng)))
        try:
            compact_model(config.model.model, str(path))
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 60
    assert not [message for message in messages if "\n" in message or len(message) > 600]


def test_another_config_than_the_artifacts(artifact, images, coco):
    _, folder = artifact
    wide = tiny.classifier(images, "unused")
    wide.model.model.backbone.update(base_channels=16, stem_channels=16)
    refusal(wide, folder / "compact.pth")
    deep = tiny.classifier(images, "unused")
    deep.model.model.backbone.depth = 34
    refusal(deep, folder / "compact.pth")
    init_default_scope("mmdet")
    refusal(tiny.maskrcnn(coco, "unused"), folder / "compact.pth")


def test_the_tools_say_it_in_one_line(artifact, tmp_path):
    _, folder = artifact
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a/compact.pth"
    path.write_bytes(path.read_bytes()[:5000])
    for tool in ("test.py", "train.py"):
        end = tiny.tool(tmp_path, tool, tmp_path / "a/config.py", "--work-dir", tmp_path / "w")
        assert "is damaged or not a compact artifact" in end.one_line_error
