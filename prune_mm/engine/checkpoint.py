"""Is this checkpoint one of this model?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prune_mm.structures.json_text import one_line
from prune_mm.structures.pair import dense_shapes
from prune_mm.structures.plan import MISFITS

PRUNER_PREFIX = "pruner."
#: State of later pruners in a list, whose shapes follow from the decisions of the earlier ones.
LATER_PREFIX = f"{PRUNER_PREFIX}saved."


def check_checkpoint(model: nn.Module, checkpoint: dict, name: str, whole: bool = False) -> None:
    """Compare a checkpoint with a model before it is loaded.

    Heads may differ (a COCO checkpoint fine-tuned on other classes); what is pruned may not.

    Args:
        model: prunable or compact model.
        checkpoint: with the key ``state_dict``, or a bare state dict.
        name: what to call the checkpoint in messages.
        whole: every parameter must be there, not only those of the pruned scope; pruning decisions, if any, too.

    Raises:
        ValueError: one line naming the checkpoint, the first tensor that does not fit, and what was expected.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{name} holds a {type(checkpoint).__name__}, not a checkpoint")
    if checkpoint.get("format") == "prune_mm.compact" and hasattr(model, "pruner"):
        raise ValueError(f"{name} is a compact artifact; load it through type='prune_mm.CompactModel', not here")
    state = state_dict_of(checkpoint, name)
    scope = getattr(model, "prune_scope", "")
    needed = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if not key.startswith(PRUNER_PREFIX) and (whole or not scope or key.startswith(f"{scope}."))
    }
    if not any(".pair." in key for key in state):
        # A dense checkpoint; its kernels are split when they are loaded.
        shapes = dense_shapes({key: tensor.shape for key, tensor in needed.items()})
        needed = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    missing = [key for key in needed if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"{name} is not a checkpoint of this {type(model).__name__}: it lacks '{missing[0]}' "
            f"and {len(missing) - 1} more of {len(needed)} tensors"
        )
    for key, tensor in needed.items():
        if key in state and state[key].shape != tensor.shape:
            raise ValueError(
                f"{name} is not a checkpoint of this {type(model).__name__}: '{key}' has shape "
                f"{tuple(state[key].shape)}, the model needs {tuple(tensor.shape)}"
            )
        if key in state and state[key].is_complex() != tensor.is_complex():
            kind = type(model).__name__
            raise ValueError(f"{name} is not a checkpoint of this {kind}: '{key}' is {state[key].dtype}")
    if whole:
        _check_decisions(model, state, name)


def _check_decisions(model: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """The pruner's tensors fit, or there are none at all."""
    found, needed = (
        {
            key: (tensor.shape, tensor.dtype)
            for key, tensor in tensors.items()
            if key.startswith(PRUNER_PREFIX) and not key.startswith(LATER_PREFIX)
        }
        for tensors in (state, model.state_dict())
    )
    odd = [key for key in {**needed, **found} if needed.get(key) != found.get(key)]
    if found and needed and odd:
        raise ValueError(
            f"{name} holds the decisions of another pruner, or of other settings than this "
            f"{model.pruner.label}: '{odd[0]}' and {len(odd) - 1} more do not fit"
        )


@contextmanager
def fitting(name: str) -> Iterator[None]:
    """Around what uses the tensors of a checkpoint: sizes that are right can still hold impossible decisions.

    Args:
        name: what to call the checkpoint in messages.

    Raises:
        ValueError: one line naming the checkpoint, for whatever torch or Python raises inside.
    """
    try:
        yield
    except MISFITS as error:
        raise ValueError(f"{name} holds tensors that do not fit together: {one_line(repr(error))}") from error


def state_dict_of(checkpoint: dict, name: str = "the file") -> dict[str, Tensor]:
    """The state dict of a checkpoint, without wrapper prefixes.

    Raises:
        ValueError: when there is none.
    """
    state: Any = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{name} holds no state dict")
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def strip_pruner(checkpoint: dict) -> int:
    """Drop pruning decisions from a checkpoint, in place; returns how many tensors went."""
    state = checkpoint.get("state_dict", checkpoint)
    keys = [key for key in state if key.startswith(PRUNER_PREFIX)]
    for key in keys:
        del state[key]
    return len(keys)
