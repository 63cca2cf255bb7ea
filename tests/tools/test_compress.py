"""tools/compress.py runs every stage to the end, and tools/report.py shows what came out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

WARM = Path(__file__).with_name("warm_compress.py")


@pytest.fixture(scope="module")
def compressed(images, tmp_path_factory):
    """A compressed and fine-tuned tiny classifier: work folder and the end of the process."""
    work = tmp_path_factory.mktemp("compress")
    config = tiny.classifier(images, work / "run", epochs=3)
    config.pretrain = {"train_cfg": {"max_epochs": 1}}
    config.teacher = {"checkpoint": "{{pretrained}}"}
    config.finetune = {"train_cfg": {"max_epochs": 1}, "teacher": {"weight": 0.2}}
    path = tiny.write(config, work / "tiny.py")
    return work, path, tiny.tool(work, WARM, path)


def test_every_stage_runs(compressed):
    work, _, end = compressed
    assert end.status == 0, end
    for tool in ("train.py", "export.py", "test.py", "report.py"):
        assert f"tools/{tool}" in end.out
    run = work / "run"
    for folder in ("artifact", "artifact_finetuned"):
        report = json.loads((run / folder / "report.json").read_text())
        assert report["macs"]["compact"] <= 0.5 * report["macs"]["dense"]
    tuned = json.loads((run / "artifact_finetuned/report.json").read_text())
    assert tuned["finetuned"]
    assert set(tuned["metrics"]) == {"dense", "compact"}
    assert tuned["latency"][0]["compact_ms"] > 0
    assert "The small model is in" in end.out
    assert list((run / "finetune").glob("epoch_1.pth"))


def test_the_pruned_and_the_compact_model_learn_from_the_pretrained_one(compressed):
    work, _, end = compressed
    checkpoint = work / "run/pretrain/epoch_1.pth"
    assert f"load_from={checkpoint}" in end.out
    assert str(checkpoint) in (work / "run/finetune.py").read_text()
    assert "{{pretrained}}" not in (work / "run/finetune.py").read_text()
    assert "weight=0.2" in (work / "run/finetune.py").read_text()
    assert "teacher" not in (work / "run/pretrain.py").read_text()
    for folder, learns in (("pretrain", False), (".", True), ("finetune", True)):
        log = "".join(path.read_text() for path in (work / "run" / folder).glob("*/*.log"))
        assert ("loss_kd" in log) == learns, folder


def test_nothing_pretrained_to_learn_from(images, tmp_path):
    config = tiny.classifier(images, tmp_path / "run")
    teacher = {"checkpoint": "{{pretrained}}"}
    config.finetune = {"custom_hooks": [{"type": "prune_mm.DistillationHook", "teacher": teacher}]}
    end = tiny.tool(tmp_path, WARM, tiny.write(config, tmp_path / "tiny.py"))
    assert "finetune mentions {{pretrained}}, but the config has neither 'pretrain' nor" in end.one_line_error
    assert not (tmp_path / "run").exists()


def test_the_report_shows_its_table(compressed):
    work, _, _ = compressed
    artifact, table = work / "run/artifact_finetuned", work / "table.md"
    end = tiny.tool(work, "report.py", artifact, "--repeats", 2, "--layers", "--markdown", table, COLUMNS=160)
    assert end.status == 0, end
    assert "ImageClassifier: backbone pruned by CHEX to 50 % of its MACs" in " ".join(end.out.split())
    for word in ("MACs", "params", "layer1.0.conv1"):
        assert word.lower() in end.out.lower()
    assert "MACs" in table.read_text()


def test_an_interrupted_run_goes_on(compressed):
    work, path, _ = compressed
    for folder in ("artifact", "artifact_finetuned"):
        assert (work / "run" / folder).is_dir()
    (work / "run/compact_metrics.json").unlink()
    before = (work / "run/epoch_3.pth").stat().st_mtime_ns
    end = tiny.tool(work, WARM, path, "--resume")
    assert end.status == 0, end
    assert (work / "run/compact_metrics.json").is_file()
    assert (work / "run/epoch_3.pth").stat().st_mtime_ns == before


def test_a_stage_that_fails_stops_the_rest_in_a_fresh_interpreter(images, tmp_path):
    config = tiny.classifier(images, tmp_path / "run", {**tiny.CHEX, "end": 9})
    end = tiny.cold_tool(tmp_path, tiny.TOOLS / "compress.py", tiny.write(config, tmp_path / "tiny.py"))
    assert end.status == 2
    lines = end.err.strip().splitlines()
    assert lines[-2].startswith("error: end=9 (T_max)")
    assert lines[-1] == "error: this step failed with status 2; nothing after it was run"
    assert not (tmp_path / "run/artifact").exists()
