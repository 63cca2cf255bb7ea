"""1xN in real runs: law, resume, two processes, averages, training on, inference."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from prune_mm.engine.exporter import export
from prune_mm.structures.block_layer import BlockSparseLayer

SABOTEURS = Path(__file__).parent
BLOCKS = {"type": "OneByN", "n": 4, "kernels": "all", "rearrange": True}
GRADUAL = {**BLOCKS, "schedule": "gradual", "begin": 1, "end": 3}
PRUNERS = {"one_shot": BLOCKS, "gradual": GRADUAL}


@pytest.fixture(scope="module")
def runs(images, coco, tmp_path_factory):
    """``runs('ssd')``: config, last checkpoint and model of a tiny training, made once."""
    made = {}

    def run(kind="classifier"):
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"onexn_{kind}")
            config = getattr(tiny, kind)(images if kind == "classifier" else coco, folder, BLOCKS, epochs=2)
            runner = tiny.train(config)
            made[kind] = (config, folder / "epoch_2.pth", runner.model)
        return made[kind]

    return run


@pytest.fixture(scope="module")
def artifacts(runs, tmp_path_factory):
    """``artifacts('ssd')``: folder of the exported run, and its report; made once."""
    made = {}

    def artifact(kind="classifier"):
        if kind not in made:
            config, checkpoint, _ = runs(kind)
            folder = tmp_path_factory.mktemp(f"small_{kind}") / "artifact"
            made[kind] = (folder, export(config, checkpoint, folder))
        return made[kind]

    return artifact


def dead_blocks(model):
    """Whether all weights that the pruner masks are zero, and others are not."""
    for name, mask in model.pruner.masks.items():
        weight = model.backbone.get_submodule(name).weight.detach()
        assert not weight[~mask].any(), name
        assert weight[mask].any(), name


def block_layers(model):
    return {name: m for name, m in model.backbone.named_modules() if isinstance(m, BlockSparseLayer)}


@pytest.mark.parametrize("kind", ["classifier", "ssd", "maskrcnn"])
def test_from_training_to_a_small_model_that_trains_on(kind, runs, artifacts, tmp_path):
    _, _, model = runs(kind)
    dead_blocks(model)
    folder, report = artifacts(kind)
    assert report["law_relative_difference"] < 1e-5
    assert report["target"] == "50% of 4 x 1 blocks"
    shares = model.pruner.status()
    assert report["macs"]["compact"] / report["macs"]["dense"] == pytest.approx(shares["macs"])
    assert report["params"]["compact"] / report["params"]["dense"] == pytest.approx(shares["params"])
    assert shares["blocks"] == 0.5

    further = Config.fromfile(folder / "config.py")
    further.train_cfg.max_epochs, further.work_dir = 1, str(tmp_path / "further")
    further.experiment_name = f"further_onexn_{kind}"
    runner = Runner.from_cfg(further)
    found = block_layers(runner.model)
    assert list(found) == [layer.name for layer in model.pruner.layers]
    before = {name: layer.dense_weight().detach() for name, layer in found.items()}
    runner.train()
    for name, layer in found.items():
        after = layer.dense_weight().detach()
        assert not torch.equal(after, before[name]), name
        # What is empty has no place to grow in.
        assert not after[before[name] == 0].any(), name


def state_of(folder, epoch=4):
    return torch.load(Path(folder) / f"epoch_{epoch}.pth", weights_only=False)


@pytest.mark.parametrize(("method", "moment", "step"), [("one_shot", "iteration", 4), ("gradual", "update", 2)])
def test_killed_and_resumed(method, moment, step, images, tmp_path):
    config = tiny.classifier(images, tmp_path / "whole", PRUNERS[method], epochs=4)
    tiny.train(config)
    config.work_dir = str(tmp_path / "rest")
    clean = tiny.write(config, tmp_path / "train.py")
    config.custom_hooks = [*config.custom_hooks, {"type": "KillAt", "moment": moment, "step": step}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    killed = tiny.tool(
        tmp_path, "train.py", tiny.write(config, tmp_path / "deadly.py"), PYTHONPATH=SABOTEURS
    )  # fmt: skip
    assert killed.status == -signal.SIGKILL, killed
    resumed = tiny.tool(tmp_path, "train.py", clean, "--resume")
    assert resumed.status == 0, resumed
    first, second = state_of(tmp_path / "rest"), state_of(tmp_path / "whole")
    assert tiny.same(first["state_dict"], second["state_dict"]) == []
    assert first["meta"]["iter"] == second["meta"]["iter"]


def test_two_processes_hold_the_same_masks(images, tmp_path):
    from test_distributed import state, two_processes

    config = tiny.classifier(images, tmp_path, GRADUAL, epochs=4)
    config.train_dataloader.batch_size = 8
    config.custom_hooks = [*config.custom_hooks, {"type": "SaveEachRank"}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    ends = two_processes(config, tmp_path)
    assert [end.status for end in ends] == [0, 0], ends
    for epoch in range(4):
        states = [state(tmp_path, rank, epoch) for rank in (0, 1)]
        decided = [{k: v for k, v in s.items() if k.startswith("pruner.")} for s in states]
        assert tiny.same(*decided) == []
        share = [float(v.float().mean()) for k, v in decided[0].items() if k.startswith("pruner.masks.")]
        if epoch in (0, 1):
            assert set(share) == {1.0}
        if epoch == 3:
            assert share == [0.5] * len(share)
    weights = [{k: v for k, v in s.items() if k.endswith("conv1.weight")} for s in states]
    assert tiny.same(*weights) == []


def test_gradual_by_iteration_with_averages(images, tmp_path):
    config = tiny.classifier(images, tmp_path, {**BLOCKS, "schedule": "gradual", "begin": 2})
    config = tiny.by_iteration(config, 9, end=8, interval=3)
    config.default_hooks.checkpoint.interval = 9
    config.custom_hooks = [{"type": "EMAHook", "momentum": 0.2}, *config.custom_hooks]
    seen = {}

    class Watch(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen[runner.iter] = runner.model.pruner.status()["blocks"]

        def after_train(self, runner):
            self.average = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module

    watch = Watch()
    tiny.train(config, watch)
    assert [seen[step] for step in (0, 4)] == [1.0, 1.0]
    assert 1.0 > seen[5] > seen[8] == 0.5
    assert seen[5] == seen[7]
    dead_blocks(watch.average)
    report = export(config, tmp_path / "iter_9.pth", tmp_path / "small")
    assert report["law_relative_difference"] < 1e-5


@pytest.mark.parametrize("include", [False, True])
def test_layers_that_do_not_train(include, coco, tmp_path):
    config = tiny.maskrcnn(
        coco, tmp_path, {**BLOCKS, "include_frozen": include}, epochs=1, model__model__backbone__frozen_stages=1
    )  # fmt: skip
    pruner = tiny.build(config).model.pruner
    stages = {layer.name.split(".")[0] for layer in pruner.layers}
    assert ("layer1" in stages) == include
    if not include:
        assert "include_frozen=True" in pruner.left_dense["layer1.0.conv1"]


def test_a_schedule_that_is_too_long_is_refused(images, tmp_path):
    config = tiny.classifier(images, tmp_path, {**GRADUAL, "end": 9}, epochs=3)
    with pytest.raises(ValueError, match="end=9 must be below the training length of 3 epochs"):
        tiny.train(config)


def test_inference_of_a_classifier(artifacts):
    from mmpretrain import ImageClassificationInferencer
    from mmpretrain.apis import get_model

    folder, _ = artifacts("classifier")
    config = Config.fromfile(folder / "config.py")
    model = get_model(config, device="cpu")
    assert block_layers(model)
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    found = ImageClassificationInferencer(model)(picture)[0]
    assert found["pred_scores"].shape == (6,)
    assert abs(float(found["pred_scores"].sum()) - 1.0) < 1e-5


def test_inference_of_a_detector(artifacts):
    from mmdet.apis import DetInferencer

    folder, _ = artifacts("maskrcnn")
    inferencer = DetInferencer(str(folder / "config.py"), device="cpu")
    assert block_layers(inferencer.model)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    found = inferencer(picture, pred_score_thr=0.0, return_datasamples=True)["predictions"][0]
    assert found.pred_instances.masks.shape[1:] == (64, 64)
