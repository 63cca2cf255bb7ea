"""Records sorted into the cells of the matrix, and numbers of a cell."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from prune_mm.analysis.statistics import Summary
from prune_mm.evidence.matrix import DENSE, Matrix, Run, plan_run
from prune_mm.evidence.results import read_results

Record = dict[str, Any]

#: Metrics as people call them; all are shown in points of 100.
METRICS = {"accuracy/top1": "top-1 (%)", "coco/bbox_mAP": "box AP", "coco/segm_mAP": "mask AP"}


def points(metric: str, value: float) -> float:
    """A metric in points of 100; COCO's are shares of 1."""
    return 100 * value if metric.startswith("coco/") else value


class Cells:
    """Results of one split, without those whose config has changed since.

    Attributes:
        stale: names of runs that were measured with another config than the present one.
    """

    def __init__(self, matrix: Matrix, raw: Path, split: str, data_seed: int | None = None) -> None:
        """Read the raw results."""
        self.matrix, self.stale = matrix, list[str]()
        self._found: dict[tuple[str, str, int], list[Record]] = defaultdict(list)
        for task in matrix.tasks:
            for record in read_results(raw, task.name):
                run = Run(task.name, record["row"], record["share"], record["seed"])
                if record["split"] != split:
                    continue
                if matrix.config_path(run).is_file() and plan_run(matrix, run, data_seed).key == record["key"]:
                    self._found[task.name, run.row, run.share].append(record)
                else:
                    self.stale.append(str(run))

    def records(self, task: str, row: str, share: int) -> list[Record]:
        """Records of a cell, by seed."""
        share = 100 if row == DENSE else share
        return sorted(self._found.get((task, row, share), []), key=lambda record: record["seed"])

    def everything(self) -> list[Record]:
        """All records."""
        return [record for records in self._found.values() for record in records]

    def by_seed(self, task: str, row: str, share: int, metric: str, of: str = "final") -> dict[int, float]:
        """A metric in points by seed; ``of``: ``final``, ``cut``, ``cut_recalibrated`` or ``dense`` (pre-trained)."""
        found = {record["seed"]: record["metrics"].get(of) for record in self.records(task, row, share)}
        # MMDetection reports no metric at all of a network that detects nothing; its AP is 0.
        values = {
            seed: metrics.get(metric, None if metrics else 0.0)
            for seed, metrics in found.items()
            if metrics is not None
        }
        return {seed: points(metric, value) for seed, value in values.items() if value is not None}

    def metric(self, task: str, row: str, share: int, metric: str, of: str = "final") -> Summary | None:
        """The same, summarised."""
        return Summary.of(list(self.by_seed(task, row, share, metric, of).values()))

    def cost(self, task: str, row: str, share: int, name: str) -> Summary | None:
        """``macs``, ``params`` or ``bytes`` of the compact form over those of the dense one, in percent."""
        records = [r for r in self.records(task, row, share) if r["costs"]]
        return Summary.of([100 * r["costs"][name]["compact"] / r["costs"][name]["dense"] for r in records])

    def latency(self, task: str, row: str, share: int) -> Summary | None:
        """Latency of the compact backbone over that of the dense one, in percent."""
        found = [r["latency"] for r in self.records(task, row, share) if r.get("latency")]
        return Summary.of([100 * each["compact_ms"] / each["dense_ms"] for each in found])

    def training_time(self, task: str, row: str, share: int) -> float | None:
        """CPU seconds of all trainings of a row over those of a dense training of as many epochs.

        Of runs that had a dense training beside them, on their machine; where none had, over those of the dense row.
        """
        records = self.records(task, row, share)
        beside = [r for r in records if r["training"].get("dense_cpu_seconds_an_epoch")]
        if beside:
            dense = [r["training"]["dense_cpu_seconds_an_epoch"] * r["epochs"]["total"] for r in beside]
            return sum(r["training"]["cpu_seconds"] for r in beside) / sum(dense)
        means = [
            Summary.of([r["training"]["cpu_seconds"] for r in self.records(task, name, share)]) for name in (row, DENSE)
        ]
        return None if None in means else means[0].mean / means[1].mean

    def epochs(self, task: str, row: str, share: int) -> str:
        """Epochs of the stages: ``20 + 20``; a range when runs differ."""
        found = [r["epochs"] for r in self.records(task, row, share)]
        stages = [name for name in ("pretrain", "train", "finetune") if found and name in found[0]]
        spans = [(min(e[name] for e in found), max(e[name] for e in found)) for name in stages]
        return " + ".join(str(low) if low == high else f"{low}–{high}" for low, high in spans)
