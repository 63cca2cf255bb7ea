"""An artifact from a stranger, with a digest that is right: refused in one line, or a network that works."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random

import pytest
import tiny
import torch
from mmengine.registry import MODELS, init_default_scope
from test_torch_file import GADGETS, rezipped
from torch import nn

from prune_mm.engine.compact import compact_model
from prune_mm.engine.exporter import export
from prune_mm.export.compact_file import CompactFile, _digest, load_into
from prune_mm.structures import BlockSparse, Plan

ROUNDS = max(1, int(os.environ.get("PRUNE_MM_STRESS", "0")))


@pytest.fixture(scope="module")
def artifact(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "artifact"
    config, checkpoint = trained("classifier")
    export(config, checkpoint, folder)
    return config.model.model, folder / "compact.pth"


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmpretrain")


def forged(source, target, change):
    """A copy in which ``change`` edited the data, with the digest that belongs to it."""
    data = torch.load(source, weights_only=True)
    change(data)
    data["sha256"] = _digest(data["plan"], data["state_dict"])
    torch.save(data, target)
    return target


def refusal(model, path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        compact_model(model, str(path))
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert str(path) in message
    assert message.isprintable(), message
    assert len(message) < 600
    return message


def edited(name, function):
    return lambda data: data["state_dict"].update({name: function(data["state_dict"][name])})


def first_plan(change):
    def edit(data):
        plan = json.loads(data["plan"])
        change(plan["stages"][0][0], plan)
        data["plan"] = json.dumps(plan)

    return edit


FC, WIDE = "head.fc.weight", "backbone.layer4.1.conv2.weight"
CASES = {
    "nan": (edited(FC, lambda w: w.clone().index_fill_(0, torch.tensor([0]), float("nan"))), "NaN or infinite weights"),
    "infinite": (edited(FC, lambda w: w * float("inf")), "NaN or infinite weights"),
    "nan in a buffer": (edited("backbone.bn1.running_mean", lambda m: m * float("nan")), "has NaN"),
    "a negative variance": (edited("backbone.bn1.running_var", lambda v: v * 0 - 1), "computes NaN"),
    "halves": (edited(FC, torch.Tensor.half), "is torch.float16, not torch.float32"),
    "doubles": (edited(FC, torch.Tensor.double), "is torch.float64, not torch.float32"),
    "integers": (edited(FC, torch.Tensor.long), "is torch.int64, not torch.float32"),
    "one number for all": (edited(FC, lambda w: w[:1, :1].expand_as(w)), "must hold dense tensors"),
    "a view": (edited(FC, lambda w: torch.cat([w, w], 1)[:, ::2]), "must hold dense tensors"),
    "an axis less": (edited(FC, lambda w: w[0]), "has shape"),
    "thousands of views": (
        lambda data: data["state_dict"].update({f"x{i}": data["state_dict"][WIDE] for i in range(3000)}),
        "repeat each other beyond measure",
    ),
    "a name of many lines": (lambda data: data["state_dict"].update({"a\nb\x1b[2J": torch.zeros(1)}), "no tensor 'a b"),
    "a surrogate": (lambda data: data["state_dict"].update({"\ud800": torch.zeros(1)}), "no tensor"),
    "a plan of a surrogate": (lambda data: data.update(plan="\ud800"), "not valid JSON"),
    "a version of many lists": (lambda data: data.update(version=[[1, 2, 3]] * 10000), "has version [[1, 2, 3]"),
    "a deep meta": (lambda data: data["meta"].update(x=deep(200)), "nested too deeply"),
    "a place to cut left out": (first_plan(lambda structure, plan: structure["slots"].pop(1)), ""),
    "the outputs cut": (
        lambda data: data.update(
            plan=json.dumps({**json.loads(data["plan"]), "stages": [[cut_of("layer4.1.conv2.weight")]]})
        ),
        "",
    ),
}  # fmt: skip


def cut_of(tensor):
    slot = {"tensor": tensor, "axis": 0, "role": "out"}
    return {"type": "ChannelSlice", "name": "x", "channels": 64, "keep": [0, 1], "slots": [slot]}


def deep(levels):
    found = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize("name", CASES)
def test_forged(name, artifact, tmp_path):
    change, words = CASES[name]
    assert words in refusal(artifact[0], forged(artifact[1], tmp_path / "compact.pth", change))


def test_what_is_not_forged_is_loaded(artifact, tmp_path):
    model, source = artifact
    same = compact_model(model, str(forged(source, tmp_path / "compact.pth", lambda data: None)))
    assert tiny.same(dict(same.state_dict()), torch.load(source, weights_only=True)["state_dict"]) == []


def test_a_plan_that_leaves_out_a_place_is_tried_out(artifact, tmp_path):
    """Every tensor fits such a plan; only running the network shows that its layers do not fit each other."""
    model, source = artifact
    dense = MODELS.build(model)
    plan = json.loads(CompactFile.load(source).plan.to_json())
    plan["stages"] = [[cut_of("layer4.1.conv2.weight")]]
    plan = Plan.from_json(json.dumps(plan))
    state = plan.compact(dense).state_dict()
    CompactFile(plan, state).save(tmp_path / "compact.pth")
    assert "the network it makes cannot be run" in refusal(model, tmp_path / "compact.pth")


def test_indices_are_those_of_the_plan(tmp_path):
    """A block-sparse layer follows its index blindly."""
    torch.manual_seed(0)
    kept = torch.tensor([[True, False, True, True], [False, True, False, True]])
    plan = Plan("", ((BlockSparse.from_kept("0", 2, 4, kept, (2, 0, 3, 1)),),))
    net = plan.compact(nn.Sequential(nn.Linear(4, 4)))
    again = plan.compact(nn.Sequential(nn.Linear(4, 4)))
    load_into(again, net.state_dict(), "x.pth")
    assert torch.equal(again(torch.eye(4)), net(torch.eye(4)))
    for key, value in {"columns": 2**31 - 1, "row_pointers": -1, "rows": 0}.items():
        for place in (0, -1):
            state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            if state[f"0.{key}"][place] == value:
                continue
            state[f"0.{key}"][place] = value
            with pytest.raises(ValueError, match=f"'x.pth' is damaged: '0.{key}' is not the index its plan makes"):
                load_into(again, state, "x.pth")
    other = plan.compact(nn.Sequential(nn.Linear(4, 4)))
    state = other.state_dict() | {"0.columns": torch.tensor([0, 1, 2, 1, 3], dtype=torch.int32)}
    with pytest.raises(ValueError, match="not the index its plan makes"):
        load_into(again, state, "x.pth")


@pytest.mark.parametrize("name", GADGETS)
def test_code_is_not_run(name, artifact, tmp_path):
    mark = str(tmp_path / "was_run")
    data = torch.load(artifact[1], weights_only=True)
    for key in ("meta", "state_dict", "plan"):
        torch.save({**data, key: {"x": GADGETS[name](mark)}}, tmp_path / "compact.pth")
        assert refusal(artifact[0], tmp_path / "compact.pth")
    assert not os.path.exists(mark)


def test_parts_of_the_archive_exchanged(artifact, tmp_path):
    """Weights of other layers, or nothing, in the place of weights: the archive's checksums are right."""
    model, source = artifact
    whole, rng, path = source.read_bytes(), random.Random(0), tmp_path / "compact.pth"
    right = torch.load(source, weights_only=True)["state_dict"]
    parts: dict[str, bytes] = {}
    rezipped(whole, lambda name, data: parts.setdefault(name, data))
    names = sorted(name for name in parts if name.startswith("data/"))
    for _ in range(20 * ROUNDS):
        new = dict(parts)
        first, second = rng.sample(names, 2)
        kind = rng.randrange(4)
        if kind == 0:
            new[first], new[second] = parts[second], parts[first]
        elif kind == 1:
            new[first] = rng.randbytes(len(parts[first]))
        elif kind == 2:
            new[first] = parts[first] + b"\0"
        else:
            new[first] = parts[first][:-1]
        path.write_bytes(rezipped(whole, lambda name, data, new=new: new[name]))
        if new == parts:
            continue
        with contextlib.suppress(ValueError):
            found = compact_model(model, str(path))
            assert tiny.same(dict(found.state_dict()), right) == []


def test_legacy_and_deflated_forms(artifact, tmp_path):
    """What torch.save wrote in the old form is data as well; what is compressed is refused."""
    model, source = artifact
    data, old = torch.load(source, weights_only=True), io.BytesIO()
    torch.save(data, old, _use_new_zipfile_serialization=False)
    (tmp_path / "compact.pth").write_bytes(old.getvalue())
    found = compact_model(model, str(tmp_path / "compact.pth"))
    assert tiny.same(dict(found.state_dict()), data["state_dict"]) == []
    (tmp_path / "compact.pth").write_bytes(rezipped(source.read_bytes(), method=8))
    assert "compressed" in refusal(model, tmp_path / "compact.pth")


def test_the_way_without_the_artifacts_config(artifact, trained, monkeypatch, tmp_path):
    """As docs/files.md shows it."""
    text = (tiny.ROOT / "docs/files.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    config = tiny.write(trained("classifier")[0], tmp_path / "own.py")
    code = code.replace("configs/chex_resnet50.py", str(config)).replace("artifact/compact.pth", str(artifact[1]))
    names: dict = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "ImageClassifier"
    assert names["model"].data_preprocessor.mean is not None
