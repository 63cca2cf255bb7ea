"""Residual shortcuts that change the number of channels or the resolution."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from prune_mm.backbones.base import conv1x1

#: What ``shortcut=`` accepts: a 1x1 convolution with or without batch norm, or no parameters at all.
SHORTCUTS = ("conv_bn", "conv", "pad")


class PadShortcut(nn.Module):
    """The shortcut without parameters ("option A"): average pooling, then zero channels on both sides.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; half of the new ones come first, half last.
        stride: side and stride of the pooling window.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Pool and pad (N, C, H, W)."""
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """Stride and new channels."""
        return f"stride={self.stride}, before={self.before}, after={self.after}"


def make_shortcut(kind: str, in_channels: int, out_channels: int, stride: int, bias: bool = False) -> nn.Module | None:
    """The shortcut of a block, None where the input itself is added.

    Convolutions are called ``downsample.0`` and their norm ``downsample.1``, as in torchvision.

    Args:
        kind: one of :data:`SHORTCUTS`.
        in_channels: channels of the block's input.
        out_channels: channels of the block's output.
        stride: stride of the block.
        bias: whether the convolution has a bias.
    """
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "pad":
        return PadShortcut(in_channels, out_channels, stride)
    conv = conv1x1(in_channels, out_channels, stride, bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels)) if kind == "conv_bn" else nn.Sequential(conv)
