"""Learning rates of Hinge's matrices, which follow the gradients of both kinds for the length of a step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from prune_mm.pruners.hinge_math import gradient_ratio, group_norms, learning_rates
from prune_mm.pruners.hinge_units import HingeUnit


class MatrixRates:
    """Scales learning rates before a step and puts them back behind it: schedulers compute the next from the present.

    Args:
        units: whose matrices are of a first and a second kind.
        method: ``p1``, ``p2``, or None: rates stay.
    """

    def __init__(self, units: Sequence[HingeUnit], method: str | None) -> None:
        """See the class."""
        self.units, self.method = list(units), method
        self._scheduled: list[float] = []

    @property
    def adjusts(self) -> bool:
        """Whether there is anything to adjust: both kinds of matrices."""
        return self.method is not None and {unit.which for unit in self.units} == {1, 2}

    def check(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Make sure that matrices share no parameter group with anything else.

        Raises:
            ValueError: saying what the config needs.
        """
        if not self.adjusts:
            return
        kinds = self._kinds(module)
        for group in optimizer.param_groups:
            if len({kinds.get(id(parameter), 0) for parameter in group["params"]}) > 1:
                names = list(dict.fromkeys(name for unit in self.units for name, _ in unit.matrices))
                raise ValueError(
                    f"lr_adjust={self.method!r} needs parameter groups of their own for the matrices: set "
                    "optim_wrapper.paramwise_cfg=dict(custom_keys={'.pair.weight': dict(lr_mult=100)}), with the "
                    f"names of {', '.join(names[:2])}; or lr_adjust=None"
                )

    def scale(self, module: nn.Module, optimizer: Optimizer, previous: float | None) -> float:
        """Scale the rates by the gradients, and return the running ratio they were scaled with."""
        sums = {1: 0.0, 2: 0.0}
        for unit in self.units:
            gradients = unit.gradients(module)
            if gradients:
                sums[unit.which] += float(group_norms(gradients).sum())
        ratio, kinds = gradient_ratio(sums[1], sums[2], previous), self._kinds(module)
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            kind = kinds.get(id(group["params"][0]), 0) if group["params"] else 0
            group["lr"] = learning_rates([group["lr"]] * 3, ratio, self.method)[kind]
        return ratio

    def proximal(self, module: nn.Module, optimizer: Optimizer) -> float:
        """The rate of proximal steps: that of the second matrices, or of the first, where there is no second."""
        kinds = self._kinds(module)
        rates = {kinds.get(id(p), 0): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        return rates.get(2, rates.get(1, 0.0))

    def restore(self, optimizer: Optimizer) -> None:
        """Put back what was scaled."""
        for group, rate in zip(optimizer.param_groups, self._scheduled):
            group["lr"] = rate
        self._scheduled = []

    def _kinds(self, module: nn.Module) -> dict[int, int]:
        """1 for the first matrices, 2 for the second, by identity of the parameter."""
        return {id(module.get_parameter(name)): unit.which for unit in self.units for name, _ in unit.matrices}
