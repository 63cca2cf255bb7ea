"""Hinge in real runs: early stop, export, fine-tuning, resume, two processes, averages, detectors."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from prune_mm.engine.exporter import export
from prune_mm.pruners.hinge_math import group_norms
from prune_mm.structures.pair import pair_matrix

SABOTEURS = Path(__file__).parent
HINGE = {"type": "Hinge", "target": {"macs": 0.6}, "strength": 10.0, "threshold": 0.2, "min_share": 0.1}
EPOCHS = 6


def config_of(kind, data, folder, epochs=EPOCHS, pruner=HINGE, **options):
    config = getattr(tiny, kind)(data, folder, pruner, epochs=epochs, **options)
    config.optim_wrapper.paramwise_cfg = {"custom_keys": {".pair.weight": {"lr_mult": 10.0}}}
    config.param_scheduler = []
    return config


class Validations(Hook):
    """Notes the epochs that are validated, and what the model is then."""

    def __init__(self):
        self.epochs, self.concluded = [], []

    def before_val(self, runner):
        self.epochs.append(runner.epoch)
        self.concluded.append(bool(runner.model.pruner.concluded))


@pytest.fixture(scope="module")
def runs(images, coco, tmp_path_factory):
    """``runs('maskrcnn')``: config, last checkpoint, runner and notes of a tiny search, made once."""
    made = {}

    def run(kind="classifier"):
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"hinge_{kind}")
            config, notes = config_of(kind, images if kind == "classifier" else coco, folder), Validations()
            runner = tiny.train(config, notes)
            made[kind] = (config, Path((folder / "last_checkpoint").read_text()), runner, notes)
        return made[kind]

    return run


@pytest.mark.parametrize("kind", ["classifier", "ssd", "maskrcnn"])
def test_the_search_stops_and_the_small_model_trains_on(kind, runs, tmp_path):
    config, checkpoint, runner, notes = runs(kind)
    pruner = runner.model.pruner
    stopped = int(checkpoint.stem.removeprefix("epoch_"))
    assert 1 < stopped < EPOCHS, "near the target"
    assert float(pruner.watched) <= 0.6 + pruner.stop_limit
    assert (notes.epochs, notes.concluded) == ([stopped], [True]), "what it ends with is validated"
    assert sorted(p.name for p in checkpoint.parent.glob("epoch_*.pth")) == sorted(
        f"epoch_{epoch + 1}.pth" for epoch in range(stopped)
    )
    assert torch.load(checkpoint, weights_only=False)["state_dict"]["pruner.concluded"]

    report = export(config, checkpoint, tmp_path / "small")
    assert report["law_relative_difference"] < 1e-5
    shares = pruner.status()
    assert report["macs"]["compact"] / report["macs"]["dense"] == pytest.approx(shares["macs"])
    assert report["params"]["compact"] / report["params"]["dense"] == pytest.approx(shares["params"])
    assert report["macs"]["compact"] <= 0.6 * report["macs"]["dense"]

    further = Config.fromfile(tmp_path / "small/config.py")
    further.train_cfg.max_epochs, further.work_dir = 1, str(tmp_path / "further")
    further.experiment_name = f"further_{kind}"
    further.optim_wrapper.paramwise_cfg = None
    small = Runner.from_cfg(further)
    assert any("pair" in name for name in dict(small.model.named_parameters()))
    before = {name: p.detach().clone() for name, p in small.model.backbone.named_parameters()}
    small.train()
    moved = tiny.same(before, dict(small.model.backbone.named_parameters()))
    assert [name for name in before if name not in moved and "conv" in name] == []
    tuned = export(further, tmp_path / "further/epoch_1.pth", tmp_path / "tuned")
    assert tuned["macs"] == report["macs"]


def test_a_finished_search_is_not_resumed(runs):
    config, checkpoint, _, _ = runs()
    again = Config(config.to_dict())
    again.load_from, again.resume = str(checkpoint), True
    before = {path.name: path.stat().st_mtime_ns for path in checkpoint.parent.glob("*.pth")}
    runner = tiny.train(again)
    assert {path.name: path.stat().st_mtime_ns for path in checkpoint.parent.glob("*.pth")} == before
    assert f"epoch_{runner.epoch}" == checkpoint.stem
    assert runner.model.pruner.status()["macs"] <= 0.6


def test_a_search_that_has_not_ended_can_be_exported(runs, tmp_path):
    config, checkpoint, _, _ = runs()
    report = export(config, checkpoint.parent / "epoch_1.pth", tmp_path / "small")
    assert report["macs"]["compact"] <= 0.6 * report["macs"]["dense"]
    assert report["law_relative_difference"] < 1e-5
    assert report["unfinished"] is True


def test_the_log_tells_how_near_it_is(runs):
    _, checkpoint, _, _ = runs()
    lines = [json.loads(line) for path in checkpoint.parent.glob("*/vis_data/scalars.json") for line in path.open()]
    costs = [line["watched_cost"] for line in lines if "watched_cost" in line]
    assert costs[0] == 1.0
    assert all(0.5 <= line["gradient_ratio"] <= 1.8 for line in lines if line.get("gradient_ratio"))
    text = "".join(path.read_text() for path in checkpoint.parent.glob("*/*.log"))
    assert "Hinge prunes to 60 % of its MACs" in text
    assert "stays dense: reads the input of the scope" in text


def state_of(folder):
    return torch.load(Path(folder, "last_checkpoint").read_text(), weights_only=False)


@pytest.mark.parametrize(("moment", "step"), [("iteration", 4), ("write", 2)])
def test_killed_and_resumed(moment, step, images, runs, tmp_path):
    _, checkpoint, _, _ = runs()
    whole = state_of(checkpoint.parent)
    config = config_of("classifier", images, tmp_path)
    clean = tiny.write(config, tmp_path / "train.py")
    config.custom_hooks = [*config.custom_hooks, {"type": "KillAt", "moment": moment, "step": step}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    killed = tiny.tool(tmp_path, "train.py", tiny.write(config, tmp_path / "deadly.py"), PYTHONPATH=SABOTEURS)
    assert killed.status == -signal.SIGKILL, killed
    resumed = tiny.tool(tmp_path, "train.py", clean, "--resume")
    assert resumed.status == 0, resumed
    found = state_of(tmp_path)
    assert tiny.same(found["state_dict"], whole["state_dict"]) == []
    assert found["meta"]["iter"] == whole["meta"]["iter"]


def test_two_processes_hold_the_same_matrices(images, tmp_path):
    from test_distributed import state, two_processes

    config = config_of("classifier", images, tmp_path)
    config.train_dataloader.batch_size = 8
    config.custom_hooks = [*config.custom_hooks, {"type": "SaveEachRank"}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    ends = two_processes(config, tmp_path)
    assert [end.status for end in ends] == [0, 0], ends
    last = len(list(tmp_path.glob("rank0_*.pt")))
    assert 1 < last < EPOCHS
    for epoch in range(last):
        states = [state(tmp_path, rank, epoch) for rank in (0, 1)]
        # Running statistics are each rank's own; everything that is decided or trained is not.
        shared = [{k: v for k, v in s.items() if "running" not in k} for s in states]
        assert tiny.same(*shared) == []
        assert any(key.endswith("pair.weight") for key in shared[0])
    assert states[0]["pruner.concluded"]


def test_a_dense_checkpoint_starts_it_exactly(images, tmp_path):
    dense = tiny.train(tiny.classifier(images, tmp_path / "dense", None, epochs=1)).model
    start = {}

    class Look(Hook):
        def before_train_epoch(self, runner):
            start.setdefault("model", {k: v.detach().clone() for k, v in runner.model.state_dict().items()})
            runner.model.eval()
            with torch.no_grad():
                start["features"] = runner.model.extract_feat(image)[0]
            runner.model.train()

    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = config_of("classifier", images, tmp_path / "search", epochs=1)
    config.load_from = str(tmp_path / "dense/epoch_1.pth")
    tiny.train(config, Look())
    dense.eval()
    with torch.no_grad():
        torch.testing.assert_close(start["features"], dense.extract_feat(image)[0], rtol=1e-4, atol=1e-5)
    for name, kernel in dense.state_dict().items():
        if f"{name.removesuffix('weight')}pair.weight" in start["model"]:
            mixer = start["model"][f"{name.removesuffix('weight')}pair.weight"]
            values = torch.linalg.svdvals(kernel.flatten(1).double())
            torch.testing.assert_close(group_norms([pair_matrix(mixer)]), values, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(start["model"][name], kernel), name


class WatchAverage(Hook):
    def after_train(self, runner):
        self.average = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module


def test_averages_are_masked_and_exported(images, tmp_path):
    config = config_of("classifier", images, tmp_path)
    config.custom_hooks = [{"type": "EMAHook", "momentum": 0.2}, *config.custom_hooks]
    watch = WatchAverage()
    runner = tiny.train(config, watch)
    pruner = watch.average.pruner
    assert tiny.masks_of(watch.average).keys() == tiny.masks_of(runner.model).keys()
    assert bool(pruner.concluded)
    assert tiny.dead_weight(watch.average) == 0.0
    report = export(config, (tmp_path / "last_checkpoint").read_text(), tmp_path / "small")
    assert report["law_relative_difference"] < 1e-5
    assert report["macs"]["compact"] <= 0.6 * report["macs"]["dense"]


def test_iterations_without_epochs(images, tmp_path):
    config = config_of("classifier", images, tmp_path, pruner={**HINGE, "epoch_iters": 3})
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 20, "val_interval": 10**6}
    config.train_dataloader.sampler = {"type": "InfiniteSampler", "shuffle": True}
    config.param_scheduler = []
    config.default_hooks.checkpoint.update(by_epoch=False, interval=5)
    config.log_processor = {"by_epoch": False}
    notes = Validations()
    runner = tiny.train(config, notes)
    assert runner.iter < 20
    assert runner.iter % 3 == 0
    assert notes.concluded == [True]
    saved = Path((tmp_path / "last_checkpoint").read_text())
    assert saved.name == f"iter_{runner.iter}.pth"
    assert export(config, saved, tmp_path / "small")["macs"]["compact"] > 0


def test_accumulated_gradients_shrink_once_a_step(images, tmp_path):
    config = config_of("classifier", images, tmp_path, epochs=2, pruner={**HINGE, "strength": 1e-3})
    config.optim_wrapper.accumulative_counts = 2
    runner = tiny.train(config)
    assert int(runner.model.pruner.steps) == 3


def test_matrices_without_learning_rates_of_their_own(images, tmp_path):
    config = config_of("classifier", images, tmp_path)
    config.optim_wrapper.pop("paramwise_cfg")
    end = tiny.tool(tmp_path, "train.py", tiny.write(config, tmp_path / "train.py"))
    assert "lr_adjust='p1' needs parameter groups of their own" in end.one_line_error
    assert "custom_keys={'.pair.weight': dict(lr_mult=100)}" in end.one_line_error
    assert not list(tmp_path.glob("*.pth"))


def test_mixed_precision_needs_a_gpu(images, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    config = config_of("classifier", images, tmp_path)
    end = tiny.tool(tmp_path, "train.py", tiny.write(config, tmp_path / "train.py"), "--amp")
    assert "--amp needs a GPU" in end.one_line_error


def test_frozen_stages_stay_dense(coco, tmp_path):
    config = config_of("maskrcnn", coco, tmp_path, epochs=1, model__model__backbone__frozen_stages=1)
    runner = tiny.train(config)
    pruner = runner.model.pruner
    assert {unit.name.split(".")[0] for unit in pruner.units} == {"layer2", "layer3", "layer4"}
    assert "include_frozen=True" in pruner.left_dense["layer1.0.conv1"]
    assert export(config, tmp_path / "epoch_1.pth", tmp_path / "small")["law_relative_difference"] < 1e-5
