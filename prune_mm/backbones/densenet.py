"""DenseNets for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_mm.backbones.base import StagedBackbone, blocks_per_stage, check_choice, check_count, conv1x1, conv3x3
from prune_mm.registry import MODELS


class DenseLayer(nn.Module):
    """BN - ReLU - 3x3, put behind the channels that came in.

    Args:
        in_channels: channels of the input.
        growth: new channels.
    """

    convs = 1

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(in_channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, in_channels + growth, H, W)."""
        return torch.cat([x, self.conv1(self.relu1(self.bn1(x)))], 1)


class DenseBottleneck(nn.Module):
    """BN - ReLU - 1x1 - BN - ReLU - 3x3, put behind the channels that came in.

    Args:
        in_channels: channels of the input.
        growth: new channels; there are four times as many inside.
    """

    convs = 2

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv1x1(in_channels, 4 * growth)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, in_channels + growth, H, W)."""
        new = self.conv1(self.relu1(self.bn1(x)))
        new = self.conv2(self.relu2(self.bn2(new)))
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    """BN - ReLU - 1x1 - average pooling between two stages.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / 2, W / 2)."""
        return F.avg_pool2d(self.conv1(self.relu1(self.bn1(x))), 2)


@MODELS.register_module()
class CIFARDenseNet(StagedBackbone):
    """DenseNet of three stages with as many layers each.

    Published as: DenseNet-40 of gumi (``stem_channels=16``) and of Hinge (the defaults), and the topology of
    CondenseNet-86 in gumi (``depth=86, growth=(8, 16, 32), bottleneck=True, transition='pool', stem_channels=16``).
    A transition belongs to the stage it follows. The last feature map has 456 channels by default.

    Args:
        depth: convolutions and the classifier. Transitions count where they have a convolution: 3n + 4 (6n + 4 with
            bottlenecks) with ``transition='conv'``, 3n + 2 (6n + 2) with ``transition='pool'``.
        growth: new channels a layer; one number, or one for each stage.
        bottleneck: whether a 1x1 convolution comes before each 3x3.
        transition: 'conv' (BN - ReLU - 1x1 - average pooling) or 'pool' (average pooling alone).
        reduction: share of the channels that a 'conv' transition keeps.
        stem_channels: channels of the first convolution.
        out_indices: see :class:`~prune_mm.backbones.base.StagedBackbone`.
        init_cfg: see :class:`~prune_mm.backbones.base.StagedBackbone`.

    Raises:
        ValueError: for a depth or variant there is not.
    """

    def __init__(
        self,
        depth: int = 40,
        growth: int | Sequence[int] = 12,
        bottleneck: bool = False,
        transition: str = "conv",
        reduction: float = 1.0,
        stem_channels: int = 24,
        out_indices: Sequence[int] | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(out_indices, init_cfg)
        check_choice("transition", transition, ("conv", "pool"))
        check_choice("bottleneck", bottleneck, (False, True))
        check_count("stem_channels", stem_channels)
        if isinstance(reduction, bool) or not isinstance(reduction, (int, float)) or not 0 < reduction <= 1:
            raise ValueError(f"reduction={reduction!r} must be a share in (0, 1]")
        layer_type = DenseBottleneck if bottleneck else DenseLayer
        of = f"transition={transition!r} and bottleneck={bottleneck}"
        count = blocks_per_stage(depth, 3 * layer_type.convs, 4 if transition == "conv" else 2, of)
        self.conv1 = conv3x3(3, stem_channels)
        stages, channels = [], stem_channels
        for index, new in enumerate(_growth_of_stages(growth)):
            stage = nn.Sequential()
            for _ in range(count):
                stage.append(layer_type(channels, new))
                channels += new
            if index < 2 and transition == "pool":
                stage.append(nn.AvgPool2d(2))
            elif index < 2:
                kept = int(channels * reduction)
                stage.append(Transition(channels, kept))
                channels = kept
            stages.append(stage)
        self.add_stages(stages)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def stem(self, x: Tensor) -> Tensor:
        """The first convolution; its norms are those of the layers."""
        return self.conv1(x)

    def tail(self, x: Tensor) -> Tensor:
        """The norm and ReLU behind the last layer."""
        return self.relu(self.bn(x))


def _growth_of_stages(growth: int | Sequence[int]) -> tuple[int, int, int]:
    values = tuple(growth) if isinstance(growth, Sequence) and not isinstance(growth, str) else (growth,) * 3
    if len(values) != 3:
        raise ValueError(f"growth={growth!r} must be one number or three, one for each stage")
    for value in values:
        check_count("growth", value)
    return values
