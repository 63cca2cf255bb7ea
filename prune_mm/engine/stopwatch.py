"""StopwatchHook: what a training costs, without start-up and validation, across interruptions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from prune_mm.files import write_text_atomically
from prune_mm.registry import HOOKS

#: Written into the work dir, and into the ``meta`` of checkpoints.
FILE, KEY = "stopwatch.json", "stopwatch"


@HOOKS.register_module()
class StopwatchHook(Hook):
    """Counts seconds on the clock and on the processor from the start of the training to its end.

    Validations do not count, decisions of a pruner do. Checkpoints carry the count, so a resumed run adds to that of
    the work it goes on with. In the end ``stopwatch.json`` in the work dir holds ``wall_seconds`` and ``cpu_seconds``
    (of this process and all its threads), ``epochs`` and ``iterations``.
    """

    # Last, so that the other hooks' work in the same place is counted; checkpoints are written before.
    priority = "LOWEST"

    def __init__(self) -> None:
        """Nothing was counted yet."""
        self._spent = {"wall_seconds": 0.0, "cpu_seconds": 0.0}
        self._since: tuple[float, float] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on from the count of a checkpoint that training resumes from."""
        found = (checkpoint.get("meta") or {}).get(KEY)
        if runner._resume and isinstance(found, dict):
            self._spent = {name: float(found.get(name, 0.0)) for name in self._spent}

    def before_train(self, runner: Runner) -> None:
        """Start."""
        self._start()

    def before_val(self, runner: Runner) -> None:
        """Pause."""
        self._stop()

    def after_val(self, runner: Runner) -> None:
        """Go on."""
        self._start()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put the count into the checkpoint."""
        running = self._since is not None
        self._stop()
        checkpoint.setdefault("meta", {})[KEY] = dict(self._spent)
        if running:
            self._start()

    def after_train(self, runner: Runner) -> None:
        """Write the count."""
        self._stop()
        found: dict[str, Any] = {**self._spent, "epochs": runner.epoch, "iterations": runner.iter}
        write_text_atomically(Path(runner.work_dir) / FILE, json.dumps(found, indent=1) + "\n")

    def _start(self) -> None:
        self._since = (time.perf_counter(), time.process_time())

    def _stop(self) -> None:
        if self._since is not None:
            wall, processor = self._since
            self._spent["wall_seconds"] += time.perf_counter() - wall
            self._spent["cpu_seconds"] += time.process_time() - processor
        self._since = None
