"""Tiny trainings for tests: real configs, real data and the real Runner, in a second or two each.

Every builder starts from a config of ``configs/demo`` and shrinks it. ``make=`` folders are written once per session.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from runpy import run_path
from typing import Any

import mmengine.config.config as mmengine_config
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
CHEX = {"type": "CHEX", "target": {"macs": 0.5}, "initial_regrow": 0.3, "interval": 1, "end": 2, "round_to": 1}
UNIFORM = {"type": "UniformL1", "target": {"macs": 0.5}, "round_to": 1}
_numbers = itertools.count()


def make_mmengine_quick() -> None:
    """Spare a second per run: MMEngine formats its config seven times, and asks the compiler for its version."""
    mmengine_config.FormatCode = lambda text, **_: (text, True)
    Runner._log_env = lambda *_: None


# -- configs ----------------------------------------------------------------------------------------------------------


def classifier(data: Path, work_dir: Path | str, pruner: dict | None = CHEX, epochs: int = 3, **options: Any) -> Config:
    """ResNet-18 of width 8 on 32x32 images: 3 iterations of 16 images an epoch, checkpoints every epoch.

    Args:
        data: folder of the generated images.
        work_dir: of the run.
        pruner: config of the method; None: the dense model without any of prune_mm.
        epochs: length of the training.
        options: settings by dotted name, with ``__`` for the dot.
    """
    config = Config.fromfile(ROOT / "configs/demo/chex_resnet18.py")
    dense = config.model.model
    dense.backbone.update(base_channels=8, stem_channels=8)
    dense.head.update(in_channels=64)
    make = {"train_per_class": 8, "val_per_class": 4, "size": 32}
    for name in ("train", "val", "test"):
        config[f"{name}_dataloader"].update(batch_size=16)
        config[f"{name}_dataloader"].dataset.update(data_root=str(data), make=make, serialize_data=False)
    config.train_dataloader.dataset.pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "RandomResizedCrop", "scale": 32, "crop_ratio_range": (0.6, 1.0)},
        {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"},
        {"type": "PackInputs"},
    ]
    return _finish(config, work_dir, pruner, epochs, options, input_size=32)


def maskrcnn(data: Path, work_dir: Path | str, pruner: dict | None = CHEX, epochs: int = 3, **options: Any) -> Config:
    """Mask R-CNN with a ResNet-18 of width 8 and 16-channel FPN and heads, on 64x64 images: 4 iterations an epoch."""
    config = Config.fromfile(ROOT / "configs/demo/chex_maskrcnn.py")
    dense = config.model.model
    dense.backbone.update(base_channels=8)
    dense.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    dense.rpn_head.update(in_channels=16, feat_channels=16)
    dense.roi_head.bbox_roi_extractor.update(out_channels=16)
    dense.roi_head.mask_roi_extractor.update(out_channels=16)
    dense.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
    dense.roi_head.mask_head.update(in_channels=16, conv_out_channels=16)
    return _finish(_detector_data(config, data), work_dir, pruner, epochs, options, input_size=64)


def ssd(data: Path, work_dir: Path | str, pruner: dict | None = CHEX, epochs: int = 3, **options: Any) -> Config:
    """SSD with a ResNet-18 of width 8, on 64x64 images: 4 iterations an epoch."""
    config = Config.fromfile(ROOT / "configs/demo/chex_ssd.py")
    dense = config.model.model
    dense.backbone.update(base_channels=8)
    dense.neck.update(in_channels=(32,), out_channels=(32, 16, 16, 16))
    dense.bbox_head.update(in_channels=(32, 16, 16, 16))
    return _finish(_detector_data(config, data), work_dir, pruner, epochs, options, input_size=64)


def _detector_data(config: Config, data: Path) -> Config:
    make = {"train": 16, "val": 8, "size": 64}
    for name in ("train", "val", "test"):
        config[f"{name}_dataloader"].update(batch_size=4)
        config[f"{name}_dataloader"].dataset.update(data_root=str(data), make=make, serialize_data=False)
        for transform in config[f"{name}_dataloader"].dataset.pipeline:
            if transform.type == "Resize":
                transform.scale = (64, 64)
        if name != "train":
            config[f"{name}_evaluator"].ann_file = f"{data}/annotations/instances_val2017.json"
    return config


def _finish(config: Config, work_dir: Any, pruner: dict | None, epochs: int, options: dict, input_size: int) -> Config:
    if pruner is None:
        config.model, config.custom_hooks = config.model.model, []
    else:
        config.model.pruner, config.model.input_size = dict(pruner), input_size
    config.train_cfg.update(max_epochs=epochs, val_interval=100)
    config.param_scheduler = [{"type": "MultiStepLR", "milestones": [2], "gamma": 0.5, "by_epoch": True}]
    config.default_hooks.logger.interval = 1
    config.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    config.work_dir = str(work_dir)
    config.merge_from_dict({name.replace("__", "."): value for name, value in options.items()})
    return config


def by_iteration(config: Config, iterations: int, end: int, interval: int) -> Config:
    """The same training, counted in iterations."""
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": iterations, "val_interval": 10**6}
    config.train_dataloader.sampler = {"type": "InfiniteSampler", "shuffle": True}
    config.train_dataloader.pop("batch_sampler", None)
    config.param_scheduler = [{"type": "MultiStepLR", "milestones": [iterations // 2], "by_epoch": False}]
    config.default_hooks.checkpoint.update(by_epoch=False, interval=1)
    config.log_processor = {"by_epoch": False}
    config.model.pruner.update(by_epoch=False, end=end, interval=interval)
    return config


# -- runs in this process ---------------------------------------------------------------------------------------------


def build(config: Config, *hooks: Hook) -> Runner:
    """The runner of a config, with more hooks; they run after all others."""
    config.experiment_name = f"test_{os.getpid()}_{next(_numbers)}"  # or runs of one second share their logs
    runner = Runner.from_cfg(config)
    for hook in hooks:
        runner.register_hook(hook, priority="LOWEST")
    return runner


def train(config: Config, *hooks: Hook) -> Runner:
    """Train in this process, and return the runner afterwards."""
    runner = build(config, *hooks)
    runner.train()
    return runner


def masks_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all masks of a prunable model."""
    return {name: mask.clone() for name, mask in model.pruner.masks.items()}


def dead_weight(model: torch.nn.Module) -> float:
    """Largest absolute value of any weight that a mask has killed; 0 when the masks hold."""
    scope, worst = model.get_submodule(model.prune_scope), 0.0
    for unit in model.pruner.units:
        dead = ~model.pruner.masks[unit.name]
        for slot in unit.slots:
            if slot.role == "out":
                rows = scope.get_parameter(slot.tensor).detach().movedim(slot.axis, 0)
                worst = max(worst, float(rows[dead].abs().max()) if bool(dead.any()) else 0.0)
    return worst


def same(first: dict, second: dict) -> list[str]:
    """Names of tensors that differ between two state dicts, bit by bit."""
    names = sorted({*first, *second})
    return [n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n])]


# -- runs in other processes ------------------------------------------------------------------------------------------


class Finished:
    """How a process ended: ``status`` (negative: the signal), ``out`` and ``err``."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def __repr__(self) -> str:
        return f"status {self.status}\n--- stdout\n{self.out[-3000:]}\n--- stderr\n{self.err[-6000:]}"

    @property
    def one_line_error(self) -> str:
        """The message of a tool that refused its input; the assertion shows what it said instead."""
        lines = self.err.strip().splitlines()
        assert self.status == 2, self
        assert lines, self
        assert lines[-1].startswith("error: "), self
        assert "Traceback" not in self.err + self.out, self
        assert sum(line.startswith("error: ") for line in lines) == 1, self
        return lines[-1].removeprefix("error: ")


class Started:
    """A tool that runs in a process of its own, forked from a server that has imported everything already."""

    def __init__(self, folder: Path, tool: str | Path, *words: Any, **environment: Any) -> None:
        self.log = Path(folder) / f"process_{next(_numbers)}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        context = get_context("forkserver")
        context.set_forkserver_preload(["prune_mm.engine", "mmpretrain", "mmdet.models", "mmdet.datasets"])
        command = [str(TOOLS / tool), *map(str, words)]
        environment = {"OMP_NUM_THREADS": "1", **{key: str(value) for key, value in environment.items()}}
        self.process = context.Process(target=_run_tool, args=(command, environment, str(self.log), str(folder)))
        self.process.start()

    def wait(self, timeout: float = 120) -> Finished:
        """Wait for the end."""
        self.process.join(timeout)
        hung = self.process.is_alive()
        if hung:
            self.process.kill()
            self.process.join()
        out, err = (Path(f"{self.log}.{name}") for name in ("out", "err"))
        result = Finished(self.process.exitcode, _text(out), _text(err))
        assert not hung, f"the process hung\n{result!r}"
        return result


def tool(folder: Path, name: str | Path, *words: Any, **environment: Any) -> Finished:
    """Run a tool of ``tools/`` to its end, in a process of its own."""
    return Started(folder, name, *words, **environment).wait()


def program(name: str) -> str | None:
    """Path of a program of the environment the tests run in, or of the system."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def cold_tool(folder: Path, *words: Any, timeout: float = 180, **environment: Any) -> Finished:
    """Run ``python words...`` as a user does, from a fresh interpreter."""
    return cold_script(folder, sys.executable, *words, timeout=timeout, **environment)


def cold_script(folder: Path, *words: Any, timeout: float = 180, **environment: Any) -> Finished:
    """Run a command as a user does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}}
    command = [*map(str, words)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout)
    return Finished(done.returncode, done.stdout, done.stderr)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _run_tool(command: list[str], environment: dict[str, str], log: str, folder: str) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    make_mmengine_quick()
    sys.path[:0] = [str(Path(command[0]).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = command
    run_path(command[0], run_name="__main__")


def write(config: Config, path: Path) -> Path:
    """Write a config file that needs no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.pretty_text + "\n")
    return path
