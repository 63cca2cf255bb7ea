"""Pre-activation ResNets for 32x32 images, narrow and wide."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from prune_mm.backbones.base import StagedBackbone, blocks_per_stage, check_choice, check_count, conv1x1, conv3x3
from prune_mm.backbones.shortcuts import SHORTCUTS, make_shortcut
from prune_mm.registry import MODELS


class PreBasicBlock(nn.Module):
    """BN - ReLU - 3x3 twice; the shortcut takes the input as it comes.

    Args:
        in_channels: channels of the input.
        width: channels of both convolutions.
        stride: of the block.
        shortcut: see :func:`~prune_mm.backbones.shortcuts.make_shortcut`.
        bias: whether the convolutions have biases.
        stride_in: the convolution with the stride, 'conv1' or 'conv2'.
        dropout: probability between the convolutions.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        shortcut: str,
        bias: bool = False,
        stride_in: str = "conv1",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in == "conv1" else (1, stride)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(in_channels, width, first, bias=bias)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(width, width, second, bias=bias)
        self.downsample = make_shortcut(shortcut, in_channels, width, stride, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, width, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.dropout(self.conv1(self.relu1(self.bn1(x))))
        x = self.conv2(self.relu2(self.bn2(x)))
        return x + identity


class PreBottleneck(nn.Module):
    """BN - ReLU before each of 1x1 - 3x3 - 1x1; the shortcut takes the input as it comes.

    Args:
        in_channels: channels of the input.
        width: channels inside; the output has four times as many.
        stride: of the 3x3 convolution.
        shortcut: see :func:`~prune_mm.backbones.shortcuts.make_shortcut`.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv1x1(in_channels, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()
        self.conv3 = conv1x1(width, self.expansion * width)
        self.downsample = make_shortcut(shortcut, in_channels, self.expansion * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, 4 * width, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.conv1(self.relu1(self.bn1(x)))
        x = self.conv2(self.relu2(self.bn2(x)))
        x = self.conv3(self.relu3(self.bn3(x)))
        return x + identity


class _PreActivation(StagedBackbone):
    """Stem convolution, three stages of pre-activation blocks, and the norm and ReLU that close them."""

    def _build(self, stem: nn.Conv2d, stages: Sequence[Sequence[nn.Module]], out_channels: int) -> None:
        self.conv1 = stem
        self.add_stages([nn.Sequential(*blocks) for blocks in stages])
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def stem(self, x: Tensor) -> Tensor:
        """The first convolution; its norm is that of the first block."""
        return self.conv1(x)

    def tail(self, x: Tensor) -> Tensor:
        """The norm and ReLU that the last block leaves out."""
        return self.relu(self.bn(x))


@MODELS.register_module()
class PreResNet(_PreActivation):
    """Pre-activation ResNet of three stages of 16, 32 and 64 channels (times 4 with bottlenecks).

    Published as PreResNet-164 of gumi. The last feature map has ``64`` or ``256`` channels.

    Args:
        depth: 9n + 2 with bottlenecks, 6n + 2 with basic blocks.
        block: 'bottleneck' or 'basic'.
        shortcut: 'conv' (bare 1x1 convolution), 'conv_bn' or 'pad' (no parameters).
        out_indices: see :class:`~prune_mm.backbones.base.StagedBackbone`.
        init_cfg: see :class:`~prune_mm.backbones.base.StagedBackbone`.

    Raises:
        ValueError: for a depth or variant there is not.
    """

    def __init__(
        self,
        depth: int = 164,
        block: str = "bottleneck",
        shortcut: str = "conv",
        out_indices: Sequence[int] | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(out_indices, init_cfg)
        check_choice("block", block, ("bottleneck", "basic"))
        check_choice("shortcut", shortcut, SHORTCUTS)
        block_type, step = (PreBottleneck, 9) if block == "bottleneck" else (PreBasicBlock, 6)
        count = blocks_per_stage(depth, step, 2, f"block={block!r}")
        stages, channels = [], 16
        for width in (16, 32, 64):
            stages.append([])
            for number in range(count):
                stride = 2 if width > 16 and number == 0 else 1
                stages[-1].append(block_type(channels, width, stride, shortcut))
                channels = width * block_type.expansion
        self._build(conv3x3(3, 16), stages, channels)


@MODELS.register_module()
class WideResNet(_PreActivation):
    """Wide ResNet (WRN-depth-widen_factor) with biased convolutions and the stride in the second one.

    Published as WRN-16-10 of Hinge. The last feature map has ``64 * widen_factor`` channels.

    Args:
        depth: 6n + 4.
        widen_factor: the stages have 16, 32 and 64 times as many channels.
        dropout: probability between the convolutions of a block.
        out_indices: see :class:`~prune_mm.backbones.base.StagedBackbone`.
        init_cfg: see :class:`~prune_mm.backbones.base.StagedBackbone`.

    Raises:
        ValueError: for a depth there is not, or another option out of range.
    """

    def __init__(
        self,
        depth: int = 16,
        widen_factor: int = 10,
        dropout: float = 0.0,
        out_indices: Sequence[int] | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(out_indices, init_cfg)
        count = blocks_per_stage(depth, 6, 4, "a wide ResNet")
        check_count("widen_factor", widen_factor)
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout!r} must be a probability in [0, 1)")
        stages, channels = [], 16
        for index in range(3):
            width = (16 << index) * widen_factor
            stages.append([])
            for number in range(count):
                stride = 2 if index > 0 and number == 0 else 1
                stages[-1].append(PreBasicBlock(channels, width, stride, "conv", True, "conv2", dropout))
                channels = width
        self._build(conv3x3(3, 16, bias=True), stages, channels)
