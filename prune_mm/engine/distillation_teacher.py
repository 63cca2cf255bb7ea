"""The teacher of a distillation: from a checkpoint, frozen, in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from prune_mm.compat import fix_ssd_head
from prune_mm.engine.checkpoint import check_checkpoint, state_dict_of
from prune_mm.engine.compact import without_pretrained
from prune_mm.engine.reading import read_checkpoint

#: Configs of this package that hold the dense model of a network as ``model``.
_HOLDERS = ("CompactModel", "PrunableModel")
#: What says which teacher it is.
TEACHER_KEYS = ("checkpoint", "config", "model")


def check_given(teacher: Any) -> None:
    """Make sure that a teacher is named as it should be.

    Raises:
        ValueError: saying how.
    """
    keys = set(teacher) if isinstance(teacher, dict) else set()
    if "checkpoint" not in keys or not keys <= set(TEACHER_KEYS) or {"config", "model"} <= keys:
        raise ValueError(
            f"teacher={teacher!r} must be dict(checkpoint=PATH), and config=PATH or model=dict(...) unless it is "
            "the dense network of the model that trains"
        )


def build_teacher(given: dict, model: Any, check: Callable[[nn.Module, str], Any]) -> nn.Module:
    """The teacher with its weights, without gradients and in eval mode; the generators of the run stay as they are.

    Args:
        given: ``checkpoint``, and ``config`` or ``model``.
        model: config of the model that trains, whose dense form is the teacher if nothing else is said.
        check: raises ValueError when the network, built but without its weights, is of no use.

    Raises:
        FileNotFoundError: when there is no such config or checkpoint.
        ValueError: in one line, when they do not fit each other.
    """
    with torch.random.fork_rng(devices=[]):
        teacher = MMENGINE_MODELS.build(without_pretrained(_config(given, model)))
    fix_ssd_head()
    check(teacher, "the teacher")
    name = str(given["checkpoint"])
    checkpoint = _read(name)
    check_checkpoint(teacher, checkpoint, f"teacher: '{name}'", whole=True)
    state, own = state_dict_of(checkpoint), teacher.state_dict()
    foreign = [key for key in state if key not in own]
    if foreign:
        raise ValueError(
            f"teacher: '{name}' is not a checkpoint of this {type(teacher).__name__}: it also holds "
            f"'{foreign[0]}' and {len(foreign) - 1} more tensors"
        )
    teacher.load_state_dict(state)
    return teacher.requires_grad_(False).eval()


def _config(given: dict, model: Any) -> dict:
    if "model" in given:
        found = copy.deepcopy(given["model"])
    elif "config" in given:
        path = str(given["config"])
        if not Path(path).is_file():
            raise FileNotFoundError(f"teacher: no config at '{path}'")
        found = Config.fromfile(path).model
    else:
        found = model or {}
        if _kind(found) not in _HOLDERS:
            raise ValueError(
                f"teacher={given!r} names no network, and the model is no compact form of one; add "
                "config=PATH or model=dict(...)"
            )
    return found["model"] if _kind(found) in _HOLDERS else found


def _kind(config: Any) -> str:
    return str(config.get("type")).rpartition(".")[2] if isinstance(config, dict) else ""


def _read(path: str) -> Any:
    if "://" in path:
        return CheckpointLoader.load_checkpoint(path, map_location="cpu")
    try:
        return read_checkpoint(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"teacher: {error}") from error
