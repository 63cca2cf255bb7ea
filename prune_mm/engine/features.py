"""Spatial information of feature maps, for criteria that look at activations."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from prune_mm.criteria import spatial_information
from prune_mm.engine.scope import get_scope


@torch.no_grad()
def collect_spatial_information(model: nn.Module, dataloader: Any, batches: int) -> dict[str, Tensor]:
    """Spatial information of the output of every layer the pruner ranks, summed over training batches.

    Runs on a copy, in train mode as published (batch statistics), so that neither the model nor its running
    statistics change.

    Args:
        model: prunable model; its data preprocessor is used.
        dataloader: yields training batches; a new pass over it is made.
        batches: how many batches to look at.

    Returns:
        Layer name to scores ``(channels,)``: the mean over each batch, summed over batches.
    """
    device = next(model.parameters()).device
    scope = revert_sync_batchnorm(copy.deepcopy(get_scope(model, model.prune_scope)))
    for child in scope.modules():
        child.training = True
    scores: dict[str, Tensor] = {}
    handles = [
        scope.get_submodule(unit.name).register_forward_hook(_adder(scores, unit.name)) for unit in model.pruner.units
    ]
    with same_random_state_after():
        for batch in islice(dataloader, batches):
            inputs = model.data_preprocessor(batch, True)["inputs"]
            scope(inputs.to(device))
    for handle in handles:
        handle.remove()
    return scores


def _adder(scores: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        value = spatial_information(output).mean(dim=0).cpu()
        scores[name] = scores[name] + value if name in scores else value

    return hook


@contextmanager
def same_random_state_after() -> Iterator[None]:
    """Put the generators of Python, NumPy and torch (CPU and present GPU) back when the block ends."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
