"""Checkpoints are written whole or not at all, and old ones go only when the new one is on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from prune_mm.files import write_atomically


@register_backend("local", prefixes="", force=True)
class AtomicBackend(LocalBackend):
    """MMEngine's backend for local files, but a write that does not end leaves the file as it was."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        write_atomically(filepath, lambda temporary: LocalBackend.put(self, obj, temporary))

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text."""
        write_atomically(filepath, lambda temporary: LocalBackend.put_text(self, obj, temporary, encoding))


class SafeCheckpointHook(CheckpointHook):
    """MMEngine's hook, which removes the oldest (or the best) checkpoint *before* it writes the next one.

    With ``max_keep_ckpts=1`` a process that dies in between has nothing left.
    """

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        with self._removing_later():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        with self._removing_later():
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _removing_later(self) -> Iterator[None]:
        """Put off removals until what is written inside is on the disk."""
        backend = self.file_backend
        if isinstance(backend, _LateRemoval):
            yield
            return
        self.file_backend = late = _LateRemoval(backend)
        try:
            yield
        finally:
            self.file_backend = backend
        best = [getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()]
        late.remove_now(keep={self.last_ckpt, *best})


class _LateRemoval:
    """A file backend that only notes what is to be removed."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.noted = backend, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.noted.append((self.backend.remove, self.backend.isfile, path))

    def rmtree(self, path: str) -> None:
        self.noted.append((self.backend.rmtree, self.backend.isdir, path))

    def remove_now(self, keep: set[str | None]) -> None:
        """Remove what was noted and not written again since."""
        noted: list[tuple[Callable, Callable, str]] = self.noted
        for remove, exists, path in noted:
            if path not in keep and exists(path):
                remove(path)


def make_checkpoints_safe(runner: Runner) -> None:
    """Let the runner's checkpoint hooks keep the old checkpoint until the new one is whole."""
    for hook in runner.hooks:
        if type(hook) is CheckpointHook:
            hook.__class__ = SafeCheckpointHook
