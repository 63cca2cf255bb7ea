"""tools/evidence.py: runs once, goes on after an end, merges, and shows what is there and what is not."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import mmengine.config.utils
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from scipy import stats

from prune_mm.engine.compact import without_pretrained
from prune_mm.engine.prunable import pruned_module
from prune_mm.evidence.cells import Cells
from prune_mm.evidence.curves import read_curve
from prune_mm.evidence.matrix import Matrix, Run, _read_config, lengthen, plan_run
from prune_mm.evidence.page import write_page
from prune_mm.evidence.pool import Clock, Job, Pool
from prune_mm.evidence.results import merge_results, read_results
from prune_mm.evidence.steps import Bench, on_split
from prune_mm.registry import MODELS

pytest.importorskip("sklearn")
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


@pytest.fixture(scope="module")
def tiny_matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "tiny").mkdir()
    (folder / "tiny/dense.py").write_text(BASE)
    (folder / "tiny/uniform.py").write_text(UNIFORM)
    (folder / "tiny/random.py").write_text(UNIFORM.replace("UniformL1", "RandomChannels"))
    content = {
        "seeds": [0],
        "shares": [50, 25],
        "rows": [
            {"name": "dense", "label": "dense"},
            {"name": "random", "label": "RandomChannels"},
            {"name": "uniform", "label": "UniformL1", "claims": True},
            {"name": "elsewhere", "label": "a row of other tasks"},
        ],
        "tasks": [{"name": "tiny", "title": "Tiny digits", "metrics": ["accuracy/top1"], "within": 1.0}],
    }
    path = folder / "matrix.json"
    path.write_text(json.dumps(content))
    return path


def start(matrix: Path, folder: Path, *words: object) -> tiny.Started:
    places = ("--matrix", matrix, "--work-dir", folder / "work", "--docs", folder / "docs")
    return tiny.Started(folder, "evidence.py", *places, *words)


def evidence(*words: object) -> tiny.Finished:
    return start(*words).wait(timeout=280)


def ended(process: int) -> bool:
    """Whether a process is gone, or waits to be collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("this did not happen in two minutes")


@pytest.fixture(scope="module")
def measured(tiny_matrix, tmp_path_factory):
    """The tiny matrix at 50 %: killed in its dense training, then run to the end."""
    folder = tmp_path_factory.mktemp("measured")
    words = (tiny_matrix, folder, "--only", "dense", "uniform@50", "--jobs", 2)
    first = start(*words)
    wait_for(lambda: bool(list((folder / "work/tiny").glob("dense-*/train/last_checkpoint"))))
    begun = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and str(folder) in said_by(path)]
    first.process.kill()
    first.process.join()
    wait_for(lambda: all(map(ended, begun)))
    return folder, evidence(*words), begun


def said_by(process: Path) -> str:
    """The command line of a process."""
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


# -- the command -------------------------------------------------------------------------------------------------------


def test_every_number_of_a_run_is_recorded(measured):
    folder, end, _ = measured
    assert end.status == 0, end
    dense, uniform = read_results(folder / "docs/results", "tiny")
    assert (dense["row"], dense["share"], uniform["row"], uniform["share"]) == ("dense", 100, "uniform", 50)
    assert set(uniform["metrics"]) == {"dense", "cut", "cut_recalibrated", "final"}
    assert all(0 <= metrics["accuracy/top1"] <= 100 for metrics in uniform["metrics"].values())
    assert 0.3 < uniform["costs"]["macs"]["compact"] / uniform["costs"]["macs"]["dense"] <= 0.5
    assert uniform["costs"]["bytes"]["compact"] < uniform["costs"]["bytes"]["dense"] * 1.5
    assert uniform["epochs"] == {"pretrain": 1, "train": 1, "total": 2}
    assert dense["epochs"]["total"] == 2
    assert uniform["training"]["cpu_seconds"] > 0
    assert uniform["machine"]["cores"] >= 1
    assert "torch" in uniform["versions"]


def test_nothing_goes_on_behind_a_killed_command_and_the_next_call_does(measured):
    folder, _, begun = measured
    assert begun
    log = next((folder / "work/tiny").glob("dense-*/log.txt")).read_text()
    assert log.count("Saving checkpoint at 1 epochs") == 1, "the epoch that had been saved was not trained again"
    assert "Saving checkpoint at 2 epochs" in log
    commands = next((folder / "work/tiny").glob("dense-*/commands.sh")).read_text()
    assert commands.count("tools/train.py") <= 2


def test_the_test_split_is_what_was_tested_and_every_command_is_kept(measured):
    folder, _, _ = measured
    commands = next((folder / "work/tiny").glob("uniform-*/commands.sh")).read_text()
    for tool in ("train.py", "cut.py", "export.py", "test.py"):
        assert f"tools/{tool}" in commands
    tested = Config.fromfile(next((folder / "work/tiny").glob("uniform-*/tested_artifact_test.py")))
    assert tested.test_dataloader.dataset.split == "test"
    assert tested.model.type == "prune_mm.CompactModel"


def test_a_kept_command_runs_on_its_own_and_gives_the_same_weights(measured, tmp_path):
    """In a process that knows of no matrix, as one would type it."""
    folder, _, _ = measured
    commands = next((folder / "work/tiny").glob("uniform-*/commands.sh")).read_text().splitlines()
    command = shlex.split(next(line for line in commands if "tools/train.py" in line))
    assert command[0] == "python"
    recorded = Path(command[command.index("--work-dir") + 1])
    command[command.index("--work-dir") + 1] = str(tmp_path)
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, cwd=Path(__file__).parents[2])
    ours, theirs = (
        torch.load(path / "epoch_1.pth", map_location="cpu", weights_only=False)["state_dict"]
        for path in (tmp_path, recorded)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_page_says_what_was_not_run(measured):
    folder, _, _ = measured
    page = (folder / "docs/results.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert lines["RandomChannels"].count("not run") == 1
    assert "a row of other tasks" not in lines
    assert "## Published numbers (paper)" in page
    assert page.count("not yet measured") >= 2
    assert "(1)" in next(line for line in page.splitlines() if line.startswith("| UniformL1") and "1 + 1" in line)


def test_what_people_found_is_on_the_page(measured, tiny_matrix):
    folder, _, _ = measured
    note = folder / "docs/results/findings.md"
    note.write_text("## What was found\n\nThe cause.\n")
    evidence(tiny_matrix, folder, "--render")
    page = (folder / "docs/results.md").read_text()
    assert page.index("## The claims") < page.index("The cause.") < page.index("## Tiny digits")


def test_what_was_run_is_not_run_again(measured, tiny_matrix):
    folder, _, _ = measured
    before = (folder / "docs/results/tiny.json").read_bytes()
    logs = {path: path.stat().st_mtime_ns for path in (folder / "work").rglob("log.txt")}
    end = evidence(tiny_matrix, folder, "--only", "dense", "uniform@50")
    assert end.status == 0, end
    assert (folder / "docs/results/tiny.json").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in (folder / "work").rglob("log.txt")} == logs


def test_bad_words_are_one_line(tiny_matrix, tmp_path):
    for words, message in (
        (("--only", "nothing"), "--only 'nothing' matches no run"),
        (("--jobs", 0), "--jobs is 0"),
        (("--seeds", -1), "--seeds -1"),
    ):
        end = evidence(tiny_matrix, tmp_path, *words)
        assert message in end.one_line_error


# -- caching and going on ----------------------------------------------------------------------------------------------


def test_a_step_that_has_ended_is_not_taken_again(tmp_path):
    bench, calls = Bench(tmp_path), []

    def step() -> dict:
        calls.append(1)
        return {"value": len(calls)}

    assert bench.once("a", step) == bench.once("a", step) == {"value": 1}
    assert Bench(tmp_path).once("a", step) == {"value": 1}

    def breaks() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.once("b", breaks)
    assert bench.once("b", step) == {"value": 2}


def test_a_tool_that_fails_is_named_with_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match=r"train\.py failed with status 2: error: no config at 'none\.py'"):
        Bench(tmp_path).tool("train.py", "none.py")


def test_keys_follow_what_is_trained_and_only_that(tiny_matrix):
    matrix = Matrix.read(tiny_matrix)
    keys = {plan_run(matrix, Run("tiny", "uniform", share, seed)).key for share in (50, 25) for seed in (0, 1)}
    assert len(keys) == 4
    plan = plan_run(matrix, Run("tiny", "uniform", 50, 0))
    assert plan.key == plan_run(matrix, Run("tiny", "uniform", 50, 0)).key
    assert plan.pretrain_key == plan_run(matrix, Run("tiny", "uniform", 25, 0)).pretrain_key
    assert plan.config.model.pruner.seed == plan.config.randomness.seed == 0
    assert plan_run(matrix, Run("tiny", "uniform", 25, 0)).config.model.pruner.target == {"macs": 0.25}


def own_copy(matrix: Path, folder: Path) -> Path:
    """The matrix with its configs, to be changed."""
    _read_config.cache_clear()
    return Path(shutil.copytree(matrix.parent, folder / "own")) / matrix.name


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


def test_all_rows_of_a_task_start_from_one_trained_backbone(tiny_matrix, tmp_path):
    matrix = own_copy(tiny_matrix, tmp_path)
    pretrained = 'dict(type="Pretrained", prefix="backbone.", checkpoint="{{backbone}}")'
    first = BASE.replace("max_epochs=2", "max_epochs=1")
    (matrix.parent / "first.py").write_text(first)
    (matrix.parent / "tiny/dense.py").write_text(
        f'{BASE}\nstarts_from = "first"\nmodel["backbone"]["init_cfg"] = {pretrained}\n'
    )
    plans = [plan_run(Matrix.read(matrix), run) for run in Matrix.read(matrix).runs([0, 1])]
    assert len({plan.backbone_key for plan in plans}) == 2
    before = plan_run(Matrix.read(tiny_matrix), plans[0].run)
    assert before.backbone is None
    assert plan_run(Matrix.read(matrix), plans[0].run, data_seed=7).backbone_key != plans[0].backbone_key

    end = evidence(matrix, tmp_path, "--only", "dense", "uniform@50", "--jobs", 1)
    assert end.status == 0, end
    (trained,) = (tmp_path / "work/first").glob("s0-*/train/epoch_1.pth")
    for part in ("dense-*/train.py", "pretrained-*/train.py"):
        (config,) = (tmp_path / "work/tiny").glob(part)
        assert Config.fromfile(config).model.backbone.init_cfg.checkpoint == str(trained)
    logs = list((tmp_path / "work/tiny").glob("*/train/*/*.log"))
    assert sum(f"load backbone. in model from: {trained}" in log.read_text() for log in logs) >= 2
    (matrix.parent / "first.py").write_text(first.replace("max_epochs=1", "max_epochs=3"))
    _read_config.cache_clear()
    changed = plan_run(Matrix.read(matrix), plans[0].run)
    assert changed.key != plans[0].key


def test_another_split_is_another_measurement_of_the_same_training(tiny_matrix):
    plan = plan_run(Matrix.read(tiny_matrix), Run("tiny", "dense", 100, 0))
    assert on_split(plan.config, "val").test_dataloader.dataset.split == "val"
    assert on_split(plan.config, "test").test_dataloader.dataset.split == "test"
    assert plan.config.test_dataloader.dataset.split == "test"


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


def test_cutting_needs_a_method_that_cuts_and_a_free_name(tmp_path):
    folder, dense = ROOT / "configs/evidence/digits_resnet20", tmp_path / "dense.pth"
    init_default_scope("mmpretrain")
    torch.save({"state_dict": MODELS.build(Config.fromfile(folder / "dense.py").model).state_dict()}, dense)
    end = tiny.tool(tmp_path, "cut.py", folder / "strucspars.py", dense, tmp_path / "cut.pth")
    assert "StrucSpars steers a training" in end.one_line_error
    end = tiny.tool(tmp_path, "cut.py", folder / "uniform.py", dense, tmp_path / "cut.pth")
    assert "live channels 50.0%" in end.out
    end = tiny.tool(tmp_path, "cut.py", folder / "uniform.py", dense, tmp_path / "cut.pth")
    assert "cut.pth' exists; choose another file" in end.one_line_error


# -- the pool ----------------------------------------------------------------------------------------------------------


def job(name: str, *needs: str) -> Job:
    return Job(name, "kind", {}, needs)


def fake_worker(monkeypatch, tmp_path: Path, code: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(code))
    start = subprocess.Popen
    monkeypatch.setattr(
        "prune_mm.evidence.pool.subprocess.Popen",
        lambda command, **options: start([sys.executable, str(script), command[-1]], **options),
    )


def test_jobs_wait_for_what_they_need_and_fall_with_it(monkeypatch, tmp_path):
    code = """
        import json, sys
        job = json.load(open(sys.argv[1]))
        if "broken" in sys.argv[1]: sys.exit("it broke")
        json.dump(1, open(job["out"], "w"))
    """
    fake_worker(monkeypatch, tmp_path, code)
    ended: list[str] = []
    pool = Pool(tmp_path / "jobs", 2, Clock(), lambda one, found, seconds: ended.append(one.name))
    lost = job("lost", "first", "broken")
    jobs = [job("second", "first"), job("first"), lost, job("broken"), job("free", "done before")]
    assert pool.run(jobs) == []
    assert ended.index("first") < ended.index("second")
    assert set(ended) == {"first", "second", "free"}
    assert pool.failed == {"broken": "it broke", "lost": "broken failed"}


def test_no_job_is_started_when_time_is_up(tmp_path):
    pool = Pool(tmp_path, 1, Clock(), lambda *_: None, budget=0.0)
    assert [one.name for one in pool.run([job("a"), job("b")])] == ["a", "b"]


def test_time_left_comes_from_measured_times():
    clock = Clock()
    assert clock.left(["task/a"], 2) is None
    clock.note("task/a", 10.0)
    clock.note("task/a", 30.0)
    assert clock.left(["task/a", "task/b", "other/a"], 2) == pytest.approx(30.0)


# -- raw results -------------------------------------------------------------------------------------------------------


def record(row: str = "uniform", seed: int = 0, top1: float = 90.0, key: str = "k", **more: object) -> dict:
    macs = {"dense": 100, "compact": 50}
    return {
        "row": row, "share": 100 if row == "dense" else 50, "seed": seed, "split": "test", "key": key,
        "metrics": {"final": {"accuracy/top1": top1}}, "costs": {"macs": macs, "params": macs, "bytes": macs},
        "epochs": {"train": 2, "total": 2}, "training": {"wall_seconds": 2.0, "cpu_seconds": 1.0}, "curve": None,
        "latency": None, "jobs": 1, "versions": {}, "machine": {"cpu": "some", "cores": 2}, **more,
    }  # fmt: skip


def test_merging_keeps_other_seeds_and_rows(tmp_path):
    merge_results(tmp_path, "tiny", [record(seed=0), record(seed=1), record("dense")])
    merge_results(tmp_path, "tiny", [record(seed=1, top1=95.0, key="new"), record(seed=2)])
    found = read_results(tmp_path, "tiny")
    assert len(found) == 4
    assert [r["metrics"]["final"]["accuracy/top1"] for r in found if r["row"] == "uniform"] == [90.0, 95.0, 90.0]


def test_a_measured_latency_outlives_a_repeated_run_of_the_same_key_only(tmp_path):
    merge_results(tmp_path, "tiny", [record(latency={"dense_ms": 2.0, "compact_ms": 1.0})])
    merge_results(tmp_path, "tiny", [record(top1=91.0)])
    assert read_results(tmp_path, "tiny")[0]["latency"] == {"dense_ms": 2.0, "compact_ms": 1.0}
    merge_results(tmp_path, "tiny", [record(key="other")])
    assert read_results(tmp_path, "tiny")[0]["latency"] is None


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 99, "runs": []}'])
def test_damaged_results_are_refused_and_left_alone(tmp_path, text):
    (tmp_path / "tiny.json").write_text(text)
    with pytest.raises(ValueError, match=r"tiny\.json"):
        merge_results(tmp_path, "tiny", [record()])
    assert (tmp_path / "tiny.json").read_text() == text


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_computes_means_and_verdicts(tiny_matrix, tmp_path):
    matrix = Matrix.read(tiny_matrix)

    def measured(row: str, seed: int, top1: float) -> dict:
        return record(row, seed, top1, plan_run(matrix, Run("tiny", row, 100 if row == "dense" else 50, seed)).key)

    results = [measured("dense", s, v) for s, v in enumerate((98.0, 97.0, 99.0))]
    results += [measured("uniform", s, v) for s, v in enumerate((96.0, 97.0, 95.0))]
    results.append(record("uniform", 3, 12.0, "a key of an older config"))
    merge_results(tmp_path / "results", "tiny", results)
    page = write_page(matrix, tmp_path, "test").read_text()
    assert f"96.00 ± {stats.sem([96.0, 97.0, 95.0]):.2f} (3)" in page
    assert f"98.00 ± {1 / math.sqrt(3):.2f} (3)" in page
    assert "1 results in `results/` are of other configs" in page
    assert "tiny/uniform@50-s3" in page
    assert "12.00" not in page
    assert "results/tiny.png" in page
    assert (tmp_path / "results/tiny.png").stat().st_size < 200_000
    assert Cells(matrix, tmp_path / "results", "val").everything() == []


def test_a_verdict_needs_the_paired_difference_too(tiny_matrix, tmp_path):
    matrix = Matrix.read(tiny_matrix)
    for row, found in (("uniform", (90.0, 92.0, 94.0)), ("random", (91.6, 90.5, 89.4))):
        keys = [plan_run(matrix, Run("tiny", row, 25, seed)).key for seed in range(3)]
        merge_results(tmp_path / "results", "tiny", [record(row, s, v, keys[s], share=25) for s, v in enumerate(found)])
    page = write_page(matrix, tmp_path, "test").read_text()
    line = next(line for line in page.splitlines() if "UniformL1 above random" in line)
    assert "**missed** (+1.50 ± 1.79)" in line, "by the error of the means alone, 1.32, it would be met"


def test_a_network_that_detects_nothing_counts_as_zero(tiny_matrix, tmp_path):
    matrix = Matrix.read(tiny_matrix)
    found = []
    for seed, metrics in enumerate(({"final": {"accuracy/top1": 90.0}}, {"final": {}}, {"final": {"other": 1.0}})):
        key = plan_run(matrix, Run("tiny", "uniform", 50, seed)).key
        found.append({**record("uniform", seed, key=key), "metrics": metrics})
    merge_results(tmp_path, "tiny", found)
    cells = Cells(matrix, tmp_path, "test")
    assert cells.by_seed("tiny", "uniform", 50, "accuracy/top1") == {0: 90.0, 1: 0.0}
    assert cells.by_seed("tiny", "uniform", 50, "accuracy/top1", "cut") == {}


def test_an_empty_page_says_that_nothing_was_run(tiny_matrix, tmp_path):
    page = write_page(Matrix.read(tiny_matrix), tmp_path, "test").read_text()
    assert "0 met, 0 missed" in page
    assert page.count("not run") == 6


def test_curves_are_read_from_logs_that_were_cut_short(tmp_path):
    config = Config({"train_cfg": {"max_epochs": 2, "val_interval": 1}})
    lines = [{"loss": 2.0, "epoch": 1, "iter": 5}, {"accuracy/top1": 50.0, "step": 1}]
    for folder, more in (
        ("1", [{"loss": 9.0, "epoch": 2, "iter": 10}]),
        ("2", [{"loss": 1.0, "epoch": 2, "iter": 10}]),
    ):
        path = tmp_path / folder / "vis_data/scalars.json"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(map(json.dumps, lines + more)) + '\n{"loss": 0.')
    found = read_curve(tmp_path, config)
    assert found["loss"] == [(5, 2.0), (10, 1.0)]
    assert found["val"] == [(1, {"accuracy/top1": 50.0})]
    assert read_curve(tmp_path, Config({"train_cfg": {"max_epochs": 2, "val_interval": 2}})) is None
    assert read_curve(tmp_path, Config({"train_cfg": {"max_epochs": 6, "val_interval": 3}})) == found


# -- the configs -------------------------------------------------------------------------------------------------------


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
    # Whole shortcuts make a difference on the detectors only.
    special = {"random_whole", "uniform_whole"}
    for task in matrix.tasks:
        wanted = {row.name for row in matrix.rows} - (set() if task.name.startswith("shapes") else special)
        assert {run.row for run in matrix.runs([0], [f"{task.name}/"])} == wanted


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
        assert pruner.status()["macs"] == pytest.approx(share / 100, abs=0.017)
    elif row in ("chex", "strucspars", "gconv", "hinge"):
        assert pruner.target.value == share / 100
