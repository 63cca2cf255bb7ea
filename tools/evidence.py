"""Measure what the methods keep: ``tools/evidence.py`` runs the matrix in configs/evidence, and writes docs/results.md.

Every run is a config and a seed; what was run is not run again, and what was interrupted goes on. Results go to
``docs/results/<task>.json``, and the page is made from those. Choose hyper-parameters with ``--split val``: its results
stay in the work dir, and the trainings are shared.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prune_mm.engine.launch import run_tool
from prune_mm.evidence.matrix import SPLITS, Matrix, Plan, plan_run
from prune_mm.evidence.page import write_page
from prune_mm.evidence.pool import Clock, Job, Pool
from prune_mm.evidence.results import make_record, merge_results, read_results
from prune_mm.evidence.steps import is_backbone_trained, is_dense_trained, is_pretrained, run_folder

ROOT = Path(__file__).resolve().parents[1]


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", default=str(ROOT / "configs/evidence/matrix.json"), help="tasks, rows and seeds")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="runs like 'digits_resnet20/chex@50-s0'"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the matrix")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (default: one per core)")
    parser.add_argument("--budget-minutes", type=float, help="start no run after that")
    parser.add_argument("--split", choices=SPLITS[::-1], default="test", help="images that runs are judged by")
    parser.add_argument(
        "--data-seed", type=int, help="generate the data from another seed; results stay in the work dir"
    )
    parser.add_argument("--render", action="store_true", help="only write the page again")
    parser.add_argument("--latency", action="store_true", help="only measure latency of what was run, one by one")
    parser.add_argument("--merge", nargs="+", metavar="FOLDER", help="only merge raw results of another machine")
    parser.add_argument("--list", action="store_true", help="only list the runs, and which are done")
    parser.add_argument("--work-dir", default=str(ROOT / "work_dirs/evidence"), help="checkpoints, logs, commands")
    parser.add_argument("--docs", help="folder of results.md (default: docs; with val or other data: the work dir)")
    args = parser.parse_args()
    for name, value in (("jobs", args.jobs), ("budget-minutes", args.budget_minutes)):
        if value is not None and value <= 0:
            raise ValueError(f"--{name} is {value}; it must be above 0")
    if args.seeds and min(args.seeds) < 0:
        raise ValueError(f"--seeds {min(args.seeds)}: seeds must not be negative")
    args.work_dir = Path(args.work_dir).absolute()
    apart = [args.split] * (args.split != "test") + [f"data{args.data_seed}"] * (args.data_seed is not None)
    args.docs = Path(args.docs or (args.work_dir / "-".join(apart) if apart else ROOT / "docs")).absolute()
    return args


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Let no other process run the matrix in this work dir.

    Raises:
        ValueError: one does.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another tools/evidence.py works in '{work}'; wait for it, or pass --work-dir") from None
        yield


class Evidence:
    """The matrix, what is known of it, and what is left to do."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the matrix and plan the runs that were asked for."""
        self.args, self.matrix, self.raw = args, Matrix.read(args.matrix), args.docs / "results"
        self.plans = [plan_run(self.matrix, run, args.data_seed) for run in self.matrix.runs(args.seeds, args.only)]
        self.records = {task.name: read_results(self.raw, task.name) for task in self.matrix.tasks}

    def record(self, plan: Plan) -> dict[str, Any] | None:
        """What was measured of a run, with its present config."""
        wanted = (plan.key, plan.run.seed, self.args.split)
        found = (r for r in self.records[plan.run.task] if (r["key"], r["seed"], r["split"]) == wanted)
        return next(found, None)

    def clock(self) -> Clock:
        """Measured times of earlier runs."""
        clock = Clock()
        for task, records in self.records.items():
            for record in records:
                if record.get("run_seconds"):
                    clock.note(f"{task}/{record['row']}", record["run_seconds"])
        return clock

    def jobs(self) -> list[Job]:
        """Jobs of the runs that were not measured yet; a dense training that several need comes before the first."""
        jobs: dict[str, Job] = {}
        for plan in self.plans:
            if self.record(plan) is not None:
                continue
            first, needs = [], []
            if plan.backbone is not None and not is_backbone_trained(plan, self.args.work_dir):
                name = f"{plan.config.starts_from}-s{plan.run.seed}-{plan.backbone_key}"
                jobs.setdefault(name, Job(name, plan.config.starts_from, self._content(plan, "backbone")))
                first = [name]
            if plan.teacher is not None and not is_dense_trained(plan.teacher, self.args.work_dir):
                needs.append(str(plan.teacher.run))
                jobs.setdefault(needs[-1], self._job(plan.teacher, first))
            if plan.starts_trained and not is_pretrained(plan, self.args.work_dir, self.args.split):
                needs.append(f"{plan.run.task}/pretrained-s{plan.run.seed}-{plan.pretrain_key}")
                kind = f"{plan.run.task}/pretrained"
                jobs.setdefault(needs[-1], Job(needs[-1], kind, self._content(plan, "pretrain"), tuple(first)))
            jobs[str(plan.run)] = self._job(plan, [*first, *needs])
        return list(jobs.values())

    def _job(self, plan: Plan, needs: Iterable[str]) -> Job:
        return Job(str(plan.run), f"{plan.run.task}/{plan.run.row}", self._content(plan, "run"), tuple(needs))

    def _content(self, plan: Plan, what: str) -> dict[str, Any]:
        return {
            "what": what,
            "matrix": str(Path(self.args.matrix).absolute()),
            "run": vars(plan.run),
            "key": plan.key,
            "data_seed": self.args.data_seed,
            "split": self.args.split,
            "work": str(self.args.work_dir),
        }

    def run(self) -> dict[str, str]:
        """Run what is left; returns what failed."""
        teachers = (plan.teacher for plan in self.plans if plan.teacher is not None)
        by_name = {str(plan.run): plan for plan in (*self.plans, *teachers)}

        def ended(job: Job, found: Any, seconds: float) -> None:
            if job.content["what"] == "run":
                plan = by_name[job.name]
                record = make_record(plan, self.args.split, found, self.args.jobs) | {"run_seconds": round(seconds)}
                merge_results(self.raw, plan.run.task, [record])

        budget = None if self.args.budget_minutes is None else 60 * self.args.budget_minutes
        pool = Pool(self.args.work_dir / "jobs", self.args.jobs, self.clock(), ended, budget)
        left = pool.run(self.jobs())
        if left:
            print(f"time is up: {len(left)} jobs are left; run again to go on")
        return pool.failed

    def measure_latency(self) -> dict[str, str]:
        """Latency of every artifact that was measured, one after the other; returns what failed."""
        known = {str(plan.run): (plan, self.record(plan)) for plan in self.plans if not plan.is_dense}
        here = {
            name: (plan, record)
            for name, (plan, record) in known.items()
            if record is not None and run_folder(self.args.work_dir, plan).is_dir()
        }

        def ended(job: Job, found: Any, seconds: float) -> None:
            plan, record = here[job.name]
            merge_results(self.raw, plan.run.task, [{**record, "latency": found}])

        pool = Pool(self.args.work_dir / "jobs", 1, Clock(), ended)
        pool.run(Job(name, "latency", self._content(plan, "latency")) for name, (plan, _) in here.items())
        return pool.failed

    def show(self) -> None:
        """List the runs."""
        done = [self.record(plan) is not None for plan in self.plans]
        for plan, is_done in zip(self.plans, done):
            print(f"{'done' if is_done else '    '}  {plan.run}")
        print(f"{sum(done)} of {len(done)} runs done")


def main() -> None:
    """Run, merge or render; then write the page."""
    args = parse_args()
    # Ended politely, this process ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    evidence, failed = Evidence(args), {}
    if args.list:
        evidence.show()
        return
    if args.merge:
        for folder in args.merge:
            for task in evidence.matrix.tasks:
                merge_results(evidence.raw, task.name, read_results(folder, task.name))
    elif not args.render:
        with alone(args.work_dir):
            failed = evidence.measure_latency() if args.latency else evidence.run()
    page = write_page(evidence.matrix, args.docs, args.split, args.data_seed)
    print(f"{page}: written from {evidence.raw}")
    for name, words in failed.items():
        print(f"error: {name}: {words}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
