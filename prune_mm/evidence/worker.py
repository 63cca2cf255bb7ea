"""One job of the matrix in a process of its own: ``python -m prune_mm.evidence.worker JOB.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmengine.registry import init_default_scope

from prune_mm.engine.launch import run_tool
from prune_mm.evidence.matrix import Matrix, Plan, Run, plan_run
from prune_mm.evidence.steps import Bench, die_with_parent, pretrain, run_dense, run_folder, run_pruned, train_backbone
from prune_mm.files import write_text_atomically


def do(job: dict[str, Any]) -> None:
    """Run what a job names; a run's result goes to the file that the job names."""
    die_with_parent()
    matrix = Matrix.read(job["matrix"])
    plan = plan_run(matrix, Run(**job["run"]), job["data_seed"])
    if job.get("key", plan.key) != plan.key:
        raise ValueError(f"the config of {plan.run} has changed since this was started; start it again")
    work, split = Path(job["work"]), job["split"]
    _import_for(plan)
    if job["what"] == "pretrain":
        pretrain(plan, work, split)
        return
    if job["what"] == "backbone":
        train_backbone(plan, work)
        return
    if job["what"] == "latency":
        _measure_latency(plan, work, job["out"])
        return
    found = (run_dense if plan.is_dense else run_pruned)(plan, work, split)
    write_text_atomically(job["out"], json.dumps(found) + "\n")


def _import_for(plan: Plan) -> None:
    """Import what the tools will need, so that their forks have it."""
    import prune_mm.engine.exporter
    import prune_mm.pruners  # noqa: F401

    init_default_scope(plan.config.get("default_scope", "mmengine"))
    if plan.config.get("default_scope") == "mmdet":
        import mmdet.models  # noqa: F401
    else:
        import mmpretrain.models  # noqa: F401


def _measure_latency(plan: Plan, work: Path, out: str) -> None:
    """Latency of the artifact's backbone and of the dense one, in turns in one process, as tools/report.py does it."""
    bench = Bench(run_folder(work, plan))
    artifact = bench.folder / ("finetuned" if plan.config.get("finetune") else "artifact")
    bench.tool("report.py", artifact, "--repeats", 60)
    found = json.loads((artifact / "report.json").read_text())["latency"][0]
    write_text_atomically(out, json.dumps(found) + "\n")


if __name__ == "__main__":
    run_tool(lambda: do(json.loads(Path(sys.argv[1]).read_text())))
