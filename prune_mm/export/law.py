"""The one law, checked on the network that is about to be written: masked(x) == compact(x)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune_mm.graph.shadow import tensors_in
from prune_mm.graph.trace import in_eval_mode

#: Largest difference allowed, relative to the largest output of the masked form.
TOLERANCE = 1e-4


def largest_difference(masked: nn.Module, compact: nn.Module, inputs: Sequence[tuple[Any, ...]]) -> float:
    """Largest difference of two modules' outputs over several inputs, relative to the largest output.

    Both run in eval mode without gradients, on the device of their parameters.
    """
    worst = 0.0
    with in_eval_mode(masked), in_eval_mode(compact), torch.no_grad():
        for args in inputs:
            expected, found = outputs_of(masked, args), outputs_of(compact, args)
            if [t.shape for t in expected] != [t.shape for t in found]:
                return float("inf")
            for a, b in zip(expected, found):
                difference = float((a.float() - b.float()).abs().max()) / (float(a.float().abs().max()) + 1e-12)
                worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def check_law(masked: nn.Module, compact: nn.Module, inputs: Sequence[tuple[Any, ...]]) -> float:
    """Return the largest relative difference.

    Raises:
        ValueError: when the compact form computes something else.
    """
    difference = largest_difference(masked, compact, inputs)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the compact network does not compute what the masked one does (relative difference {difference:.1e}); "
            f"nothing is written"
        )
    return difference


def outputs_of(module: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """All tensors a module returns; inputs are copied, in-place code changes them."""
    outputs = module(*copy.deepcopy(args))
    return tensors_in(outputs if isinstance(outputs, (Tensor, tuple, list, dict)) else vars(outputs))
