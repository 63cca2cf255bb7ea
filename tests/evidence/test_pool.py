"""Jobs side by side: what waits for what, what falls with what, and how long it will take."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from prune_mm.evidence.pool import Clock, Job, Pool


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
