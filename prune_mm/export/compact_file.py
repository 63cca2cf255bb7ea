"""``compact.pth``: weights of a compact network and the plan that rebuilds it. Data only, no pickled classes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_mm.files import write_atomically
from prune_mm.structures import Plan

FORMAT = "prune_mm.compact"
VERSION = 1


@dataclass(frozen=True)
class CompactFile:
    """What ``compact.pth`` holds.

    Attributes:
        plan: how the dense network becomes the compact one.
        state_dict: tensors of the compact network, under the dense network's names.
        meta: plain data; ``dataset_meta`` has the classes and palette that inferencers need.
    """

    plan: Plan
    state_dict: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write the file at once or not at all."""
        plan = self.plan.to_json()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict.items()}
        data = {
            "format": FORMAT,
            "version": VERSION,
            "plan": plan,
            "state_dict": state,
            "meta": self.meta,
            "sha256": _digest(plan, state),
        }
        write_atomically(path, lambda temporary: torch.save(data, temporary))

    @classmethod
    def load(cls, path: str | os.PathLike) -> CompactFile:
        """Read the file with ``weights_only=True``.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: one line naming the file and what is wrong with it.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no compact artifact at '{path}'; tools/export.py writes one")
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has no common error for damaged files
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ValueError(f"'{path}' is damaged or not a compact artifact: {reason}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"'{path}' is not a compact artifact (it holds no format '{FORMAT}')")
        if data.get("version") != VERSION:
            raise ValueError(f"'{path}' has version {data.get('version')!r}, this prune_mm reads version {VERSION}")
        state, meta = data.get("state_dict"), data.get("meta")
        if not isinstance(state, dict) or not all(_is_plain(value) for value in state.values()):
            raise ValueError(f"'{path}' is damaged: 'state_dict' must hold dense tensors")
        if not isinstance(data.get("plan"), str) or not isinstance(meta, dict):
            raise ValueError(f"'{path}' is damaged: 'plan' must be text and 'meta' a table")
        if data.get("sha256") != _digest(data["plan"], state):
            raise ValueError(f"'{path}' was changed after it was written (its sha256 does not match); export it again")
        try:
            return cls(Plan.from_json(data["plan"]), state, meta)
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor whose bytes one can read."""
    is_dense = isinstance(value, Tensor) and value.layout is torch.strided
    return is_dense and value.device.type == "cpu" and not value.is_quantized


def _digest(plan: str, state: dict[str, Tensor]) -> str:
    """SHA-256 over the plan and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(plan.encode())
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_into(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        ValueError: one line naming the file and the first tensor that does not fit.
    """
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            where = "the file" if name not in state else f"the {type(model).__name__} of this config"
            raise ValueError(f"'{path}' does not fit its config: {where} has no tensor '{name}'")
        if own[name].shape != state[name].shape:
            raise ValueError(
                f"'{path}' does not fit its config: '{name}' has shape {tuple(state[name].shape)}, "
                f"the plan makes {tuple(own[name].shape)}"
            )
        if own[name].dtype != state[name].dtype:
            kinds = f"{state[name].dtype}, not {own[name].dtype}"
            raise ValueError(f"'{path}' does not fit its config: '{name}' is {kinds}")
    model.load_state_dict(state)
