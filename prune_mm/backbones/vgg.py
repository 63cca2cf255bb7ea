"""VGGs for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from prune_mm.backbones.base import StagedBackbone, check_choice, check_indices, conv3x3
from prune_mm.registry import MODELS

#: Convolutions of each stage.
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


@MODELS.register_module()
class CIFARVGG(StagedBackbone):
    """The convolutions of VGG; a 32x32 image ends as 512 channels of 1x1.

    Published as VGG-16 of Hinge. Layers are called ``features.N`` as in torchvision, whose checkpoints fit.

    Args:
        depth: 11, 13, 16 or 19.
        batch_norm: whether batch norm follows each convolution.
        out_indices: stages (from 0) whose outputs are returned; None for the last. A stage ends with its pooling.
        init_cfg: see :class:`~prune_mm.backbones.base.StagedBackbone`.

    Raises:
        ValueError: for a depth or variant there is not.
    """

    def __init__(
        self,
        depth: int = 16,
        batch_norm: bool = True,
        out_indices: Sequence[int] | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(out_indices, init_cfg)
        check_choice("depth", depth, DEPTHS)
        check_choice("batch_norm", batch_norm, (False, True))
        self.out_indices = check_indices("out_indices", out_indices, len(WIDTHS))
        self.features = nn.Sequential()
        channels = 3
        for width, count in zip(WIDTHS, DEPTHS[depth]):
            for _ in range(count):
                self.features.append(conv3x3(channels, width, bias=True))
                if batch_norm:
                    self.features.append(nn.BatchNorm2d(width))
                self.features.append(nn.ReLU())
                channels = width
            self.features.append(nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the chosen stages, of images (N, 3, H, W)."""
        ends = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                ends.append(x)
        return tuple(ends[index] for index in self.out_indices)
