"""Training checkpoints are data: what MMEngine writes is read, code in them is never run, by us or by MMEngine."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
from collections import OrderedDict
from pathlib import Path

import methods
import numpy as np
import pytest
import tiny
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from prune_mm.engine.exporter import build_prunable, export
from prune_mm.engine.prunable import pruned_module
from prune_mm.engine.reading import read_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "export"))
from test_torch_file import GADGETS, Calls, pickle_of, saved, with_pickle

ROUNDS = max(1, int(os.environ.get("PRUNE_MM_STRESS", "0")))


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if isinstance(first, HistoryBuffer):
        return type(second) is HistoryBuffer and all(map(same, first.data, second.data)) and first.mean() >= 0
    if isinstance(first, dict):
        equal = list(first) == list(second) and all(same(first[key], second[key]) for key in first)
        return equal and getattr(first, "_metadata", None) == getattr(second, "_metadata", None)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


@pytest.mark.parametrize("kind", ["classifier", "maskrcnn"])
def test_a_checkpoint_of_mmengine(kind, trained):
    checkpoint = trained(kind)[1]
    assert same(read_checkpoint(checkpoint), torch.load(checkpoint, map_location="cpu", weights_only=False))


def test_forms_of_older_versions(trained, tmp_path):
    """NumPy 1 has its functions elsewhere, and PyTorch wrote no archive before 1.6."""
    whole = Path(trained("classifier")[1]).read_bytes()
    expected = torch.load(io.BytesIO(whole), weights_only=False)
    (tmp_path / "a.pth").write_bytes(with_pickle(pickle_of(whole).replace(b"numpy._core.", b"numpy.core."), whole))
    (tmp_path / "b.pth").write_bytes(saved(expected, zipped=False))
    assert same(read_checkpoint(tmp_path / "a.pth"), expected)
    assert same(read_checkpoint(tmp_path / "b.pth"), expected)


ARRAYS = {
    "square": np.arange(6.0).reshape(2, 3), "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "text": np.array(["ab", "c"]), "none": np.zeros((0, 3)), "big": np.arange(3, dtype=">i4"), "half": np.float16(1.5),
    "number": np.int64(4), "truth": np.bool_(True), "word": np.str_("x"),
}  # fmt: skip


def test_numpy_values(tmp_path):
    torch.save(ARRAYS, tmp_path / "a.pth")
    assert same(read_checkpoint(tmp_path / "a.pth"), ARRAYS)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", [*GADGETS, "a method", "another class", "objects", "dates", "fields"])
def test_code_is_refused_by_name(name, zipped, tmp_path):
    mark, path = str(tmp_path / "was_run"), tmp_path / "x.pth"
    others = {
        "a method": Calls(getattr, HistoryBuffer(), "update"),
        "another class": np.random.default_rng(0),
        "objects": np.array([Calls(open, mark, "w")], dtype=object),
        "dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
        "fields": np.zeros(2, dtype=[("a", "f4")]),
    }
    gadget = others[name] if name in others else GADGETS[name](mark)
    path.write_bytes(saved({"state_dict": OrderedDict(), "meta": {"x": gadget}}, zipped))
    with pytest.raises(ValueError, match=r".") as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"x\.pth"):
        CheckpointLoader.load_checkpoint(str(path), map_location="cpu")
    assert not os.path.exists(mark)


def test_a_history_registers_nothing(tmp_path):
    """Its pickle names methods that MMEngine then calls for the log."""
    methods_before = dict(HistoryBuffer._statistics_methods)
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    history.__dict__["statistics_methods"] = {"mean": "text", "min": HistoryBuffer.max}
    state = {"_log_history": history._log_history, "_count_history": history._count_history, "max_length": 10}
    content = saved({"h": Calls(HistoryBuffer)})
    assert content
    torch.save({"h": history, "s": state}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")["h"]
    assert found.mean() == 1.5
    assert HistoryBuffer._statistics_methods == methods_before


@pytest.mark.parametrize("what", [[1], torch.zeros(3), 5, "text"])
def test_what_is_no_checkpoint(what, tmp_path):
    torch.save(what, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "b.pth")


def test_the_user_may_trust_a_file(monkeypatch, tmp_path):
    torch.save({"state_dict": {}, "where": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"'pathlib\.\w+', which is no data.* set PRUNE_MM_TRUST_CHECKPOINTS=1"):
        read_checkpoint(tmp_path / "a.pth")
    monkeypatch.setenv("PRUNE_MM_TRUST_CHECKPOINTS", "1")
    assert read_checkpoint(tmp_path / "a.pth")["where"] == Path("x")


def test_mmengine_runs_nothing_either(images, tmp_path):
    """load_from, resuming and Pretrained all read by the one loader."""
    mark, path = str(tmp_path / "was_run"), tmp_path / "x.pth"
    torch.save({"state_dict": {}, "meta": Calls(open, mark, "w")}, path)
    for changes in ({"load_from": str(path)}, {"load_from": str(path), "resume": True}):
        with pytest.raises(ValueError, match="reading it could run code"):
            tiny.train(tiny.classifier(images, tmp_path / "run", **changes))
    config = tiny.classifier(images, tmp_path / "run", pruner=None)
    config.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(path)}
    with pytest.raises(ValueError, match="reading it could run code"):
        tiny.train(config)
    assert not os.path.exists(mark)


def test_the_tools_say_it_in_one_line(images, tmp_path):
    mark, path = str(tmp_path / "was_run"), tmp_path / "x.pth"
    torch.save({"state_dict": {}, "meta": Calls(open, mark, "w")}, path)
    config = tiny.write(tiny.classifier(images, tmp_path / "run"), tmp_path / "config.py")
    for words in (("export.py", config, path, tmp_path / "out"), ("train.py", config, "--resume", path)):
        end = tiny.tool(tmp_path, *words)
        assert "reading it could run code" in end.one_line_error
    assert not os.path.exists(mark)


# -- decisions of a pruner --------------------------------------------------------------------------------------------


def started(method, images, folder):
    """Config and checkpoint of a pruner's first decision, without a training."""
    config = methods.config_of(method, images, folder)
    model = build_prunable(config)
    model.pruner.set_schedule(5, 15)
    module = pruned_module(model)
    model.pruner.commit(module, model.pruner.start(module), 0)
    model.pruner.started.fill_(True)
    return config, {"state_dict": model.state_dict(), "meta": {}}


def junk(tensor, rng):
    """The same shape, with values that cannot be."""
    values = {torch.bool: [0, 1]}.get(tensor.dtype, [-1, 0, 1, 2, 10**6, -(2**31)])
    values = [*values, float("nan"), float("inf"), -0.5] if tensor.is_floating_point() else values
    new = tensor.clone()
    if rng.random() < 0.5 or tensor.numel() == 0:
        return new.fill_(rng.choice(values))
    new.view(-1)[rng.randrange(tensor.numel())] = rng.choice(values)
    return new


@pytest.mark.parametrize("method", methods.PRUNERS)
def test_impossible_decisions(method, images, tmp_path):
    config, checkpoint = started(method, images, tmp_path / "run")
    keys = [key for key in checkpoint["state_dict"] if key.startswith("pruner.")]
    rng, path = random.Random(0), tmp_path / "x.pth"
    for number in range(3 * ROUNDS):
        state = dict(checkpoint["state_dict"])
        for key in rng.sample(keys, rng.choice([1, 3, min(20, len(keys))]) if len(keys) > 20 else 1):
            state[key] = junk(state[key], rng)
        torch.save({"state_dict": state, "meta": {"dataset_meta": rng.choice([None, 1, [], {}])}}, path)
        out = tmp_path / f"out{number}"
        with contextlib.suppress(ValueError):
            export(config, path, out)
            assert (out / "compact.pth").is_file()
            continue
        assert not out.exists()


def test_decisions_of_other_kinds(trained, tmp_path):
    config, checkpoint = trained("classifier")
    whole = read_checkpoint(checkpoint)
    for key, change, words in (
        ("pruner.updates", lambda t: t.float() + float("nan"), "decisions of another pruner"),
        ("pruner.started", lambda t: t.long(), "decisions of another pruner"),
        ("backbone.conv1.weight", lambda t: t.to(torch.complex64), "'backbone.conv1.weight' is torch.complex64"),
    ):
        torch.save(
            {**whole, "state_dict": {**whole["state_dict"], key: change(whole["state_dict"][key])}}, tmp_path / "x"
        )
        with pytest.raises(ValueError, match=words):
            export(config, tmp_path / "x", tmp_path / "out")
    for meta in (None, [], "text", {"dataset_meta": {"classes": {"a": 1}}}):
        torch.save({**whole, "meta": meta}, tmp_path / "x")
        export(config, tmp_path / "x", tmp_path / "out", overwrite=True)
