"""Pruners in a list: each decides about what the ones before it leave."""

from __future__ import annotations

import copy
import re

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from prune_mm.engine.exporter import export
from prune_mm.engine.prunable import build_pruner
from prune_mm.structures import BlockSparse, ChannelSlice, GroupedConv, Plan

GCONV = {"type": "GConvPrune", "groups": 2, "indivisible": "skip"}
ONEXN = {"type": "OneByN", "n": 4, "kernels": "all", "rearrange": True, "tail": "pad"}
EVEN = {"round_to": 2}

HINGE = {
    "type": "Hinge", "target": {"macs": 0.7}, "strength": 0.5, "threshold": 0.05, "min_share": 0.1, "stop_limit": 0.9,
    "lr_adjust": None,
}  # fmt: skip


def config_of(images, folder, pruners, epochs=4):
    config = tiny.classifier(images, folder, epochs=epochs)
    config.model.pruner = pruners
    return config


LISTS = {
    "uniform, gconv": [{**tiny.UNIFORM, **EVEN}, GCONV],
    "chex, gconv": [{**tiny.CHEX, **EVEN}, GCONV],
    "chex, uniform, gconv": [{**tiny.CHEX, **EVEN}, {**tiny.UNIFORM, "target": {"macs": 0.92}, **EVEN}, GCONV],
    "strucspars, gconv": [
        {"type": "StrucSpars", "target": {"macs": 0.8}, "warmup": 1, "interval": None, "max_groups": 2},
        GCONV,
    ],
    "hinge, onexn": [HINGE, {**ONEXN, "rearrange": False}],
    "chex, onexn": [tiny.CHEX, ONEXN],
    "uniform, gradual onexn": [tiny.UNIFORM, {**ONEXN, "schedule": "gradual", "begin": 1, "end": 3}],
}


@pytest.mark.parametrize("name", LISTS)
def test_the_law_holds_for_the_result(name, images, tmp_path):
    config = config_of(images, tmp_path, LISTS[name])
    runner = tiny.train(config)
    pruner = runner.model.pruner
    # What has not started when the training ends, the export starts.
    assert pruner.settled() or name == "strucspars, gconv"
    report = export(config, tmp_path / "epoch_4.pth", tmp_path / "small")
    assert report["law_relative_difference"] < 1e-5
    plan = Plan.from_json((tmp_path / "small/plan.json").read_text())
    # Attaching Hinge's pairs is a stage of its own.
    assert len(plan.stages) == len(LISTS[name]) + name.startswith("hinge")
    shares = report["macs"]["compact"] / report["macs"]["dense"]
    most = (
        {"chex, uniform, gconv": 0.45, "strucspars, gconv": 0.75}
        | {n: 0.43 for n in LISTS if "onexn" in n}
        | {"hinge, onexn": 0.55}
    )
    assert shares <= most.get(name, 0.5)
    further = Config.fromfile(tmp_path / "small/config.py")
    further.train_cfg.max_epochs, further.work_dir = 1, str(tmp_path / "further")
    further.experiment_name = name.replace(", ", "_")
    Runner.from_cfg(further).train()


@pytest.mark.parametrize(("name", "kind"), [("chex, gconv", GroupedConv), ("chex, onexn", BlockSparse)])
def test_the_second_is_masked_while_the_first_is_in_force(name, kind, images, tmp_path):
    config = config_of(images, tmp_path, LISTS[name])
    runner = tiny.train(config)
    model, pruner = runner.model, runner.model.pruner
    first, second = pruner.stages()
    assert all(isinstance(s, ChannelSlice) for s in first)
    assert any(isinstance(s, kind) for s in second)
    # The dense network computes what the compact one does, without the help of an export.
    small = Plan("", (tuple(first), tuple(second))).compact(copy.deepcopy(model.backbone))
    image = torch.randn(2, 3, 32, 32)
    model.eval()
    small.eval()
    with torch.no_grad():
        torch.testing.assert_close(small(image)[0], model.backbone(image)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["chex, gconv", "chex, onexn", "uniform, gradual onexn"])
def test_resumed(name, images, tmp_path):
    ends = []
    for folder in ("whole", "rest"):
        config = config_of(images, tmp_path / folder, LISTS[name])
        if folder == "rest":
            # After the second has started, at epoch 2 (or at once, and its last update is still to come).
            epoch = 2 if "gradual" in name else 3
            config.load_from, config.resume = str(tmp_path / f"whole/epoch_{epoch}.pth"), True
        tiny.train(config)
        ends.append(torch.load(tmp_path / folder / "epoch_4.pth", weights_only=False)["state_dict"])
    assert any(".saved." in key for key in ends[0])
    assert tiny.same(*ends) == []


def test_averages(images, tmp_path):
    config = config_of(images, tmp_path, LISTS["chex, gconv"])
    config.custom_hooks = [{"type": "EMAHook", "momentum": 0.2}, *config.custom_hooks]
    tiny.train(config)
    assert export(config, tmp_path / "epoch_4.pth", tmp_path / "small")["law_relative_difference"] < 1e-5


@pytest.mark.parametrize("name", ["chex, gconv", "chex, onexn"])
def test_two_processes(name, images, tmp_path):
    from test_distributed import SABOTEURS, state, two_processes

    config = config_of(images, tmp_path, LISTS[name])
    config.train_dataloader.batch_size = 8
    config.custom_hooks = [*config.custom_hooks, {"type": "SaveEachRank"}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    assert SABOTEURS.is_dir()
    ends = two_processes(config, tmp_path)
    assert [end.status for end in ends] == [0, 0], ends
    decided = [
        {k: v for k, v in state(tmp_path, rank, 3).items() if k.startswith("pruner.") and not v.is_floating_point()}
        for rank in (0, 1)
    ]
    assert any(".saved." in key for key in decided[0])
    assert tiny.same(*decided) == []


@pytest.mark.parametrize(
    ("pruners", "message"),
    [
        ([tiny.CHEX, LISTS["strucspars, gconv"][0]], "StrucSpars steers the training; it can only be the first"),
        ([ONEXN, tiny.CHEX], "OneByN leaves layers no other method can prune; it must be the last of a list"),
        ([], "pruner must be a dict with a 'type', or a list of them, got []"),
        ([tiny.CHEX, {"type": "Nothing"}], "unknown pruner 'Nothing'"),
    ],
)
def test_bad_lists(pruners, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_pruner(pruners)


def test_options_of_later_pruners_are_checked_before_training(images, tmp_path):
    config = config_of(images, tmp_path, [tiny.CHEX, {"type": "GConvPrune", "groups": {"layer9": 2}}])
    with pytest.raises(ValueError, match="names 'layer9', which is no layer"):
        tiny.build(config)
