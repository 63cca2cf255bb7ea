"""StrucSpars and GConv Prune in real runs: law, resume, two processes, averages, fine-tuning, detectors."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from prune_mm.engine.exporter import export

SABOTEURS = Path(__file__).parent
STRUC = {"type": "StrucSpars", "target": {"macs": 0.6}, "warmup": 1, "interval": 2, "delta": 0.01, "threshold": 0.3}
GCONV = {"type": "GConvPrune", "groups": 2}
PRUNERS = {"strucspars": STRUC, "gconv": GCONV}


@pytest.fixture(scope="module")
def runs(images, coco, tmp_path_factory):
    """``runs('gconv', 'maskrcnn')``: config and last checkpoint of a tiny training, made once."""
    made = {}

    def run(method, kind="classifier"):
        if (method, kind) not in made:
            folder = tmp_path_factory.mktemp(f"{method}_{kind}")
            data = images if kind == "classifier" else coco
            config = getattr(tiny, kind)(data, folder, PRUNERS[method], epochs=3)
            runner = tiny.train(config)
            made[method, kind] = (config, folder / "epoch_3.pth", runner.model)
        return made[method, kind]

    return run


@pytest.mark.parametrize("kind", ["classifier", "ssd", "maskrcnn"])
@pytest.mark.parametrize("method", PRUNERS)
def test_from_training_to_a_small_model_that_trains_on(method, kind, runs, tmp_path):
    config, checkpoint, model = runs(method, kind)
    report = export(config, checkpoint, tmp_path / "small")
    assert report["law_relative_difference"] < 1e-5
    shares = model.pruner.status()
    assert report["macs"]["compact"] / report["macs"]["dense"] == pytest.approx(shares["macs"])
    assert report["params"]["compact"] / report["params"]["dense"] == pytest.approx(shares["params"])
    assert report["gathers"]["folded"] < report["gathers"]["unfolded"]
    if method == "strucspars":
        assert report["macs"]["compact"] <= 0.6 * report["macs"]["dense"]
    further = Config.fromfile(tmp_path / "small/config.py")
    further.train_cfg.max_epochs, further.work_dir = 1, str(tmp_path / "further")
    further.experiment_name = f"further_{method}_{kind}"
    runner = Runner.from_cfg(further)
    grouped = [m for m in runner.model.backbone.modules() if getattr(m, "groups", 1) > 1]
    assert len(grouped) == len(model.pruner.convs())
    before = {name: p.detach().clone() for name, p in runner.model.backbone.named_parameters()}
    runner.train()
    moved = tiny.same(before, dict(runner.model.backbone.named_parameters()))
    assert [name for name in before if name not in moved and "conv" in name] == []


def test_kernels_between_groups_are_zero_in_the_last_checkpoint(runs):
    """The final decision is taken before the last checkpoint is saved, and validation sees it."""
    for method in PRUNERS:
        _, checkpoint, model = runs(method)
        state = torch.load(checkpoint, weights_only=False)["state_dict"]
        convs = model.pruner.convs()
        assert convs
        for conv in convs:
            weight = state[f"backbone.{conv.weight}"]
            assert not weight[~conv.mask()].any(), conv.name
            assert weight[conv.mask()].any(), conv.name


def state_of(folder, epoch=5):
    return torch.load(Path(folder) / f"epoch_{epoch}.pth", weights_only=False)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """End of the uninterrupted run of five epochs."""
    ends = {}

    def end(method):
        if method not in ends:
            folder = tmp_path_factory.mktemp(f"whole_{method}")
            tiny.train(tiny.classifier(images, folder, PRUNERS[method], epochs=5))
            ends[method] = state_of(folder)
        return ends[method]

    return end


@pytest.mark.parametrize(
    ("method", "moment", "step"),
    [
        ("strucspars", "iteration", 7),
        ("strucspars", "update", 9),
        ("strucspars", "write", 4),
        ("gconv", "iteration", 7),
    ],
)
def test_killed_and_resumed(method, moment, step, images, whole, tmp_path):
    config = tiny.classifier(images, tmp_path, PRUNERS[method], epochs=5)
    clean = tiny.write(config, tmp_path / "train.py")
    config.custom_hooks = [*config.custom_hooks, {"type": "KillAt", "moment": moment, "step": step}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    killed = tiny.tool(
        tmp_path, "train.py", tiny.write(config, tmp_path / "deadly.py"), PYTHONPATH=SABOTEURS
    )  # fmt: skip
    assert killed.status == -signal.SIGKILL, killed
    resumed = tiny.tool(tmp_path, "train.py", clean, "--resume")
    assert resumed.status == 0, resumed
    first, second = state_of(tmp_path), whole(method)
    assert tiny.same(first["state_dict"], second["state_dict"]) == []
    assert first["meta"]["iter"] == second["meta"]["iter"]


@pytest.mark.parametrize("method", PRUNERS)
def test_two_processes_hold_the_same_permutations(method, images, tmp_path):
    from test_distributed import state, two_processes

    config = tiny.classifier(images, tmp_path, PRUNERS[method], epochs=3)
    config.train_dataloader.batch_size = 8
    config.custom_hooks = [*config.custom_hooks, {"type": "SaveEachRank"}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    ends = two_processes(config, tmp_path)
    assert [end.status for end in ends] == [0, 0], ends
    for epoch in range(3):
        states = [state(tmp_path, rank, epoch) for rank in (0, 1)]
        # What is decided, whole; running statistics are each rank's own.
        decided = [{k: v for k, v in s.items() if k.startswith("pruner.")} for s in states]
        assert any(key.startswith("pruner.perms.") for key in decided[0])
        assert tiny.same(*decided) == []
    weights = [{k: v for k, v in s.items() if k.endswith("conv1.weight")} for s in states]
    assert tiny.same(*weights) == []


def test_iterations_without_epochs(images, tmp_path):
    config = tiny.classifier(images, tmp_path, {**STRUC, "epoch_iters": 3})
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 10, "val_interval": 10**6}
    config.train_dataloader.sampler = {"type": "InfiniteSampler", "shuffle": True}
    config.param_scheduler = []
    config.default_hooks.checkpoint.update(by_epoch=False, interval=5)
    config.log_processor = {"by_epoch": False}
    runner = tiny.train(config)
    assert bool(runner.model.pruner.masked)
    assert int(runner.model.pruner.epochs_done) == 3
    report = export(config, tmp_path / "iter_10.pth", tmp_path / "small")
    assert report["macs"]["compact"] <= 0.6 * report["macs"]["dense"]


class WatchAverage(Hook):
    def after_train(self, runner):
        self.average = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module


@pytest.mark.parametrize("method", PRUNERS)
def test_averages_are_masked_and_exported(method, images, tmp_path):
    config = tiny.classifier(images, tmp_path, PRUNERS[method], epochs=3)
    config.custom_hooks = [{"type": "EMAHook", "momentum": 0.2}, *config.custom_hooks]
    watch = WatchAverage()
    tiny.train(config, watch)
    for conv in watch.average.pruner.convs():
        assert not watch.average.backbone.get_submodule(conv.name).weight.detach()[~conv.mask()].any()
    assert export(config, tmp_path / "epoch_3.pth", tmp_path / "small")["law_relative_difference"] < 1e-5


def test_accumulated_gradients_get_the_term_once_a_step(images, tmp_path):
    """Every other iteration steps; the term is added where the optimizer steps, to gradients that are whole."""
    strengths = []

    class Watch(Hook):
        def before_train(self, runner):
            pruner, original = runner.model.pruner, runner.model.pruner.before_step

            def before_step(module, optimizer):
                strengths.append((runner.iter, pruner.strength()))
                original(module, optimizer)

            pruner.before_step = before_step

    config = tiny.classifier(images, tmp_path, {**STRUC, "warmup": 0}, epochs=2)
    config.optim_wrapper.accumulative_counts = 2
    tiny.train(config, Watch())
    assert [iteration for iteration, _ in strengths] == [1, 3, 5]
    assert all(strength > 0 for _, strength in strengths)


def test_a_search_that_has_not_ended_can_be_exported(runs, tmp_path):
    config, checkpoint, _ = runs("strucspars")
    report = export(config, checkpoint.parent / "epoch_2.pth", tmp_path / "small")
    assert report["macs"]["compact"] <= 0.6 * report["macs"]["dense"]
    assert report["law_relative_difference"] < 1e-5
    assert report["unfinished"] is True


def test_layers_that_do_not_train_stay_dense(coco, tmp_path):
    config = tiny.maskrcnn(coco, tmp_path, GCONV, epochs=1, model__model__backbone__frozen_stages=1)
    runner = tiny.train(config)
    pruner = runner.model.pruner
    assert not any(layer.name.startswith("layer1") for layer in pruner.layers)
    assert "include_frozen=True" in pruner.left_dense["layer1.0.conv1"]
    assert {layer.name.split(".")[0] for layer in pruner.layers} == {"layer2", "layer3", "layer4"}


def test_pictures_reach_the_visualizer(images, tmp_path):
    config = tiny.classifier(images, tmp_path, STRUC, epochs=2)
    config.custom_hooks = [{"type": "prune_mm.PruningHook", "image_interval": 100}]
    config.visualizer.vis_backends = [{"type": "LocalVisBackend"}, {"type": "TensorboardVisBackend"}]
    runner = tiny.train(config)
    pictures = sorted(Path(tmp_path).rglob("vis_image/*.png"))
    assert len(pictures) == len(runner.model.pruner.layers)
    assert all(picture.name.endswith("_6.png") for picture in pictures)
    assert list(Path(tmp_path).rglob("events.out.tfevents.*"))
