"""A matrix of little runs, and what tests of it share."""

from __future__ import annotations

import shutil
from pathlib import Path

from prune_mm.evidence.matrix import _read_config

ROOT = Path(__file__).resolve().parents[2]
MATRIX = ROOT / "configs/evidence/matrix.json"
BASE = f"""
_base_ = "{ROOT}/configs/evidence/_base_/digits_resnet20.py"
model = dict(backbone=dict(depth=8, width=8), head=dict(in_channels=32))
train_dataloader = dict(dataset=dict(indices=64))
val_dataloader = dict(dataset=dict(indices=50))
test_dataloader = dict(dataset=dict(indices=60))
train_cfg = dict(max_epochs=2, val_interval=9)
param_scheduler = []
default_hooks = dict(checkpoint=dict(interval=1))
one = dict(train_cfg=dict(max_epochs=1))
"""
UNIFORM = """
_base_ = "./dense.py"
model = dict(_delete_=True, type="prune_mm.PrunableModel", model=_base_.model, scope="backbone", input_size=32,
             pruner=dict(type="UniformL1", target=dict(macs=0.5), round_to=1))
custom_hooks = [dict(type="prune_mm.PruningHook")]
pretrain = _base_.one
train_cfg = dict(max_epochs=1)
recalibrate = 2
"""
TWO_STAGES = """
_base_ = "./dense.py"
model = dict(_delete_=True, type="prune_mm.PrunableModel", model=_base_.model, scope="backbone", input_size=32,
             pruner=dict(type="StrucSpars", target=dict(macs=0.5), warmup=0, delta=1e-2, interval=None))
custom_hooks = [dict(type="prune_mm.PruningHook")]
train_cfg = dict(max_epochs=1)
finetune = _base_.one
recalibrate = 2
cut_seeds = [1]
"""


def own_copy(matrix: Path, folder: Path) -> Path:
    """The matrix with its configs, to be changed."""
    _read_config.cache_clear()
    return Path(shutil.copytree(matrix.parent, folder / "own")) / matrix.name


def record(row: str = "uniform", seed: int = 0, top1: float = 90.0, key: str = "k", **more: object) -> dict:
    macs = {"dense": 100, "compact": 50}
    return {
        "row": row, "share": 100 if row == "dense" else 50, "seed": seed, "split": "test", "key": key,
        "metrics": {"final": {"accuracy/top1": top1}}, "costs": {"macs": macs, "params": macs, "bytes": macs},
        "epochs": {"train": 2, "total": 2}, "training": {"wall_seconds": 2.0, "cpu_seconds": 1.0}, "curve": None,
        "latency": None, "jobs": 1, "versions": {}, "machine": {"cpu": "some", "cores": 2}, **more,
    }  # fmt: skip
