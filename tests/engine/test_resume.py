"""A run that is killed and resumed ends where an uninterrupted one ends, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import tiny
import torch

SABOTEURS = Path(__file__).parent
EPOCHS, ITERATIONS = 5, 12


def config_of(kind, images, work_dir, workers=0):
    config = tiny.classifier(images, work_dir, {**tiny.CHEX, "end": 4, "interval": 2}, epochs=EPOCHS)
    if kind == "iterations":
        config = tiny.by_iteration(config, ITERATIONS, end=10, interval=3)
        config.default_hooks.checkpoint.interval = 2
    config.train_dataloader.update(num_workers=workers, persistent_workers=workers > 0)
    return config


def state_of(folder, kind):
    name = f"epoch_{EPOCHS}.pth" if kind == "epochs" else f"iter_{ITERATIONS}.pth"
    return torch.load(Path(folder) / name, map_location="cpu", weights_only=False)


def assert_same_end(first, second):
    assert tiny.same(first["state_dict"], second["state_dict"]) == []
    moments = [run["optimizer"]["state"] for run in (first, second)]
    for key, state in moments[0].items():
        assert tiny.same(state, moments[1][key]) == []
    assert first["param_schedulers"] == second["param_schedulers"]
    assert first["meta"]["iter"] == second["meta"]["iter"]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """End of the uninterrupted run, by how it counts; workers do not matter."""
    ends = {}

    def end(kind):
        if kind not in ends:
            folder = tmp_path_factory.mktemp(f"whole_{kind}")
            tiny.train(config_of(kind, images, folder))
            ends[kind] = state_of(folder, kind)
        return ends[kind]

    return end


def kill_and_resume(config, moment, step, folder, run=tiny.tool):
    """Run with a hook that kills the process, then the same config without it and with ``--resume``."""
    clean = tiny.write(config, folder / "train.py")
    config.custom_hooks = [*config.custom_hooks, {"type": "KillAt", "moment": moment, "step": step}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    deadly = tiny.write(config, folder / "deadly.py")
    killed = run(folder, "train.py", deadly, PYTHONPATH=SABOTEURS)
    assert killed.status == -signal.SIGKILL, killed
    resumed = run(folder, "train.py", clean, "--resume")
    assert resumed.status == 0, resumed
    return resumed


@pytest.mark.parametrize(
    ("moment", "step"), [("iteration", 7), ("iteration", 1), ("update", 4), ("write", 3), ("pointer", 3)]
)
def test_epochs(moment, step, images, whole, tmp_path):
    resumed = kill_and_resume(config_of("epochs", images, tmp_path), moment, step, tmp_path)
    assert_same_end(state_of(tmp_path, "epochs"), whole("epochs"))
    assert ("resumed epoch" in resumed.out + resumed.err) == ((moment, step) != ("iteration", 1))


@pytest.mark.parametrize(
    ("moment", "step"), [("iteration", 7), ("iteration", 1), ("update", 9), ("write", 3), ("pointer", 3)]
)
def test_iterations(moment, step, images, whole, tmp_path):
    kill_and_resume(config_of("iterations", images, tmp_path), moment, step, tmp_path)
    assert_same_end(state_of(tmp_path, "iterations"), whole("iterations"))


@pytest.mark.parametrize("kind", ["epochs", "iterations"])
def test_worker_processes(kind, images, whole, tmp_path):
    kill_and_resume(config_of(kind, images, tmp_path, workers=2), "iteration", 7, tmp_path)
    assert_same_end(state_of(tmp_path, kind), whole(kind))


def test_a_fresh_interpreter(images, whole, tmp_path):
    def cold(folder, tool, *words, **environment):
        return tiny.cold_tool(folder, tiny.TOOLS / tool, *words, **environment)

    kill_and_resume(config_of("epochs", images, tmp_path), "update", 2, tmp_path, run=cold)
    assert_same_end(state_of(tmp_path, "epochs"), whole("epochs"))


def test_without_a_seed_the_resumed_run_keeps_the_first_ones(images, tmp_path):
    config = config_of("epochs", images, tmp_path / "whole")
    config.randomness = {"seed": None}
    tiny.train(config)
    rest = config_of("epochs", images, tmp_path / "rest")
    rest.randomness = {"seed": None}
    rest.load_from, rest.resume = str(tmp_path / "whole/epoch_2.pth"), True
    tiny.train(rest)
    assert_same_end(state_of(tmp_path / "whole", "epochs"), state_of(tmp_path / "rest", "epochs"))


def test_detector_with_aspect_ratio_batches(coco, tmp_path):
    whole = tiny.maskrcnn(coco, tmp_path / "whole", epochs=3)
    tiny.train(whole)
    rest = tiny.maskrcnn(coco, tmp_path / "rest", epochs=3)
    rest.load_from, rest.resume = str(tmp_path / "whole/epoch_1.pth"), True
    tiny.train(rest)
    first, second = (torch.load(tmp_path / run / "epoch_3.pth", weights_only=False) for run in ("whole", "rest"))
    assert tiny.same(first["state_dict"], second["state_dict"]) == []


def test_detector_by_iteration_with_aspect_ratio_batches(coco, tmp_path):
    def config(folder):
        made = tiny.maskrcnn(coco, tmp_path / folder)
        batches = made.train_dataloader.batch_sampler
        made = tiny.by_iteration(made, 6, end=4, interval=2)
        made.train_dataloader.batch_sampler = batches
        made.train_dataloader.update(num_workers=1, persistent_workers=True)
        made.default_hooks.checkpoint.interval = 3
        return made

    tiny.train(config("whole"))
    rest = config("rest")
    rest.load_from, rest.resume = str(tmp_path / "whole/iter_3.pth"), True
    tiny.train(rest)
    first, second = (torch.load(tmp_path / run / "iter_6.pth", weights_only=False) for run in ("whole", "rest"))
    assert tiny.same(first["state_dict"], second["state_dict"]) == []


def test_a_new_run_from_a_pruned_checkpoint_starts_its_own_exploration(images, trained, tmp_path):
    _, checkpoint = trained("classifier")
    config = tiny.classifier(images, tmp_path, tiny.UNIFORM, epochs=1)
    config.load_from = str(checkpoint)
    runner = tiny.train(config)
    assert int(runner.model.pruner.updates) == 0
    assert 0.4 <= runner.model.pruner.status()["macs"] <= 0.5
    text = "".join(path.read_text() for path in Path(tmp_path).glob("*/*.log"))
    assert "a new run starts its own exploration" in text


def test_other_methods_and_settings_are_not_resumed(images, trained, tmp_path):
    _, checkpoint = trained("classifier")
    for pruner in (tiny.UNIFORM, {**tiny.CHEX, "prune_coupled": True}, {**tiny.CHEX, "ignore": ["layer4.1"]}):
        config = tiny.classifier(images, tmp_path, pruner)
        config.load_from, config.resume = str(checkpoint), True
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(ValueError, match="pruner"):
            tiny.train(config)
        assert not [name for name in set(os.listdir(tmp_path)) - set(before) if name.endswith(".pth")]
