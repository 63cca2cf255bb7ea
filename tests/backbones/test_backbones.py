"""The networks as modules: shapes, names, initialisation, options, and what the channel graph makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prune_mm.backbones import (
    CIFARVGG,
    CIFARDenseNet,
    CIFARResNet,
    CIFARResNeXt,
    MobileNetV1,
    PreResNet,
    WideResNet,
)
from prune_mm.graph import trace
from prune_mm.registry import MODELS

CONDENSE = {"growth": (8, 16, 32), "bottleneck": True, "transition": "pool", "stem_channels": 16}
RESNET_STAGES = [(16, 32), (32, 16), (64, 8)]
WIDE_STAGES = [(64, 32), (128, 16), (256, 8)]


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        ({"type": "CIFARResNet", "depth": 20}, RESNET_STAGES),
        ({"type": "CIFARResNet", "depth": 20, "shortcut": "pad"}, RESNET_STAGES),
        ({"type": "CIFARResNet", "depth": 20, "stem": "published"}, [(16, 34), (32, 17), (64, 9)]),
        ({"type": "CIFARResNet", "depth": 29, "block": "bottleneck"}, WIDE_STAGES),
        ({"type": "CIFARResNet", "depth": 29, "block": "bottleneck", "shortcut": "pad"}, WIDE_STAGES),
        ({"type": "CIFARResNet", "depth": 8, "width": 4}, [(4, 32), (8, 16), (16, 8)]),
        ({"type": "PreResNet", "depth": 29}, WIDE_STAGES),
        ({"type": "PreResNet", "depth": 20, "block": "basic"}, RESNET_STAGES),
        ({"type": "WideResNet", "depth": 10, "widen_factor": 2}, [(32, 32), (64, 16), (128, 8)]),
        ({"type": "CIFARResNeXt", "depth": 20}, WIDE_STAGES),
        ({"type": "CIFARResNeXt", "depth": 11, "stem": "3x3", "cardinality": 8, "group_width": 4}, WIDE_STAGES),
        ({"type": "CIFARDenseNet", "depth": 40}, [(168, 16), (312, 8), (456, 8)]),
        (
            {"type": "CIFARDenseNet", "depth": 100, "bottleneck": True, "reduction": 0.5},
            [(108, 16), (150, 8), (342, 8)],
        ),
        ({"type": "CIFARDenseNet", "depth": 86, **CONDENSE}, [(128, 16), (352, 8), (800, 8)]),
        ({"type": "CIFARVGG", "depth": 16}, [(64, 16), (128, 8), (256, 4), (512, 2), (512, 1)]),
        ({"type": "MobileNetV1"}, [(64, 16), (128, 8), (256, 4), (512, 2), (1024, 1)]),
        ({"type": "MobileNetV1", "widen_factor": 0.5}, [(32, 16), (64, 8), (128, 4), (256, 2), (512, 1)]),
    ],
)
def test_feature_maps(config, stages):
    shapes = [(2, channels, side, side) for channels, side in stages]
    x = torch.empty(2, 3, 32, 32, device="meta")
    # With the scope: other tests leave a default scope behind.
    config = {**config, "type": f"prune_mm.{config['type']}"}
    last = MODELS.build(config).to("meta")
    every = MODELS.build({**config, "out_indices": tuple(range(len(stages)))}).to("meta")
    assert [tuple(out.shape) for out in last(x)] == shapes[-1:]
    assert [tuple(out.shape) for out in every(x)] == shapes


# Options, channel groups, prunable ones, shortcut projections. Channels that reach the output through additions or
# concatenations stay, and nothing else does.
SMALL = {
    "resnet": (lambda: CIFARResNet(20), 12, 11, 2),
    "resnet, published stem": (lambda: CIFARResNet(20, stem="published"), 12, 11, 2),
    "resnet, no norm in shortcuts": (lambda: CIFARResNet(20, shortcut="conv"), 12, 11, 2),
    "resnet, padded shortcuts": (lambda: CIFARResNet(20, shortcut="pad", stem_bias=True), 10, 9, 0),
    "resnet of bottlenecks": (lambda: CIFARResNet(29, block="bottleneck"), 22, 21, 3),
    "preresnet": (lambda: PreResNet(29), 22, 21, 3),
    "preresnet of basic blocks": (lambda: PreResNet(20, block="basic"), 12, 11, 2),
    "wide resnet": (lambda: WideResNet(10, 2, dropout=0.3), 7, 6, 3),
    "resnext": (lambda: CIFARResNeXt(20), 13, 12, 2),
    "densenet": (lambda: CIFARDenseNet(22), 21, 14, 0),
    "densenet that only pools": (lambda: CIFARDenseNet(14, **CONDENSE), 13, 6, 0),
    "vgg": (lambda: CIFARVGG(11), 8, 7, 0),
    "vgg without norm": (lambda: CIFARVGG(13, batch_norm=False), 10, 9, 0),
    "mobilenet": (lambda: MobileNetV1(0.25), 14, 13, 0),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_convolution_is_traced(name):
    build, groups, prunable, shortcuts = SMALL[name]
    torch.manual_seed(0)
    net = build()
    graph = trace(net, torch.randn(2, 3, 32, 32))
    assert (len(graph.groups), len(graph.prunable), len(graph.shortcuts)) == (groups, prunable, shortcuts)
    convs = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert convs == set(graph.weights)
    made = {slot.tensor for group in graph for slot in group.slots if slot.role in ("out", "depthwise")}
    assert convs <= made
    assert not graph.unprunable
    assert set(graph.fragile) <= {group.name for group in graph if group.frozen}


@pytest.mark.parametrize("name", ["preresnet164_cifar10", "condensenet86_cifar10", "resnext164_cifar10"])
def test_published_depths_are_traced(classifier, name):
    net = copy.deepcopy(classifier(name).backbone).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.fill_(0.01)
    graph = trace(net, torch.randn(2, 3, 32, 32))
    assert set(graph.weights) == {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert {group.frozen for group in graph if group.frozen} == {"output of the traced scope"}


def test_names_are_the_usual_ones():
    def convs(net: nn.Module) -> list[str]:
        return [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]

    block = [f"layer2.0.{name}" for name in ("conv1", "conv2", "conv3", "downsample.0")]
    assert [name for name in convs(PreResNet(11)) if name.startswith("layer2")] == block
    assert [name for name in convs(CIFARResNet(11, block="bottleneck")) if name.startswith("layer2")] == block
    layers = ["layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.1", "layer2.2", "layer3.0", "layer3.1"]
    assert convs(CIFARDenseNet(10)) == ["conv1", *(f"{layer}.conv1" for layer in layers)]
    assert isinstance(CIFARResNet(8).layer2[0].downsample[1], nn.BatchNorm2d)
    assert convs(CIFARVGG(11))[:3] == ["features.0", "features.4", "features.8"]


def test_initialisation():
    net = CIFARResNet(20, stem_bias=True)
    net.layer1[0].bn1.weight.data.zero_()
    torch.manual_seed(0)
    net.init_weights()
    conv = net.layer3[1].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (conv.out_channels * 9)) ** 0.5, rel=0.02), "fan out"
    assert not net.conv1.bias.any()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert bool((norm.weight == 1).all())
            assert not norm.bias.any()
    with torch.no_grad():
        assert torch.isfinite(net.eval()(torch.randn(2, 3, 32, 32))[0]).all()


def test_a_pretrained_checkpoint_is_loaded(tmp_path):
    first = PreResNet(11)
    torch.save(first.state_dict(), tmp_path / "net.pth")
    second = MODELS.build(
        {
            "type": "prune_mm.PreResNet",
            "depth": 11,
            "init_cfg": {"type": "Pretrained", "checkpoint": str(tmp_path / "net.pth")},
        }
    )
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    second.init_weights()
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CIFARResNet(21), r"depth=21 must be 6n \+ 2 for block='basic', such as 20 or 26"),
        (lambda: CIFARResNet(2), "depth=2 must be .* such as 8 or 14"),
        (lambda: CIFARResNet("20"), "depth='20' must be"),
        (lambda: CIFARResNet(56.0), r"depth=56.0 must be"),
        (lambda: CIFARResNet(32, block="bottleneck"), r"depth=32 must be 9n \+ 2 .* such as 29 or 38"),
        (lambda: CIFARResNet(20, block="big"), "block='big' must be one of basic, bottleneck"),
        (lambda: CIFARResNet(20, shortcut="A"), "shortcut='A' must be one of conv_bn, conv, pad"),
        (lambda: CIFARResNet(20, stem="7x7"), "stem='7x7' must be one of 3x3, published"),
        (lambda: CIFARResNet(20, width=0), "width=0 must be a whole number of at least 1"),
        (lambda: CIFARResNet(20, out_indices=(3,)), r"out_indices=\(3,\) must be a list of stages, each from 0 to 2"),
        (lambda: CIFARResNet(20, block=["basic"]), "block=.* must be one of"),
        (lambda: CIFARResNet(20, out_indices=[[0]]), "out_indices=.* must be a list"),
        (lambda: CIFARResNet(20, out_indices=2), "out_indices=2 must be a list"),
        (lambda: PreResNet(163), r"depth=163 must be 9n \+ 2 for block='bottleneck', such as 155 or 164"),
        (lambda: PreResNet(block="wide"), "block='wide' must be one of bottleneck, basic"),
        (lambda: WideResNet(20), r"depth=20 must be 6n \+ 4 for a wide ResNet, such as 16 or 22"),
        (lambda: WideResNet(widen_factor=1.5), "widen_factor=1.5 must be a whole number"),
        (lambda: WideResNet(dropout=1), r"dropout=1 must be a probability in \[0, 1\)"),
        (lambda: CIFARResNeXt(29, cardinality=0), "cardinality=0 must be"),
        (lambda: CIFARResNeXt(50), r"depth=50 must be 9n \+ 2"),
        (lambda: CIFARResNeXt(20, stem="7x7"), "stem='7x7' must be one of 1x1, 3x3"),
        (lambda: CIFARDenseNet(41), r"depth=41 must be 3n \+ 4 for transition='conv' and bottleneck=False"),
        (lambda: CIFARDenseNet(40, transition="pool"), r"depth=40 must be 3n \+ 2 .* such as 38 or 41"),
        (lambda: CIFARDenseNet(40, growth=(8, 16)), r"growth=\(8, 16\) must be one number or three"),
        (lambda: CIFARDenseNet(40, growth=0), "growth=0 must be a whole number"),
        (lambda: CIFARDenseNet(40, reduction=0), r"reduction=0 must be a share in \(0, 1\]"),
        (lambda: CIFARDenseNet(40, transition="none"), "transition='none' must be one of conv, pool"),
        (lambda: CIFARVGG(15), "depth=15 must be one of 11, 13, 16, 19"),
        (lambda: CIFARVGG(out_indices=[5]), "out_indices=.* from 0 to 4"),
        (lambda: MobileNetV1(0), "widen_factor=0 must be a positive number"),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()
