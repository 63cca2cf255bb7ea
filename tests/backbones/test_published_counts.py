"""Parameters and operations are those of the published code (specs gumi 13.1, strucspars 12, hinge 16.1, onexn 10).

Where a counter of the published code cannot see an operation, or sees one that a classifier of MMPretrain does not
have, the row says so.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from published_counts import Groups, count, max_channels, uniform
from torch import nn

RESNET = {depth: f"mmpretrain/resnet{depth}" for depth in (18, 34, 50, 101)}


def by_stage(*groups: int, downsample: tuple[int, ...] = (1, 1, 1, 1), halved_first: bool = False) -> Groups:
    """Group counts of gumi's ResNet-34 configs: one a stage, with its own for the projections."""

    def of(name: str, conv: nn.Conv2d) -> int:
        if not name.startswith("layer"):
            return 1
        stage = int(name[len("layer")]) - 1
        if "downsample" in name:
            return downsample[stage]
        first = halved_first and stage > 0 and name.endswith(".0.conv1")
        return groups[stage] // 2 if first else groups[stage]

    return of


def last_pointwise(groups: int) -> Groups:
    """Gumi's MobileNet rows: the seven pointwise convolutions of 512 inputs and more."""
    return lambda name, conv: groups if conv.groups == 1 and conv.in_channels >= 512 else 1


GROUPS = {
    "dense": uniform(1),
    **{f"G={groups}": uniform(groups) for groups in (2, 4, 8)},
    "A": by_stage(8, 4, 2, 1, downsample=(1, 4, 2, 1)),
    "B": by_stage(16, 8, 4, 2),
    "D": by_stage(64, 128, 256, 512, halved_first=True),
    **{f"max {limit}": max_channels(limit) for limit in (32, 64)},
    **{f"last 7 G={groups}": last_pointwise(groups) for groups in (2, 4, 8, 16, 32, 64)},
}


# Gumi: side of the average pooling that its networks end with (0: adaptive, not counted); parameters; millions of ops
# as its counter gives them, which adds up in float32.
GUMI = [
    (RESNET[18], "dense", 0, 11_689_512, 3635.822592),
    (RESNET[18], "G=2", 0, 6_110_760, 1940.275200),
    (RESNET[18], "G=4", 0, 3_321_384, 1092.501504),
    (RESNET[18], "G=8", 0, 1_926_696, 668.614656),
    (RESNET[34], "dense", 0, 21_797_672, 7338.961920),
    (RESNET[34], "A", 0, 17_360_680, 3479.022592),
    (RESNET[34], "B", 0, 9_047_336, 1891.052544),
    (RESNET[34], "D", 0, 779_432, 336.700448),
    (RESNET[50], "dense", 0, 25_557_032, 8210.605568),
    (RESNET[50], "G=2", 0, 13_834_280, 4241.483264),
    (RESNET[50], "G=4", 0, 7_972_904, 2256.922112),
    (RESNET[101], "dense", 0, 44_549_160, 15650.401280),
    (RESNET[101], "G=2", 0, 23_356_456, 7969.058304),
    ("condensenet86_cifar10", "dense", 8, 1_959_626, 505.956224),
    ("condensenet86_cifar10", "G=2", 8, 1_000_010, 258.230128),
    ("condensenet86_cifar10", "G=4", 8, 520_202, 134.367088),
    ("condensenet86_cifar100", "dense", 8, 2_031_716, 506.100128),
    ("condensenet86_cifar100", "G=2", 8, 1_072_100, 258.374048),
    ("condensenet86_cifar100", "G=4", 8, 592_292, 134.511008),
    ("preresnet164_cifar10", "dense", 8, 1_703_258, 504.744960),
    ("preresnet164_cifar10", "G=2", 8, 865_242, 257.543152),
    ("preresnet164_cifar10", "G=4", 8, 446_234, 133.942264),
    ("preresnet164_cifar10", "G=8", 8, 236_730, 72.141816),
    ("preresnet164_cifar100", "dense", 8, 1_726_388, 504.790944),
    ("preresnet164_cifar100", "G=2", 8, 888_372, 257.589152),
    ("preresnet164_cifar100", "G=4", 8, 469_364, 133.988256),
    ("preresnet164_cifar100", "G=8", 8, 259_860, 72.187808),
    ("preresnet164_cifar100", "max 64", 8, 1_191_860, 405.700512),
    ("preresnet164_cifar100", "max 32", 8, 724_916, 293.240736),
    ("resnet110_cifar100", "dense", 8, 1_736_564, 509.481888),
    ("resnet110_cifar100", "G=2", 8, 875_892, 256.775072),
    ("resnet110_cifar100", "G=4", 8, 445_556, 130.421664),
    ("resnet110_cifar100", "G=8", 8, 230_388, 67.244960),
    ("densenet40_stem16_cifar100", "dense", 8, 1_060_132, 536.479136),
    ("densenet40_stem16_cifar100", "G=2", 8, 561_780, 272.113056),
    ("densenet40_stem16_cifar100", "G=4", 8, 312_604, 139.930016),
    ("mobilenet_v1_in1k", "dense", 7, 4_231_976, 1152.614912),
    ("mobilenet_v1_in1k", "last 7 G=2", 7, 2_790_184, 818.643456),
    ("mobilenet_v1_in1k", "last 7 G=4", 7, 2_069_288, 651.657728),
    ("mobilenet_v1_in1k", "last 7 G=8", 7, 1_708_840, 568.164864),
    ("mobilenet_v1_in1k", "last 7 G=16", 7, 1_528_616, 526.418464),
    ("mobilenet_v1_in1k", "last 7 G=32", 7, 1_438_504, 505.545248),
    ("mobilenet_v1_in1k", "last 7 G=64", 7, 1_393_448, 495.108640),
]


def image_size(name: str) -> int:
    return 32 if "cifar" in name else 224


@pytest.mark.parametrize(("name", "groups", "pool", "params", "mega_ops"), GUMI)
def test_gumi(classifier, name, groups, pool, params, mega_ops):
    model = classifier(name)
    found = count(model, image_size(name), GROUPS[groups])
    assert found.params == params
    published = np.float32(mega_ops * 1e6)
    assert abs(found.gumi + pool * model.head.fc.in_features - float(published)) < np.spacing(published)


@pytest.mark.parametrize(
    ("name", "groups", "conv_params", "conv_macs", "linear_macs"),
    [
        (RESNET[18], "dense", 11_166_912, 1_813_561_344, 512_000),
        (RESNET[18], "G=2", 5_588_160, 965_787_648, 512_000),
        (RESNET[34], "dense", 21_267_648, 3_663_249_408, 512_000),
        (RESNET[34], "A", 16_830_656, 1_733_279_744, 512_000),
        (RESNET[34], "B", 8_517_312, 939_294_720, 512_000),
        (RESNET[34], "D", 249_408, 162_118_656, 512_000),
        (RESNET[50], "dense", 23_454_912, 4_087_136_256, 2_048_000),
        (RESNET[50], "G=2", 11_732_160, 2_102_575_104, 2_048_000),
        (RESNET[101], "dense", 42_394_816, 7_799_357_440, 2_048_000),
        (RESNET[101], "G=2", 21_202_112, 3_958_685_696, 2_048_000),
        ("condensenet86_cifar10", "dense", 1_919_664, 248_168_448, 8_000),
        ("condensenet86_cifar10", "G=2", 960_048, 124_305_408, 8_000),
        ("condensenet86_cifar100", "G=4", 480_240, 62_373_888, 80_000),
        ("preresnet164_cifar10", "dense", 1_676_464, 247_644_160, 2_560),
        ("preresnet164_cifar10", "G=2", 838_448, 124_043_264, 2_560),
        ("preresnet164_cifar10", "G=4", 419_440, 62_242_816, 2_560),
        ("preresnet164_cifar100", "G=8", 209_936, 31_342_592, 25_600),
    ],
)
def test_gumi_convolutions(classifier, name, groups, conv_params, conv_macs, linear_macs):
    found = count(classifier(name), image_size(name), GROUPS[groups])
    assert (found.conv_params, found.conv_macs, found.linear_macs) == (conv_params, conv_macs, linear_macs)


@pytest.mark.parametrize(
    ("name", "groups", "params", "macs"),
    [
        (RESNET[50], "dense", 25_557_032, 4_089_184_256),
        (RESNET[50], "G=2", 13_834_280, 2_104_623_104),
        (RESNET[50], "G=4", 7_972_904, 1_112_342_528),
        (RESNET[50], "G=8", 5_042_216, 616_202_240),
        (RESNET[101], "dense", 44_549_160, 7_801_405_440),
        (RESNET[101], "G=2", 23_356_456, 3_960_733_696),
        (RESNET[101], "G=4", 12_760_104, 2_040_397_824),
        (RESNET[101], "G=8", 7_461_928, 1_080_229_888),
        ("resnet20_stem1x1_cifar10", "dense", 272_090, 47_422_272),
        ("resnet20_stem1x1_cifar10", "G=2", 137_178, 23_739_200),
        ("resnet56_stem1x1_cifar10", "dense", 855_386, 147_176_256),
        ("resnet110_stem1x1_cifar10", "dense", 1_730_330, 296_807_232),
    ],
)
def test_strucspars(classifier, name, groups, params, macs):
    found = count(classifier(name), image_size(name), GROUPS[groups])
    assert (found.params, found.macs) == (params, macs)


# The functional ReLUs of ResNeXt and the wide ResNet are outside Hinge's counter.
@pytest.mark.parametrize(
    ("name", "flops", "params", "relus_seen"),
    [
        ("vgg16_cifar10", 314_031_104, 14_728_266, True),
        ("vgg16_linear3_cifar10", 314_555_392, 15_253_578, True),
        ("densenet40_cifar10", 290_105_808, 1_059_298, True),
        ("densenet40_cifar100", 290_146_848, 1_100_428, True),
        ("resnet20_pad_cifar10", 41_116_288, 269_738, True),
        ("resnet20_pad_cifar100", 41_122_048, 275_588, True),
        ("resnet56_pad_cifar10", 127_083_136, 853_034, True),
        ("resnet56_pad_cifar100", 127_088_896, 858_884, True),
        ("resnet164_cifar10", 257_325_568, 1_704_154, True),
        ("resnet164_cifar100", 257_348_608, 1_727_284, True),
        ("resnext20_cifar10", 36_817_408, 211_850, False),
        ("resnext20_cifar100", 36_840_448, 234_980, False),
        ("resnext164_cifar10", 259_639_808, 1_713_546, False),
        ("resnext164_cifar100", 259_662_848, 1_736_676, False),
        ("wrn16_10_cifar10", 3_123_026_176, 17_122_250, False),
        ("wrn16_10_cifar100", 3_123_083_776, 17_179_940, False),
    ],
)
def test_hinge(classifier, name, flops, params, relus_seen):
    found = count(classifier(name), 32)
    assert (found.hinge - (0 if relus_seen else found.relus), found.params) == (flops, params)


def maskable(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """What 1xN may mask in MobileNets: pointwise convolutions and linear layers."""
    pointwise = (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1)
    return [*pointwise, *(m for m in model.modules() if isinstance(m, nn.Linear))]


# 1xN gives every maskable layer a bias, leaves the last layers dense and halves the others.
@pytest.mark.parametrize(
    ("name", "layers", "dense_layers", "weights", "zeros", "params"),
    [
        ("mobilenet_v1_in1k", 14, 1, 4_163_584, 1_569_792, 4_237_928),
        ("mmpretrain/mobilenet_v2_1x", 35, 1, 3_404_672, 1_062_336, 3_514_760),
        ("mmpretrain/mobilenet_v3/mobilenet_v3_small_imagenet", 42, 2, 2_466_816, 426_496, 2_546_440),
        ("mmpretrain/mobilenet_v3/mobilenet_v3_large_imagenet", 48, 2, 5_359_232, 1_425_216, 5_490_200),
    ],
)
def test_onexn_mobilenets(classifier, name, layers, dense_layers, weights, zeros, params):
    model = classifier(name)
    found = maskable(model)
    sizes = [layer.weight.numel() for layer in found]
    new_biases = sum(len(layer.weight) for layer in found if layer.bias is None)
    assert len(found) == layers
    assert sum(sizes) == weights
    assert sum(size // 2 for size in sizes[:-dense_layers]) == zeros
    assert sum(p.numel() for p in model.parameters()) + new_biases == params


def test_onexn_resnet50(classifier):
    model = classifier(RESNET[50])
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 54
    assert sum(m.weight.numel() for m in layers[1:]) == 25_493_504, "all but the stem"


def depth(conv: nn.Conv2d) -> int:
    """How often inputs and outputs can both be halved (StrucSpars, section 1)."""
    sizes = conv.in_channels | conv.out_channels
    return (sizes & -sizes).bit_length() - 1


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        (RESNET[50], 52),
        (RESNET[101], 103),
        ("resnet20_stem1x1_cifar10", 20),
        ("resnet56_stem1x1_cifar10", 56),
        ("resnet110_stem1x1_cifar10", 110),
        ("mmpretrain/densenet/densenet201", 199),
        ("condensenet86_cifar10", 84),
        ("preresnet164_cifar10", 165),
    ],
)
def test_groupable_layers(classifier, name, layers):
    convs = [m for m in classifier(name).modules() if isinstance(m, nn.Conv2d)]
    assert len([conv for conv in convs if depth(conv) > 0]) == layers
    assert len(convs) == layers + 1, "all but the stem"


def test_groupable_depths_of_densenet201(classifier):
    model = classifier("mmpretrain/densenet/densenet201")
    depths = Counter(depth(m) for m in model.modules() if isinstance(m, nn.Conv2d))
    assert depths == {0: 1, 5: 147, 7: 26, 6: 25, 8: 1}


def test_units_of_hinge(classifier):
    def convs(name: str, last: str) -> list[nn.Conv2d]:
        found = classifier(name).backbone.named_modules()
        return [m for n, m in found if isinstance(m, nn.Conv2d) and n.endswith(last)]

    shapes = [(conv.in_channels, conv.out_channels) for conv in convs("resnet164_cifar10", "conv1")[1:]]
    assert (len(shapes), shapes[:2], shapes[-1]) == (54, [(16, 16), (64, 16)], (256, 64))
    joint = []
    inner, outer = (convs("resnext20_cifar10", last)[skip:] for last, skip in (("conv1", 1), ("conv3", 0)))
    for first, last in zip(inner, outer):
        joint.append(first.out_channels // 32 * (first.in_channels + last.out_channels))
    assert joint == [128, 128, 384, 512, 1536, 2048]
    widths = [conv.out_channels for conv in convs("wrn16_10_cifar100", "conv2")]
    assert widths == [160, 160, 320, 320, 640, 640]
    assert len(convs("vgg16_cifar10", "")) == 13
    assert len(convs("resnet20_pad_cifar10", "conv2")) == 9
