"""The matrix of runs, and the config of each."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmengine.config import Config

#: Raise it whenever the same config and seed would give another result: cached runs are then made again.
FORMAT = 1
DENSE = "dense"
SPLITS = ("val", "test")
#: What of a config decides a result. All else is a helper's name, or about how a run is measured.
_DECIDES = (
    "model", "data_preprocessor", "train_dataloader", "val_dataloader", "val_evaluator", "train_cfg", "val_cfg",
    "optim_wrapper", "param_scheduler", "auto_scale_lr", "default_hooks", "custom_hooks", "env_cfg", "log_processor",
    "default_scope", "randomness", "teacher", "finetune", "load_from",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A network on a data set.

    Attributes:
        name: folder of its configs.
        title: what to call it.
        metrics: names of the metrics as ``tools/test.py`` writes them; claims are about the first.
        within: how far below the dense network CHEX may end, in units of the first metric.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    within: float


@dataclass(frozen=True)
class Row:
    """A method: name of its config in each task's folder, label, and whether claims are made about it."""

    name: str
    label: str
    claims: bool = False


@dataclass(frozen=True)
class Run:
    """One cell of the matrix at one seed; ``share`` is the percentage of MACs that is aimed at (100: dense)."""

    task: str
    row: str
    share: int
    seed: int

    def __str__(self) -> str:
        """As ``--only`` knows it: ``digits_resnet20/chex@50-s0``."""
        return f"{self.task}/{self.row}@{self.share}-s{self.seed}"


@dataclass(frozen=True)
class Matrix:
    """Tasks x rows x shares x seeds, and the folder of their configs."""

    folder: Path
    tasks: tuple[Task, ...]
    rows: tuple[Row, ...]
    shares: tuple[int, ...]
    seeds: tuple[int, ...]

    @classmethod
    def read(cls, path: str | Path) -> Matrix:
        """Read ``matrix.json``; configs lie beside it as ``<task>/<row>.py``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or names a task without configs.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no matrix at '{path}'")
        try:
            content = json.loads(path.read_text())
            tasks = [Task(t["name"], t["title"], tuple(t["metrics"]), float(t["within"])) for t in content["tasks"]]
            rows = [Row(**row) for row in content["rows"]]
            matrix = cls(path.parent, tuple(tasks), tuple(rows), tuple(content["shares"]), tuple(content["seeds"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' is no matrix: {type(error).__name__}: {error}") from error
        if not matrix.shares or not matrix.seeds:
            raise ValueError(f"'{path}' needs shares and seeds")
        for task in matrix.tasks:
            if not (matrix.folder / task.name / f"{DENSE}.py").is_file():
                raise ValueError(f"'{path}': task '{task.name}' has no '{task.name}/{DENSE}.py' beside the matrix")
        return matrix

    def config_path(self, run: Run) -> Path:
        """Config file of a run."""
        return self.folder / run.task / f"{run.row}.py"

    def rows_of(self, task: str) -> list[Row]:
        """Rows that a task has configs for."""
        return [row for row in self.rows if (self.folder / task / f"{row.name}.py").is_file()]

    def runs(self, seeds: Sequence[int] | None = None, only: Iterable[str] = ()) -> list[Run]:
        """All runs there are configs for: seed by seed, so that a matrix that stops half way is as wide as it can be.

        Args:
            seeds: instead of those of the matrix.
            only: patterns as of a shell for the names of runs; ``*`` is understood at both ends.

        Raises:
            ValueError: a pattern matches no run.
        """
        found = [
            Run(task.name, row.name, share, seed)
            for seed in (self.seeds if seeds is None else seeds)
            for task in self.tasks
            for share in (100, *self.shares)
            for row in self.rows_of(task.name)
            if (row.name == DENSE) == (share == 100)
        ]
        only = list(only)
        for pattern in only:
            if not any(fnmatchcase(str(run), f"*{pattern}*") for run in found):
                raise ValueError(f"--only {pattern!r} matches no run; they are named like '{found[0]}'")
        return [run for run in found if not only or any(fnmatchcase(str(run), f"*{p}*") for p in only)]


@dataclass(frozen=True)
class Plan:
    """The trainings of a run.

    Attributes:
        run: which.
        config: of the pruning (or, in the dense row, the only) training, seeded, at the share of the run.
        pretrain: of the dense training before it, or None.
        key: hash of all that decides the result.
        pretrain_key: the same of the dense training, which rows share.
        teacher: the dense row of the same seed, when the config asks for ``{{dense}}``.
        backbone: of the training that all rows of a task start from, or None.
        backbone_key: hash of that; tasks share it.
    """

    run: Run
    config: Config
    pretrain: Config | None
    key: str
    pretrain_key: str | None
    teacher: Plan | None = None
    backbone: Config | None = None
    backbone_key: str | None = None

    @property
    def recalibrate(self) -> int:
        """Batches that norms are re-calibrated with right after the cut; 0: this is not measured."""
        seeds = self.config.get("cut_seeds")
        return int(self.config.get("recalibrate", 0)) if seeds is None or self.run.seed in seeds else 0

    @property
    def is_dense(self) -> bool:
        """Whether this is the dense row."""
        return self.run.row == DENSE

    @property
    def starts_trained(self) -> bool:
        """Whether the dense network trains first."""
        return self.pretrain is not None


def plan_run(matrix: Matrix, run: Run, data_seed: int | None = None) -> Plan:
    """Resolve the config of a run.

    A config is one of the first share of the matrix. For another one it may hold ``at_25 = dict(...)``: settings that
    are merged when 25 % of the MACs is the aim; without, the ``target`` of the pruner becomes ``dict(macs=share)``.
    ``{{pretrained}}`` in it stands for the checkpoint that pruning starts from, ``{{dense}}`` for the dense row's, and
    ``{{backbone}}`` for that of the config beside the matrix that ``starts_from`` names.

    Args:
        matrix: where the config is.
        run: which.
        data_seed: make the generated data from this seed instead, in folders of their own.

    Raises:
        ValueError: the config does not say how to reach the share, or starts from a config that is not there.
    """
    path = matrix.config_path(run)
    config = copy.deepcopy(_read_config(path))
    _aim(config, run, matrix.shares[:1], path)
    _reseed_data(config, data_seed)
    config.setdefault("randomness", {})["seed"] = run.seed
    for pruner in _pruners(config):
        pruner["seed"] = run.seed
    config.custom_hooks = [*(config.get("custom_hooks") or []), {"type": "prune_mm.StopwatchHook"}]
    backbone = None
    if config.get("starts_from"):
        first = matrix.folder / f"{config.starts_from}.py"
        if not first.is_file():
            raise ValueError(
                f"'{path}': starts_from={config.starts_from!r}, but there is no '{first.name}' beside the matrix"
            )
        backbone = _before(first, {}, run.seed, data_seed)
    backbone_key = None if backbone is None else _hash(backbone, run.seed)
    start = [] if backbone is None else [backbone_key]
    pretrain = None
    if config.get("pretrain"):
        # From the dense row, not from this one, whose optimizer may differ: all rows start from the same weights.
        dense = matrix.folder / run.task / f"{DENSE}.py"
        pretrain = _before(dense, config.pretrain.to_dict(), run.seed, data_seed)
    pretrain_key = None if pretrain is None else _hash(pretrain, run.seed, *start)
    teacher = None
    if run.row != DENSE and "{{dense}}" in json.dumps(config.to_dict(), default=str):
        teacher = plan_run(matrix, Run(run.task, DENSE, 100, run.seed), data_seed)
    before = [pretrain_key, *([] if teacher is None else [teacher.key]), *start]
    key = _hash(config, run.seed, *before)
    return Plan(run, config, pretrain, key, pretrain_key, teacher, backbone, backbone_key)


def _before(path: Path, settings: dict, seed: int, data_seed: int | None) -> Config:
    """Config of a training that rows start from."""
    config = copy.deepcopy(_read_config(path))
    config.merge_from_dict(settings)
    _reseed_data(config, data_seed)
    config.setdefault("randomness", {})["seed"] = seed
    config.custom_hooks = [{"type": "prune_mm.StopwatchHook"}]
    return config


@lru_cache(maxsize=256)
def _read_config(path: Path) -> Config:
    return Config.fromfile(path)


def _aim(config: Config, run: Run, as_it_is: Sequence[int], path: Path) -> None:
    settings = {int(key[3:]): config.pop(key) for key in list(config.keys()) if key.startswith("at_")}
    pruners = _pruners(config)
    if run.share in settings:
        config.merge_from_dict(settings[run.share].to_dict())
    elif run.row == DENSE or run.share in as_it_is:
        return
    elif len(pruners) == 1 and pruners[0].get("target"):
        pruners[0]["target"] = {"macs": run.share / 100}
    else:
        raise ValueError(f"'{path}' must say what gives {run.share} % of the MACs: at_{run.share} = dict(...)")


def _reseed_data(config: Config, seed: int | None) -> None:
    """Let generated data sets be made from another seed, beside the usual ones."""
    if seed is None:
        return
    for split in ("train", "val", "test"):
        dataset = config[f"{split}_dataloader"].dataset
        if dataset.get("distorted"):
            dataset.distortion_seed = seed
        root = dataset.get("data_root")
        if dataset.get("make") is None or root is None:
            continue
        dataset.make["seed"], dataset.data_root = seed, f"{root}_{seed}"
        evaluator = config.get(f"{split}_evaluator") or {}
        if str(evaluator.get("ann_file", "")).startswith(f"{root}/"):
            evaluator.ann_file = evaluator.ann_file.replace(root, dataset.data_root, 1)


def _pruners(config: Config) -> list[dict]:
    found = config.model.get("pruner")
    return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [found]


def _hash(config: Config, *more: Any) -> str:
    content = {key: value for key, value in config.to_dict().items() if key in _DECIDES}
    text = json.dumps([FORMAT, content, more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lengthen(config: Config, epochs: int) -> None:
    """Add epochs to a training, in place; schedulers that end with it end with it again."""
    before = config.train_cfg.max_epochs
    config.train_cfg.max_epochs = before + epochs
    for scheduler in config.get("param_scheduler") or []:
        for name in ("end", "T_max"):
            if scheduler.get("by_epoch", True) and scheduler.get(name) == before:
                scheduler[name] = before + epochs
