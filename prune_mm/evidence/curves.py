"""Learning curves of a training: loss, validation, and how the allocation of layers moves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from prune_mm.engine.checkpoint import state_dict_of
from prune_mm.engine.reading import read_checkpoint

#: Validations that make a curve.
_FEWEST = 2
_MASKS, _LEVELS, _ORDERS = "pruner.masks.", "pruner.levels", "pruner.perms.out:"


def read_curve(folder: Path, config: Config) -> dict[str, Any] | None:
    """Curves of a training that was validated several times on its way; None of another one.

    Checkpoints of earlier epochs are removed when they have been read.

    Returns:
        ``loss``: ``[iteration, loss]`` pairs; ``val``: ``[epoch, metrics]`` pairs; ``iters_per_epoch``;
        ``allocation``: layer names and ``[epoch, values]`` pairs, live channels or numbers of groups (``kind``).
    """
    interval, epochs = config.train_cfg.get("val_interval"), config.train_cfg.get("max_epochs")
    if not interval or not epochs or epochs // interval < _FEWEST:
        return None
    loss: dict[int, float] = {}
    val: dict[int, dict[str, float]] = {}
    length = 0
    for line in _scalars(folder):
        if "loss" in line:
            loss[line["iter"]] = round(line["loss"], 4)
            length = max(length, -(-line["iter"] // line["epoch"]))
        elif "step" in line:
            val[line["step"]] = {key: round(v, 4) for key, v in line.items() if "/" in key and isinstance(v, float)}
    found = {"loss": sorted(loss.items()), "val": sorted(val.items()), "iters_per_epoch": length}
    return found | {"allocation": _allocation(folder)}


def _scalars(folder: Path) -> Iterator[dict[str, Any]]:
    """Logged numbers of all the runs in a work dir, oldest first: a resumed run overwrites what it repeats."""
    for path in sorted(folder.glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # half a line of a process that was killed
                continue


def _allocation(folder: Path) -> dict[str, Any] | None:
    epochs = {int(re.sub(r"\D", "", path.stem)): path for path in folder.glob("epoch_*.pth")}
    layers: list[str] = []
    values: list[tuple[int, list[int]]] = []
    kind = "channels"
    for epoch, path in sorted(epochs.items()):
        state = state_dict_of(read_checkpoint(path))
        if _LEVELS in state:
            kind = "groups"
            layers = [key.removeprefix(_ORDERS).replace("/", ".") for key in state if key.startswith(_ORDERS)]
            values.append((epoch, [2 ** (int(level) - 1) for level in state[_LEVELS]]))
        else:
            masks = {key: tensor for key, tensor in state.items() if key.startswith(_MASKS)}
            layers = [key.removeprefix(_MASKS).replace("/", ".") for key in masks]
            values.append((epoch, [int(mask.sum()) for mask in masks.values()]))
    for epoch in sorted(epochs)[:-1]:
        epochs[epoch].unlink()
    return {"kind": kind, "layers": layers, "values": values} if layers and len(values) > 1 else None
