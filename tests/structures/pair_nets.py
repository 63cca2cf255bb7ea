"""A chain of convolutions that get pairs, and what compares such networks."""

from __future__ import annotations

import copy

import torch
from torch import nn

from prune_mm.pruners.hinge_math import init_pair, pair_rank
from prune_mm.structures.pair import attach_pair, set_pair

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
EXACT = ("svd2", "svd", "p-identity")


@torch.no_grad()
def same(first, second, *inputs, tolerance=2e-6):
    """Whether two modules compute the same, relative to the largest output."""
    want, got = first(*inputs), second(*inputs)
    assert want.shape == got.shape
    return float((want - got).abs().max()) <= tolerance * (1 + float(want.abs().max()))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_mask(count, generator):
    mask = torch.rand(count, generator=generator) < 0.6
    mask[int(torch.randint(count, (), generator=generator))] = True
    return mask


class Chain(nn.Module):
    """Two convolutions that get a pair, and one that does not; the last has fewer weights a filter than filters."""

    def __init__(self, bias=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, stride=2, bias=bias), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 1, bias=bias), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


PAIRED = ("conv1", "conv2")


def paired(net, method="svd2"):
    """A copy with pairs, split by ``method``."""
    net = copy.deepcopy(net)
    for name in PAIRED:
        conv = net.get_submodule(name)
        kernel = conv.weight.detach().clone()
        attach_pair(conv, pair_rank(kernel.shape, method))
        set_pair(conv, *init_pair(kernel, method))
    return net
