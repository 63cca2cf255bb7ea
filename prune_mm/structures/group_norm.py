"""Group norm over the channels that are left of its groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CompactGroupNorm(nn.Module):
    """The function a :class:`torch.nn.GroupNorm` computes when some of its input channels are zero.

    Dead channels still count in a group's mean and variance, so the statistics divide by the *original* number of
    channels per group, and every live channel remembers its group. Groups need not stay equally large.

    Shapes: input and output ``(N, C_kept, *)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Tensor, groups: int, per_group: int, eps: float):
        """See :meth:`from_group_norm`."""
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("group", group, persistent=False)
        self.num_groups, self.channels_per_group, self.eps = groups, per_group, eps

    @classmethod
    def from_group_norm(cls, norm: nn.GroupNorm) -> CompactGroupNorm:
        """The same function, ready to lose channels."""
        per_group = norm.num_channels // norm.num_groups
        group = torch.arange(norm.num_channels, device=norm.weight.device) // per_group
        new = cls(norm.weight.detach().clone(), None if norm.bias is None else norm.bias.detach().clone(),
                  group, norm.num_groups, per_group, norm.eps)  # fmt: skip
        for mine, theirs in ((new.weight, norm.weight), (new.bias, norm.bias)):
            if mine is not None:
                mine.requires_grad_(theirs.requires_grad)
        new.train(norm.training)
        return new

    def keep(self, index: Tensor) -> None:
        """Forget the group of channels that are cut; the caller cuts the affine parameters."""
        self.group = self.group[index]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the statistics of all original channels, the dead ones being zero."""
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        size = self.channels_per_group * flat.shape[2]
        sums = flat.new_zeros(flat.shape[0], self.num_groups)
        mean = sums.index_add(1, self.group, flat.sum(2)) / size
        centred = flat - mean[:, self.group].unsqueeze(2)
        alive = torch.bincount(self.group, minlength=self.num_groups).to(mean)
        dead = (self.channels_per_group - alive) * flat.shape[2]
        squares = sums.index_add(1, self.group, centred.square().sum(2)) + dead * mean.square()
        scale = torch.rsqrt(squares / size + self.eps)[:, self.group] * self.weight
        normed = centred * scale.unsqueeze(2)
        if self.bias is not None:
            normed = normed + self.bias.unsqueeze(1)
        return normed.view_as(x)

    def extra_repr(self) -> str:
        """Sizes, as GroupNorm prints them."""
        return (
            f"{self.num_groups}, {self.weight.numel()} of {self.num_groups * self.channels_per_group}, eps={self.eps}"
        )
