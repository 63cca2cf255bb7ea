"""Which layers can be made block-sparse, and why others cannot: found out by trying."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from prune_mm.graph import trace
from prune_mm.graph.blocks import find_block_layers

IMAGE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def found(module, image=IMAGE):
    """Names of layers that can be made block-sparse, and reasons of those that cannot."""
    module = module.eval()
    before = copy.deepcopy(module.state_dict())
    layers, reasons = find_block_layers(module, (image,), trace(module, image))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    return {layer.name: layer for layer in layers}, reasons


class Around(nn.Module):
    """A layer between a stem and a head."""

    def __init__(self, inner, outputs=8):
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 1), inner, nn.Linear(outputs, 5)

    def forward(self, x):
        return self.head(self.inner(self.stem(x)).relu().mean((2, 3)))


def test_plain_layers():
    layers, reasons = found(Around(nn.Conv2d(8, 8, 3, padding=1)))
    assert list(layers) == ["stem", "inner", "head"]
    assert reasons == {}
    assert layers["stem"].stem
    assert not layers["inner"].stem
    assert not layers["inner"].is_pointwise
    assert layers["stem"].is_pointwise
    assert layers["head"].is_pointwise
    assert layers["inner"].shape == (8, 8, 3, 3)


def test_layers_that_do_not_train_say_so():
    module = Around(nn.Conv2d(8, 8, 1))
    module.inner.weight.requires_grad_(False)
    layers, _ = found(module)
    assert [layer.trains for layer in layers.values()] == [True, False, True]


def test_wrappers_that_compute_the_same():
    layers, reasons = found(Around(ConvModule(8, 8, 3, padding=1, norm_cfg={"type": "BN"})))
    assert list(layers) == ["stem", "inner.conv", "head"]
    assert reasons == {}


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(1, keepdim=True), self.bias, padding=self.padding)


class Rescaled(nn.Conv2d):
    """Reads its own weight as it is, but does more than a convolution."""

    def forward(self, x):
        return super().forward(x) * 2.0


class BehindItsBack(nn.Module):
    """Uses the weight of a convolution, not the convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return F.conv2d(x, self.conv.weight.abs(), self.conv.bias)


class AlsoBehindItsBack(BehindItsBack):
    """Calls the convolution, and uses its weight for something else."""

    def forward(self, x):
        return self.conv(x) * self.conv.weight.norm()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = x.flatten(2).transpose(1, 2)
        return self.attention(y, y, y, need_weights=False)[0].transpose(1, 2).reshape(x.shape)


class Rows(nn.Module):
    """A convolution over rows of the image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x.flatten(2)).reshape(x.shape)


@pytest.mark.parametrize(
    ("inner", "name", "reason"),
    [
        (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), "inner", "it has 8 groups"),
        (lambda: nn.Conv2d(8, 8, 1, groups=2), "inner", "it has 2 groups"),
        (lambda: Standardised(8, 8, 1), "inner", "its weight is computed on the fly"),
        (lambda: Rescaled(8, 8, 1), "inner", "is a Rescaled, the plan expects an nn.Conv2d"),
        (lambda: nn.ConvTranspose2d(8, 8, 2, stride=2), "inner", "is a ConvTranspose2d, the plan expects"),
        (Rows, "inner.conv", "is a Conv1d, the plan expects"),
        (BehindItsBack, "inner.conv", "its weight is computed on the fly"),
        (AlsoBehindItsBack, "inner.conv", "its code does more than a plain layer"),
        (Attention, "inner.attention.out_proj", "not the weight of a convolution or linear layer"),
        (Attention, "inner.attention.in_proj_weight", "not the weight of a convolution or linear layer"),
        (lambda: weight_norm(nn.Conv2d(8, 8, 1)), "inner.parametrizations.weight.original1", "computed on the fly"),
    ],
)
def test_layers_that_cannot(inner, name, reason):
    layers, reasons = found(Around(inner()))
    assert list(layers) == ["stem", "head"]
    assert reason in reasons[name]


class Twice(nn.Module):
    def __init__(self, same_layer):
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.second = self.first if same_layer else nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_two_layers_with_one_weight():
    layers, reasons = found(Around(Twice(same_layer=False)))
    assert list(layers) == ["stem", "head"]
    assert reasons == {
        "inner.first": "it shares its weight with another layer",
        "inner.second": "its weight is tied to 'inner.first.weight'",
    }


def test_one_layer_used_twice():
    layers, reasons = found(Around(Twice(same_layer=True)))
    assert list(layers) == ["stem", "inner.first", "head"]
    assert reasons == {}


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(x) + torch.rand_like(x)


def test_a_network_that_computes_something_else_every_time():
    layers, reasons = found(Around(Noisy()))
    assert layers == {}
    assert set(reasons) == {"stem", "inner.conv", "head"}
    assert all("no blocks can be checked" in reason for reason in reasons.values())
