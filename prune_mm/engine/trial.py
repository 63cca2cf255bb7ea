"""Does a compact network compute what the dense one's place asks for? Tried on one image before anyone relies on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prune_mm.engine.scope import get_scope, scope_inputs
from prune_mm.export.law import outputs_of
from prune_mm.graph.trace import in_eval_mode

#: Sides of square images, in pixels; the first one that the dense network takes is used.
_SIZES = (64, 96, 128, 224, 320, 512)


class Trial:
    """One random image through the scope of a dense model, to compare its compact form with.

    A plan can leave out a place to cut, or cut what others read: each tensor of it fits, and the network does not.

    Args:
        model: the dense model, before it is made compact in place.
        scope: dotted name of what the plan is about.

    Raises:
        ValueError: when the model has no such scope, or does not run it on images.
    """

    def __init__(self, model: nn.Module, scope: str) -> None:
        """Run the dense scope; where it takes none of the images, nothing can be compared."""
        get_scope(model, scope)
        self.inputs: tuple[Any, ...] | None = None
        self.shapes: list[torch.Size] = []
        for side in _SIZES:
            try:
                inputs = scope_inputs(model, scope, (side, side))
                self.shapes = [output.shape for output in _run(model, scope, inputs)]
            except (RuntimeError, AssertionError, IndexError):  # some networks take images of one size only
                continue
            self.inputs = inputs
            return

    def check(self, model: nn.Module, scope: str) -> None:
        """Run the compact form.

        Raises:
            ValueError: when it cannot be run, or puts out other shapes or NaN.
        """
        if self.inputs is None:
            return
        try:
            outputs = _run(model, scope, self.inputs)
        except Exception as error:  # a network that does not fit together may raise anything
            raise ValueError(f"the network it makes cannot be run ({type(error).__name__}: {error})") from error
        if [output.shape for output in outputs] != self.shapes:
            raise ValueError("the network it makes puts out other shapes than the dense one")
        if not all(bool(output.isfinite().all()) for output in outputs):
            raise ValueError("the network it makes computes NaN or infinite numbers")


def _run(model: nn.Module, scope: str, inputs: tuple[Any, ...]) -> list[Tensor]:
    module = get_scope(model, scope)
    with in_eval_mode(model), torch.no_grad():
        return outputs_of(module, inputs)
