"""Raw results: one JSON file a task, into which runs are merged."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prune_mm.evidence.matrix import FORMAT, Plan
from prune_mm.files import write_text_atomically

_PACKAGES = ("torch", "torchvision", "onedl-mmengine", "onedl-mmdetection", "onedl-mmpretrain", "numpy", "scikit-learn")
_IDENTITY = ("row", "share", "seed", "split")


def read_results(folder: str | Path, task: str) -> list[dict[str, Any]]:
    """Records of a task; none when nothing was measured.

    Raises:
        ValueError: the file is damaged or of another format.
    """
    path = Path(folder) / f"{task}.json"
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text())
        found, runs = content["format"], list(content["runs"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is damaged: {type(error).__name__}: {error}") from error
    if found != FORMAT:
        raise ValueError(f"'{path}' has format {found}, this is for {FORMAT}; move it away to measure again")
    return runs


def merge_results(folder: str | Path, task: str, records: Iterable[dict[str, Any]]) -> None:
    """Add records to a task's file; one of the same row, share, seed and split takes the place of the older one.

    A latency that was measured for the same key stays.
    """
    known = {_identity(record): record for record in read_results(folder, task)}
    for record in records:
        older = known.get(_identity(record), {})
        if record.get("latency") is None and older.get("key") == record["key"]:
            record = {**record, "latency": older.get("latency")}
        known[_identity(record)] = record
    ordered = [known[identity] for identity in sorted(known, key=str)]
    lines = ",\n".join(json.dumps(record, sort_keys=True) for record in ordered)
    content = f'{{"format": {FORMAT}, "task": {json.dumps(task)}, "runs": [\n{lines}\n]}}\n'
    write_text_atomically(Path(folder) / f"{task}.json", content)


def _identity(record: dict[str, Any]) -> tuple:
    return tuple(record[name] for name in _IDENTITY)


def make_record(plan: Plan, split: str, found: dict[str, Any], jobs: int) -> dict[str, Any]:
    """The record of a run that has ended: what was measured, and of what, by what, where."""
    run = plan.run
    return {
        "row": run.row,
        "share": run.share,
        "seed": run.seed,
        "split": split,
        "key": plan.key,
        **{name: value for name, value in found.items() if name != "artifact"},
        "latency": None,
        "jobs": jobs,
        "versions": _versions(),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Kind of processor and number of cores; no name of the machine."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = named[0] if named else name
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
