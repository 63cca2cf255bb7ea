"""Raw results are merged without loss, and the page says what they say."""

from __future__ import annotations

import json
import math

import pytest
from mmengine.config import Config
from scipy import stats
from tiny_evidence import record

from prune_mm.evidence.cells import Cells
from prune_mm.evidence.curves import read_curve
from prune_mm.evidence.matrix import Matrix, Run, plan_run
from prune_mm.evidence.page import write_page
from prune_mm.evidence.results import merge_results, read_results


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


def test_training_time_is_over_a_dense_training_of_the_same_machine_where_there_was_one(tiny_matrix, tmp_path):
    matrix = Matrix.read(tiny_matrix)

    def timed(row: str, seed: int, seconds: float, dense_epoch: float | None = None) -> dict:
        key = plan_run(matrix, Run("tiny", row, 100 if row == "dense" else 50, seed)).key
        training = {"cpu_seconds": seconds, "dense_cpu_seconds_an_epoch": dense_epoch}
        return record(row, seed, 90.0, key, training=training)

    merge_results(tmp_path, "tiny", [timed("dense", 0, 10.0), timed("uniform", 0, 15.0)])
    assert Cells(matrix, tmp_path, "test").training_time("tiny", "uniform", 50) == pytest.approx(1.5)
    # A machine half as fast: 24 seconds where a dense training of its two epochs would take 20.
    merge_results(tmp_path, "tiny", [timed("uniform", 1, 24.0, 10.0)])
    assert Cells(matrix, tmp_path, "test").training_time("tiny", "uniform", 50) == pytest.approx(1.2)


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
    assert "of other configs than the present ones are not shown: tiny/uniform@50-s3.\n" in page
    assert "12.00" not in page
    assert "results/tiny.png" in page
    assert (tmp_path / "results/tiny.png").stat().st_size < 200_000
    assert Cells(matrix, tmp_path / "results", "val").everything() == []


def page_of(tiny_matrix, folder, share, rows: dict[str, tuple]) -> list[str]:
    """Lines of the page of rows with these results, a seed each."""
    matrix = Matrix.read(tiny_matrix)
    for row, found in rows.items():
        aim = 100 if row == "dense" else share
        keys = [plan_run(matrix, Run("tiny", row, aim, seed)).key for seed in range(len(found))]
        records = [record(row, s, v, keys[s], share=aim) for s, v in enumerate(found)]
        merge_results(folder / "results", "tiny", records)
    return write_page(matrix, folder, "test").read_text().splitlines()


def claim(lines: list[str], what: str) -> str:
    return next(line for line in lines if line.startswith("|") and what in line)


@pytest.mark.parametrize(
    ("uniform", "random", "verdict", "counts"),
    [
        ((90.0, 92.0, 94.0), (91.6, 90.5, 89.4), "**missed** (+1.50 ± 1.79)", "0 met, 1 missed"),
        ((93.0, 93.2, 93.1), (90.0, 90.1, 90.2), "met (+3.00 ± 0.06)", "1 met, 0 missed"),
        ((81.0, 91.1, 95.9), (80.0, 90.0, 95.0), "met* (+1.00 ± 0.06)", "1 met, 0 missed"),
        ((93.0,), (90.0,), "not yet measured |", "0 met, 0 missed"),
    ],
)
def test_verdicts_are_of_paired_differences(tiny_matrix, tmp_path, uniform, random, verdict, counts):
    lines = page_of(tiny_matrix, tmp_path, 25, {"uniform": uniform, "random": random})
    assert verdict in claim(lines, "UniformL1 above random")
    note = next(line for line in lines if line.startswith(counts))
    assert f"Of those that are met, {int('*' in verdict and 'missed' not in verdict)} (met\\*)" in note


@pytest.mark.parametrize(("chex", "verdict"), [((97.1, 96.2), "met (-0.85"), ((97.1, 95.7), "**missed** (-1.10")])
def test_chex_is_compared_with_dense(tiny_matrix, tmp_path, chex, verdict):
    lines = page_of(tiny_matrix, tmp_path, 50, {"dense": (98.0, 97.0), "chex": chex})
    assert verdict in claim(lines, "CHEX at 50 % within 1 point of dense")


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


def test_the_page_names_some_results_of_older_configs_and_counts_the_others(tiny_matrix, tmp_path):
    merge_results(tmp_path / "results", "tiny", [record("uniform", seed, 90.0, "an older key") for seed in range(7)])
    page = write_page(Matrix.read(tiny_matrix), tmp_path, "test").read_text()
    named = ", ".join(f"tiny/uniform@50-s{seed}" for seed in range(5))
    assert f"are not shown: {named} and 2 more.\n" in page
