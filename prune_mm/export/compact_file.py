"""``compact.pth``: weights of a compact network and the plan that rebuilds it. Data only, no pickled classes."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_mm.export.torch_file import read_torch_file
from prune_mm.files import write_atomically
from prune_mm.structures import Plan
from prune_mm.structures.block_layer import BlockSparseLayer
from prune_mm.structures.json_text import one_line

FORMAT = "prune_mm.compact"
VERSION = 1
#: Tensors may share storages (tied weights), so they may be this many times as long as the file.
MAX_SHARING = 64


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
        content = io.BytesIO()
        # PyTorch's own writer says "unexpected pos" when a disk is full.
        torch.save(data, content)
        write_atomically(path, lambda temporary: Path(temporary).write_bytes(content.getbuffer()))

    @classmethod
    def load(cls, path: str | os.PathLike) -> CompactFile:
        """Read the file as data; nothing in it is run.

        Its digest tells damage, not who wrote it: whatever the file says is checked, here and by :func:`load_into`.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: one line naming the file and what is wrong with it.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no compact artifact at '{path}'; tools/export.py writes one")
        try:
            data = read_torch_file(path)
        except ValueError as error:
            raise ValueError(f"'{path}' is damaged or not a compact artifact: {one_line(error)}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"'{path}' is not a compact artifact (it holds no format '{FORMAT}')")
        version = data.get("version")
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"'{path}' has version {one_line(repr(version), 40)}, this prune_mm reads version {VERSION}"
            )
        state, meta = data.get("state_dict"), data.get("meta")
        if not isinstance(state, dict) or not all(_is_plain(value) for value in state.values()):
            raise ValueError(f"'{path}' is damaged: 'state_dict' must hold dense tensors")
        if not isinstance(data.get("plan"), str) or not isinstance(meta, dict):
            raise ValueError(f"'{path}' is damaged: 'plan' must be text and 'meta' a table")
        if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > MAX_SHARING * _size_of(path):
            raise ValueError(f"'{path}' is damaged: its tensors repeat each other beyond measure")
        if data.get("sha256") != _digest(data["plan"], state):
            raise ValueError(f"'{path}' was changed after it was written (its sha256 does not match); export it again")
        try:
            return cls(Plan.from_json(data["plan"]), state, meta)
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor whose elements lie one behind the other, as :meth:`CompactFile.save` writes them."""
    return isinstance(value, Tensor) and value.layout is torch.strided and value.is_contiguous()


def _size_of(path: str | os.PathLike) -> int:
    return Path(path).stat().st_size


def _digest(plan: str, state: dict[str, Tensor]) -> str:
    """SHA-256 over the plan and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(plan.encode(errors="surrogatepass"))
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(errors="surrogatepass"))
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_into(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Load a state dict that must fit exactly, and with which the network can compute.

    Raises:
        ValueError: one line naming the file and the first tensor that does not fit.
    """
    own = model.state_dict()
    for name in [*own, *state]:
        problem = _misfit(name, own, state, type(model).__name__)
        if problem:
            raise ValueError(f"'{path}' does not fit its config: {problem}")
    for name, _ in model.named_parameters():
        if name in state and not bool(state[name].isfinite().all()):
            raise ValueError(f"'{path}' holds a network that cannot compute: '{name}' has NaN or infinite weights")
    for name, tensor in state.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ValueError(f"'{path}' holds a network that cannot compute: '{name}' has NaN")
    for name in _indices(model):
        if not torch.equal(own[name], state[name]):
            raise ValueError(f"'{path}' is damaged: '{name}' is not the index its plan makes")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"'{path}' does not fit its config: {one_line(error)}") from error


def _misfit(name: Any, own: dict[str, Tensor], state: dict[str, Tensor], kind: str) -> str | None:
    """Why a tensor of the file is not the model's, or None."""
    if name not in state or name not in own:
        where = "the file" if name not in state else f"the {kind} of this config"
        return f"{where} has no tensor '{one_line(name, 80)}'"
    if own[name].shape != state[name].shape:
        return f"'{name}' has shape {tuple(state[name].shape)}, the plan makes {tuple(own[name].shape)}"
    if own[name].dtype != state[name].dtype:
        return f"'{name}' is {state[name].dtype}, not {own[name].dtype}"
    return None


def _indices(model: nn.Module) -> list[str]:
    """Names of the buffers in a model's state dict that its plan has filled already."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BlockSparseLayer)]
    return [
        f"{name}.{key}"
        for name, module in layers
        for key in ("columns", "row_pointers", "rows")
        if getattr(module, key) is not None
    ]
