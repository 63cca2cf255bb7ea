"""Which trainings make a run, and what its key follows; the configs of the matrix."""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache

import mmengine.config.utils
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from tiny_evidence import BASE, MATRIX, UNIFORM, own_copy

from prune_mm.engine.compact import without_pretrained
from prune_mm.engine.prunable import pruned_module
from prune_mm.evidence.matrix import Matrix, Run, _read_config, lengthen, plan_run
from prune_mm.evidence.steps import _dense_epoch, on_split
from prune_mm.registry import MODELS

pytest.importorskip("sklearn")


def test_keys_follow_what_is_trained_and_only_that(tiny_matrix):
    matrix = Matrix.read(tiny_matrix)
    keys = {plan_run(matrix, Run("tiny", "uniform", share, seed)).key for share in (50, 25) for seed in (0, 1)}
    assert len(keys) == 4
    plan = plan_run(matrix, Run("tiny", "uniform", 50, 0))
    assert plan.key == plan_run(matrix, Run("tiny", "uniform", 50, 0)).key
    assert plan.pretrain_key == plan_run(matrix, Run("tiny", "uniform", 25, 0)).pretrain_key
    assert plan.config.model.pruner.seed == plan.config.randomness.seed == 0
    assert plan_run(matrix, Run("tiny", "uniform", 25, 0)).config.model.pruner.target == {"macs": 0.25}


def test_models_right_after_their_cut_may_be_tested_with_some_seeds_only(tiny_matrix, tmp_path):
    matrix = own_copy(tiny_matrix, tmp_path)
    with (matrix.parent / "tiny/uniform.py").open("a") as file:
        file.write("cut_seeds = [0]\n")
    plans = [plan_run(Matrix.read(matrix), Run("tiny", "uniform", 50, seed)) for seed in (0, 1)]
    before = plan_run(Matrix.read(tiny_matrix), Run("tiny", "uniform", 50, 1))
    assert [plan.recalibrate for plan in (before, *plans)] == [2, 2, 0]
    assert plans[1].key == before.key


def test_names_of_helpers_in_a_config_are_no_part_of_a_key(tiny_matrix, tmp_path):
    matrix = own_copy(tiny_matrix, tmp_path)
    found = []
    for more in ("", "helper = dict(lr=1.0)\n", "env_cfg = dict(cudnn_benchmark=True)\n"):
        _read_config.cache_clear()
        with (matrix.parent / "tiny/uniform.py").open("a") as file:
            file.write(more)
        found.append(plan_run(Matrix.read(matrix), Run("tiny", "uniform", 50, 0)).key)
    assert found[0] == found[1] != found[2]


def test_a_start_that_is_not_there_is_named(tiny_matrix, tmp_path):
    matrix = own_copy(tiny_matrix, tmp_path)
    (matrix.parent / "tiny/dense.py").write_text(f'{BASE}\nstarts_from = "lost"\n')
    with pytest.raises(
        ValueError, match=r"dense\.py': starts_from='lost', but there is no 'lost\.py' beside the matrix"
    ):
        plan_run(Matrix.read(matrix), Run("tiny", "dense", 100, 0))


def test_another_split_is_another_measurement_of_the_same_training(tiny_matrix):
    plan = plan_run(Matrix.read(tiny_matrix), Run("tiny", "dense", 100, 0))
    assert on_split(plan.config, "val").test_dataloader.dataset.split == "val"
    assert on_split(plan.config, "test").test_dataloader.dataset.split == "test"
    assert plan.config.test_dataloader.dataset.split == "test"


def test_time_is_measured_against_the_latest_dense_training_of_the_seed_in_the_work_dir(tiny_matrix, tmp_path):
    plan = plan_run(Matrix.read(tiny_matrix), Run("tiny", "uniform", 50, 1))
    assert _dense_epoch(plan, tmp_path) is None
    trained = (("dense-100-s1-a", 40.0, 100), ("pretrained-s1-b", 60.0, 200), ("pretrained-s2-c", 90.0, 300),
               ("uniform-50-s1-d", 90.0, 400))  # fmt: skip
    for folder, seconds, time in trained:
        note = tmp_path / "tiny" / folder / "steps/train.json"
        note.parent.mkdir(parents=True)
        note.write_text(json.dumps({"cpu_seconds": seconds, "epochs": 20}))
        os.utime(note, (time, time))
    assert _dense_epoch(plan, tmp_path) == 3.0


def test_epochs_that_a_search_leaves_over_lengthen_the_schedule():
    cosine = {"type": "CosineAnnealingLR", "by_epoch": True, "end": 12, "T_max": 12}
    warmup = {"type": "LinearLR", "by_epoch": False, "end": 12}
    config = Config({"train_cfg": {"max_epochs": 12}, "param_scheduler": [warmup, cosine]})
    lengthen(config, 3)
    assert config.train_cfg.max_epochs == 15
    assert (config.param_scheduler[1].end, config.param_scheduler[1].T_max) == (15, 15)
    assert config.param_scheduler[0].end == 12


def test_the_dense_row_teaches_and_is_part_of_the_key(tiny_matrix, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "uniform.py").write_text(UNIFORM + 'note = "{{dense}}"\n')
    (folder / "dense.py").write_text(BASE)
    matrix = Matrix.read(tmp_path / shutil.copy(tiny_matrix, tmp_path))
    plan = plan_run(matrix, Run("tiny", "uniform", 50, 0))
    assert plan.teacher.key == plan_run(matrix, Run("tiny", "dense", 100, 0)).key
    (folder / "dense.py").write_text(BASE + "optim_wrapper = dict(optimizer=dict(lr=0.01))\n")
    _read_config.cache_clear()
    assert plan_run(matrix, Run("tiny", "uniform", 50, 0)).key != plan.key


def test_another_data_seed_distorts_digits_otherwise():
    matrix, run = Matrix.read(MATRIX), Run("digits_resnet20", "uniform", 50, 0)
    usual, other = plan_run(matrix, run), plan_run(matrix, run, data_seed=7)
    assert [other.config[f"{split}_dataloader"].dataset.distortion_seed for split in ("val", "test")] == [7, 7]
    assert "distortion_seed" not in usual.config.test_dataloader.dataset
    assert other.pretrain_key != usual.pretrain_key


def test_every_row_of_the_matrix_trains_for_the_same_number_of_epochs(monkeypatch):
    # MMEngine reads the index of the whole zoo for every config: ninety files.
    monkeypatch.setattr(mmengine.config.utils, "load", lru_cache(mmengine.config.utils.load))
    matrix = Matrix.read(MATRIX)
    for task in matrix.tasks:
        whole = plan_run(matrix, Run(task.name, "dense", 100, 0)).config.train_cfg.max_epochs
        starts = set()
        for run in matrix.runs([0], [f"{task.name}/"]):
            plan = plan_run(matrix, run)
            stages = [plan.config, plan.pretrain, plan.config.get("finetune")]
            assert sum(stage.train_cfg.max_epochs for stage in stages if stage is not None) == whole, run
            starts.add(plan.pretrain_key)
        assert len(starts - {None}) == 1, f"rows of {task.name} do not share their dense training"


def test_every_task_has_every_method():
    matrix = Matrix.read(MATRIX)
    for task in matrix.tasks:
        assert {run.row for run in matrix.runs([0], [f"{task.name}/"])} == {row.name for row in matrix.rows}


@pytest.mark.parametrize("share", [50, 25])
@pytest.mark.parametrize("row", ["random", "uniform", "chex", "strucspars", "gconv", "hinge", "onexn", "chex_onexn"])
def test_the_rows_build_and_aim_at_the_share(row, share):
    plan = plan_run(Matrix.read(MATRIX), Run("digits_resnet20", row, share, 0))
    init_default_scope("mmpretrain")
    model = MODELS.build(without_pretrained(plan.config.model))
    pruner, module = model.pruner, pruned_module(model)
    epochs = plan.config.train_cfg.max_epochs
    pruner.set_schedule(epochs, 21 * epochs)
    if row in ("random", "uniform", "onexn"):
        pruner.commit(module, pruner.start(module), 0)
        # Whole channels of narrow layers come no nearer.
        assert pruner.status()["macs"] == pytest.approx(share / 100, abs=0.022)
    elif row in ("chex", "strucspars", "gconv", "hinge"):
        assert pruner.target.value == share / 100
