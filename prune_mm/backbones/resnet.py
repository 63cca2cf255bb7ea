"""ResNets for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from prune_mm.backbones.base import StagedBackbone, blocks_per_stage, check_choice, check_count, conv1x1, conv3x3
from prune_mm.backbones.shortcuts import SHORTCUTS, make_shortcut
from prune_mm.registry import MODELS


class BasicBlock(nn.Module):
    """3x3 - 3x3 with batch norm behind each convolution.

    Args:
        in_channels: channels of the input.
        width: channels of both convolutions.
        stride: of the first convolution.
        shortcut: see :func:`~prune_mm.backbones.shortcuts.make_shortcut`.
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = make_shortcut(shortcut, in_channels, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, width, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu2(x + identity)


class Bottleneck(nn.Module):
    """1x1 - 3x3 - 1x1 with batch norm behind each convolution.

    Args:
        in_channels: channels of the input.
        width: channels inside.
        stride: of the 3x3 convolution.
        shortcut: see :func:`~prune_mm.backbones.shortcuts.make_shortcut`.
        out_channels: channels of the output; four times ``width`` unless given.
        groups: of the 3x3 convolution.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        shortcut: str,
        out_channels: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        out_channels = out_channels or self.expansion * width
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu3(x + identity)


#: Block, and convolutions in three stages of one block each.
BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], int]] = {
    "basic": (BasicBlock, 6),
    "bottleneck": (Bottleneck, 9),
}
STEMS = ("3x3", "published")


@MODELS.register_module()
class CIFARResNet(StagedBackbone):
    """ResNet of three stages of 16, 32 and 64 channels (He et al. 2016, section 4.2).

    Published as: ResNet-110 of gumi, ResNet-20/32/44/56/110 of StrucSpars (``stem='published'``), ResNet-20/56
    (``shortcut='pad', stem_bias=True``) and ResNet-164 (``block='bottleneck'``) of Hinge.
    The last feature map has ``4 * width`` channels, ``16 * width`` with bottlenecks.

    Args:
        depth: 6n + 2 with basic blocks, 9n + 2 with bottlenecks.
        block: 'basic' or 'bottleneck'.
        shortcut: 'conv_bn' (1x1 convolution and batch norm), 'conv' (without the norm) or 'pad' (no parameters).
        stem: '3x3', or 'published' for the stem of StrucSpars' code: 1x1 with padding 1, so that 32x32 images give
            34x34 maps.
        stem_bias: whether the first convolution has a bias.
        width: channels of the first stage.
        out_indices: see :class:`~prune_mm.backbones.base.StagedBackbone`.
        init_cfg: see :class:`~prune_mm.backbones.base.StagedBackbone`.

    Raises:
        ValueError: for a depth or variant there is not.
    """

    def __init__(
        self,
        depth: int,
        block: str = "basic",
        shortcut: str = "conv_bn",
        stem: str = "3x3",
        stem_bias: bool = False,
        width: int = 16,
        out_indices: Sequence[int] | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(out_indices, init_cfg)
        check_choice("block", block, BLOCKS)
        check_choice("shortcut", shortcut, SHORTCUTS)
        check_choice("stem", stem, STEMS)
        check_count("width", width)
        block_type, step = BLOCKS[block]
        count = blocks_per_stage(depth, step, 2, f"block={block!r}")
        self.conv1 = nn.Conv2d(3, width, 3 if stem == "3x3" else 1, padding=1, bias=stem_bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        stages, channels = [], width
        for index in range(3):
            blocks = []
            for number in range(count):
                stride = 2 if index > 0 and number == 0 else 1
                blocks.append(block_type(channels, width << index, stride, shortcut))
                channels = (width << index) * block_type.expansion
            stages.append(nn.Sequential(*blocks))
        self.add_stages(stages)

    def stem(self, x: Tensor) -> Tensor:
        """Convolution, norm, ReLU."""
        return self.relu(self.bn1(self.conv1(x)))
