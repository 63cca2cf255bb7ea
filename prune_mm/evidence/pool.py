"""Several jobs side by side, each a process with one thread, in an order that respects what they need."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prune_mm.files import write_text_atomically

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One process of :mod:`prune_mm.evidence.worker`.

    Attributes:
        name: for people, and what other jobs need.
        kind: jobs of one kind take about the same time.
        content: what the worker reads; with ``out`` it leaves a result there.
        needs: names of jobs that must have ended well before.
    """

    name: str
    kind: str
    content: dict[str, Any]
    needs: tuple[str, ...] = ()


@dataclass
class Clock:
    """How long jobs take, as far as they were measured, and what is left."""

    known: dict[str, list[float]] = field(default_factory=dict)

    def note(self, kind: str, seconds: float) -> None:
        """A job has taken so long."""
        self.known.setdefault(kind, []).append(seconds)

    def expected(self, kind: str) -> float | None:
        """Mean of the same kind; of the same task where there is none; None when nothing is known of that either."""
        task = kind.partition("/")[0]
        found = self.known.get(kind) or [s for k, v in self.known.items() if k.partition("/")[0] == task for s in v]
        return fmean(found) if found else None

    def left(self, waiting: Iterable[str], side_by_side: int) -> float | None:
        """Seconds until all is done; None when nothing was measured yet."""
        expected = [self.expected(kind) for kind in waiting]
        measured = [seconds for seconds in expected if seconds is not None]
        if not measured:
            return None
        return sum(fmean(measured) if seconds is None else seconds for seconds in expected) / side_by_side


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    begin: float


class Pool:
    """Runs jobs; see :meth:`run`.

    Args:
        folder: for the jobs' files and words.
        jobs: how many side by side.
        clock: measured times, for the time that is left.
        ended: is told the job, its result (None when it leaves none) and its seconds.
        budget: seconds after which no more jobs are started; None: no limit.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int,
        clock: Clock,
        ended: Callable[[Job, Any, float], None],
        budget: float | None = None,
    ) -> None:
        """See the class."""
        self.folder, self.count, self.clock, self.ended, self.budget = folder, jobs, clock, ended, budget
        self.failed: dict[str, str] = {}
        self._done: set[str] = set()
        self._running: list[_Running] = []

    def run(self, jobs: Iterable[Job]) -> list[Job]:
        """Run jobs in their order as far as what they need allows.

        Returns:
            Those that were not started: time was up.
        """
        waiting, begin = list(jobs), time.monotonic()
        # Refreshed by hand: a thread of the display would be copied into nothing, but forks and threads do not mix.
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        with Progress(*columns, TextColumn("{task.fields[left]}"), console=console, auto_refresh=False) as bar:
            shown = bar.add_task("evidence", total=len(waiting), left="")
            try:
                while waiting or self._running:
                    in_time = self.budget is None or time.monotonic() - begin < self.budget
                    if not in_time and not self._running:
                        break
                    if in_time:
                        self._start_what_can_be(waiting)
                    self._collect(bar.console.print)
                    self._skip_what_cannot_be(waiting)
                    bar.update(
                        shown,
                        completed=len(self._done) + len(self.failed),
                        description=", ".join(running.job.name for running in self._running) or "evidence",
                        left=self._left(waiting),
                    )
                    bar.refresh()
                    time.sleep(0.2)
            finally:
                self._stop()
        return waiting

    def _start_what_can_be(self, waiting: list[Job]) -> None:
        names = {job.name for job in waiting} | {running.job.name for running in self._running}
        for job in list(waiting):
            if len(self._running) >= self.count:
                return
            if not set(job.needs) & (names | set(self.failed)):
                waiting.remove(job)
                self._running.append(self._start(job))

    def _start(self, job: Job) -> _Running:
        folder = self.folder / job.name.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "job.json"
        write_text_atomically(path, json.dumps({**job.content, "out": str(folder / "result.json")}) + "\n")
        (folder / "result.json").unlink(missing_ok=True)
        # One thread each: several would wait for each other, and times could not be compared.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "prune_mm.evidence.worker", str(path)]
        with (folder / "words.txt").open("w") as words:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=words, stderr=subprocess.STDOUT, start_new_session=True
            )
        return _Running(job, process, time.monotonic())

    def _collect(self, say: Callable[[str], None]) -> None:
        for running in list(self._running):
            status = running.process.poll()
            if status is None:
                continue
            self._running.remove(running)
            job, seconds = running.job, time.monotonic() - running.begin
            folder = self.folder / job.name.replace("/", "-")
            if status:
                words = (folder / "words.txt").read_text(errors="replace").strip().splitlines()
                self.failed[job.name] = (words or [f"status {status}"])[-1][:400]
                say(f"{job.name} failed: {self.failed[job.name]}")
                continue
            result = folder / "result.json"
            self._done.add(job.name)
            self.clock.note(job.kind, seconds)
            self.ended(job, json.loads(result.read_text()) if result.is_file() else None, seconds)

    def _skip_what_cannot_be(self, waiting: list[Job]) -> None:
        for job in list(waiting):
            lost = [name for name in job.needs if name in self.failed]
            if lost:
                waiting.remove(job)
                self.failed[job.name] = f"{lost[0]} failed"

    def _left(self, waiting: list[Job]) -> str:
        kinds = [job.kind for job in waiting]
        if not kinds and not self._running:
            return ""
        seconds = self.clock.left([*kinds, *(running.job.kind for running in self._running)], self.count)
        if seconds is None:
            return "time left: not known yet"
        begun = sum(time.monotonic() - running.begin for running in self._running) / self.count
        return f"about {max(seconds - begun, 0) / 60:.0f} min left"

    def _stop(self) -> None:
        """End what still runs, when this process is stopped; the next call goes on with it."""
        for running in self._running:
            with suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGTERM)
        for running in self._running:
            running.process.wait()
