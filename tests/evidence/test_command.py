"""tools/evidence.py: runs once, records every number, and goes on after an end."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from mmengine.config import Config
from tiny_evidence import BASE, ROOT, TWO_STAGES, own_copy

from prune_mm.evidence.matrix import Matrix, _read_config, plan_run
from prune_mm.evidence.results import read_results
from prune_mm.evidence.steps import Bench

pytest.importorskip("sklearn")


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
    assert uniform["training"]["cpu_seconds"] > uniform["training"]["dense_cpu_seconds_an_epoch"] > 0
    assert dense["training"]["dense_cpu_seconds_an_epoch"] is None
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
    assert commands[0] == "export OMP_NUM_THREADS=1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert command[0] == "python"
    recorded = Path(command[command.index("--work-dir") + 1])
    command[command.index("--work-dir") + 1] = str(tmp_path)
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, cwd=ROOT, env=environment)
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


def test_a_row_of_two_stages_is_tested_after_its_cut_with_the_seeds_asked_for(tiny_matrix, tmp_path):
    matrix = own_copy(tiny_matrix, tmp_path)
    (matrix.parent / "tiny/elsewhere.py").write_text(TWO_STAGES)
    end = evidence(matrix, tmp_path, "--only", "elsewhere@50", "--seeds", 0, 1, "--jobs", 2)
    assert end.status == 0, end
    without, tested = read_results(tmp_path / "docs/results", "tiny")
    assert set(without["metrics"]) == {"final"}
    assert set(tested["metrics"]) == {"cut", "cut_recalibrated", "final"}
    for found in (without, tested):
        assert found["epochs"] == {"train": 1, "finetune": 1, "total": 2}
        assert 0.3 < found["costs"]["macs"]["compact"] / found["costs"]["macs"]["dense"] <= 0.5
