"""What the networks share: stages in a row, initialisation, checks of options."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn


class StagedBackbone(BaseModule):
    """A stem, stages ``layer1`` ... ``layerN``, and what follows the last of them.

    Subclasses add their modules and call :meth:`add_stages`; ``stem`` and ``tail`` say how the ends are run.

    Args:
        out_indices: stages (from 0) whose outputs are returned; None for the last one.
        init_cfg: initialisation as in MMEngine, e.g. ``dict(type='Pretrained', checkpoint=...)``. Default: Kaiming
            normal (fan out) for convolutions, 1 and 0 for batch norms.
    """

    def __init__(self, out_indices: Sequence[int] | None = None, init_cfg: dict | list[dict] | None = None) -> None:
        if init_cfg is None:
            init_cfg = [
                {"type": "Kaiming", "layer": "Conv2d"},
                {"type": "Constant", "layer": "BatchNorm2d", "val": 1.0},
            ]
        super().__init__(init_cfg=init_cfg)
        self.out_indices = out_indices
        self.stages: tuple[str, ...] = ()

    def add_stages(self, stages: Sequence[nn.Module]) -> None:
        """Register the stages as ``layer1`` ... ``layerN``.

        Raises:
            ValueError: when ``out_indices`` names a stage there is not.
        """
        self.out_indices = check_indices("out_indices", self.out_indices, len(stages))
        self.stages = tuple(f"layer{number}" for number in range(1, len(stages) + 1))
        for name, stage in zip(self.stages, stages):
            self.add_module(name, stage)

    def stem(self, x: Tensor) -> Tensor:
        """What comes before the first stage."""
        raise NotImplementedError

    def tail(self, x: Tensor) -> Tensor:
        """What comes behind the last stage and belongs to its output."""
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the chosen stages, of images (N, 3, H, W)."""
        x = self.stem(x)
        outs = []
        for index, name in enumerate(self.stages):
            x = getattr(self, name)(x)
            if index == len(self.stages) - 1:
                x = self.tail(x)
            if index in self.out_indices:
                outs.append(x)
        return tuple(outs)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A pointwise convolution."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=bias)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size of the map at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=bias)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in tuple(choices):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def check_indices(name: str, value: Any, stages: int) -> tuple[int, ...]:
    """Stage numbers as a tuple; None stands for the last stage.

    Raises:
        ValueError: unless ``value`` holds numbers from 0 to ``stages`` - 1.
    """
    if value is None:
        return (stages - 1,)
    numbers = range(stages)
    if isinstance(value, str) or not isinstance(value, Sequence) or not value or any(v not in numbers for v in value):
        raise ValueError(f"{name}={value!r} must be a list of stages, each from 0 to {stages - 1}")
    return tuple(value)


def blocks_per_stage(depth: Any, step: int, offset: int, of: str) -> int:
    """The n of ``depth = step * n + offset``, the rule by which CIFAR networks are named.

    Raises:
        ValueError: when there is no such n of at least 1, with the depths around.
    """
    n = (depth - offset) // step if isinstance(depth, int) and not isinstance(depth, bool) else 0
    if n < 1 or step * n + offset != depth:
        near = [step * k + offset for k in range(max(n, 1), max(n, 1) + 2)]
        raise ValueError(f"depth={depth!r} must be {step}n + {offset} for {of}, such as {near[0]} or {near[1]}")
    return n
