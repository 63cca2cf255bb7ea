"""MobileNet V1, which MMPretrain has no backbone of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from prune_mm.backbones.base import StagedBackbone, conv1x1, conv3x3
from prune_mm.registry import MODELS

#: Output channels of the blocks of each stage; all stages but the first start with stride 2.
STAGES = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))


class DepthwiseSeparable(nn.Module):
    """3x3 depthwise and 1x1 convolution, each with batch norm and ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the depthwise convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, in_channels, stride, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv1x1(in_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)))


@MODELS.register_module()
class MobileNetV1(StagedBackbone):
    """MobileNet V1 (Howard et al. 2017) of 13 depthwise separable blocks in five stages.

    Published in gumi and 1xN. The last feature map has ``1024 * widen_factor`` channels.

    Args:
        widen_factor: multiplies all widths.
        out_indices: see :class:`~prune_mm.backbones.base.StagedBackbone`.
        init_cfg: see :class:`~prune_mm.backbones.base.StagedBackbone`.

    Raises:
        ValueError: for a factor that is not positive.
    """

    def __init__(
        self,
        widen_factor: float = 1.0,
        out_indices: Sequence[int] | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(out_indices, init_cfg)
        if isinstance(widen_factor, bool) or not isinstance(widen_factor, (int, float)) or not widen_factor > 0:
            raise ValueError(f"widen_factor={widen_factor!r} must be a positive number")

        def scaled(width: int) -> int:
            return max(1, int(width * widen_factor))

        channels = scaled(32)
        self.conv1 = conv3x3(3, channels, stride=2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        stages = []
        for index, widths in enumerate(STAGES):
            blocks = []
            for number, width in enumerate(widths):
                stride = 2 if index > 0 and number == 0 else 1
                blocks.append(DepthwiseSeparable(channels, scaled(width), stride))
                channels = scaled(width)
            stages.append(nn.Sequential(*blocks))
        self.add_stages(stages)

    def stem(self, x: Tensor) -> Tensor:
        """Convolution, norm, ReLU."""
        return self.relu(self.bn1(self.conv1(x)))
