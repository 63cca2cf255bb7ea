"""ResNeXts for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from prune_mm.backbones.base import StagedBackbone, blocks_per_stage, check_choice, check_count, conv1x1, conv3x3
from prune_mm.backbones.resnet import Bottleneck
from prune_mm.backbones.shortcuts import SHORTCUTS
from prune_mm.registry import MODELS


@MODELS.register_module()
class CIFARResNeXt(StagedBackbone):
    """ResNeXt of three stages whose outputs have 2, 4 and 8 times ``cardinality * group_width`` channels.

    Published as ResNeXt-20/164 32x1d of Hinge. The last feature map has ``8 * cardinality * group_width`` channels.

    Args:
        depth: 9n + 2.
        cardinality: groups of the 3x3 convolutions.
        group_width: channels of a group in the first stage; it doubles from stage to stage.
        shortcut: 'conv_bn' (1x1 convolution and batch norm), 'conv' (without the norm) or 'pad' (no parameters).
        stem: '1x1' (Hinge) or '3x3', to 64 channels.
        out_indices: see :class:`~prune_mm.backbones.base.StagedBackbone`.
        init_cfg: see :class:`~prune_mm.backbones.base.StagedBackbone`.

    Raises:
        ValueError: for a depth or variant there is not.
    """

    def __init__(
        self,
        depth: int,
        cardinality: int = 32,
        group_width: int = 1,
        shortcut: str = "conv_bn",
        stem: str = "1x1",
        out_indices: Sequence[int] | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(out_indices, init_cfg)
        count = blocks_per_stage(depth, 9, 2, "a ResNeXt of bottlenecks")
        check_count("cardinality", cardinality)
        check_count("group_width", group_width)
        check_choice("shortcut", shortcut, SHORTCUTS)
        check_choice("stem", stem, ("1x1", "3x3"))
        self.conv1 = (conv1x1 if stem == "1x1" else conv3x3)(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        stages, channels = [], 64
        for index in range(3):
            width = (cardinality * group_width) << index
            blocks = []
            for number in range(count):
                stride = 2 if index > 0 and number == 0 else 1
                blocks.append(Bottleneck(channels, width, stride, shortcut, 2 * width, cardinality))
                channels = 2 * width
            stages.append(nn.Sequential(*blocks))
        self.add_stages(stages)

    def stem(self, x: Tensor) -> Tensor:
        """Convolution, norm, ReLU."""
        return self.relu(self.bn1(self.conv1(x)))
