"""Backbones of MMDetection, as its configs build them (a shallow one of each kind)."""

# ruff: noqa: C408 (written as configs are)

import pytest
import torch
from channel_law import assert_every_layer_is_accounted_for, assert_law_on_random_decisions

from prune_mm.graph import trace

mmdet = pytest.importorskip("mmdet.models", exc_type=ImportError)  # behind prune_mm, which supplies mmcv's operators

GN = dict(type="GN", num_groups=32, requires_grad=True)
R18 = dict(type="ResNet", depth=18, norm_cfg=dict(type="BN"))
DCN50 = dict(type="ResNet", depth=50, norm_cfg=dict(type="BN"))
R50 = dict(type="ResNet", depth=50, frozen_stages=1, norm_eval=True)
HR_STAGES = {
    f"stage{n + 1}": dict(
        num_modules=1,
        num_branches=max(n, 1),
        block="BOTTLENECK" if n == 0 else "BASIC",
        num_blocks=(1,) * max(n, 1),
        num_channels=(64,) if n == 0 else (8, 16, 32, 64)[:n],
    )
    for n in (0, 2, 3, 4)
}
HR_STAGES = {f"stage{i}": stage for i, stage in enumerate(HR_STAGES.values(), start=1)}

#: Name: config, size of the input, at least this share of all channels is prunable.
FREE = {
    "resnet18": (R18, 64, 0.5),
    "caffe style, frozen": (dict(**R50, style="caffe", norm_cfg=dict(type="BN", requires_grad=False)), 64, 0.6),
    "pytorch style, with_cp": (dict(**R50, style="pytorch", with_cp=True), 64, 0.6),
    "deep stem": (dict(type="ResNetV1d", depth=50), 64, 0.6),
    "sync bn": (dict(**R18 | dict(norm_cfg=dict(type="SyncBN"))), 64, 0.5),
    "group norm": (dict(**R18 | dict(norm_cfg=GN)), 64, 0.5),
    "resnext": (dict(type="ResNeXt", depth=50, groups=32, base_width=4), 64, 0.1),
    "regnet": (dict(type="RegNet", arch="regnetx_400mf"), 64, 0.2),
    "res2net": (dict(type="Res2Net", depth=50, scales=4, base_width=26), 64, 0.15),
    "resnest": (dict(type="ResNeSt", depth=50, stem_channels=64, radix=2, avg_down_stride=True), 64, 0.6),
    "hrnet": (dict(type="HRNet", extra=HR_STAGES), 64, 0.8),
    "cspdarknet": (dict(type="CSPDarknet", deepen_factor=0.33, widen_factor=0.25), 64, 0.7),
    "cspnext": (dict(type="CSPNeXt", deepen_factor=0.33, widen_factor=0.25), 64, 0.7),
    "darknet": (dict(type="Darknet", depth=53), 64, 0.7),
    "mobilenet v2": (dict(type="MobileNetV2"), 64, 0.7),
    "efficientnet": (dict(type="EfficientNet", arch="b0"), 64, 0.7),
    "ssd vgg": (dict(type="SSDVGG", depth=16, with_last_pool=False, ceil_mode=True, out_indices=(3, 4)), 300, 0.5),
    "dcn v1": (
        dict(**DCN50, dcn=dict(type="DCN", deform_groups=1), stage_with_dcn=(False, False, True, True)),
        64,
        0.5,
    ),
    "dcn v2": (
        dict(**DCN50, dcn=dict(type="DCNv2", deform_groups=1), stage_with_dcn=(False, True, True, True)),
        64,
        0.5,
    ),
    "trident": (
        dict(
            type="TridentResNet", depth=50, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,),
            trident_dilations=(1, 2, 3), num_branch=3, test_branch_idx=1, norm_cfg=dict(type="BN"),
        ),
        64,
        0.5,
    ),
    "hourglass": (dict(type="HourglassNet", downsample_times=3, num_stacks=2, stage_channels=[16, 16, 24, 32],
                       stage_blocks=[1, 1, 1, 1], feat_channel=16), 64, 0.5),
}  # fmt: skip

CONV_WS = dict(conv_cfg=dict(type="ConvWS"), norm_cfg=GN)
SAC = dict(
    conv_cfg=dict(type="ConvAWS"), sac=dict(type="SAC", use_deform=True), stage_with_sac=(False, True, True, True),
    output_img=True,
)  # fmt: skip

#: Name: config, input, words that the reasons hold.
FROZEN = {
    "weight standardisation": (R18 | CONV_WS, 64, "computed on the fly"),
    "detectors resnet": (dict(type="DetectoRS_ResNet", depth=50, **SAC), 96, "computed on the fly"),
    "detectors resnext": (
        dict(type="DetectoRS_ResNeXt", depth=50, groups=32, base_width=4, **SAC), 96, "computed on the fly",
    ),
    "dcn, groups of offsets": (
        dict(**DCN50, dcn=dict(type="DCNv2", deform_groups=4), stage_with_dcn=(False, False, True, True)),
        64,
        "several offset groups",
    ),
    "swin": (dict(type="SwinTransformer", embed_dims=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)), 64, "attention"),
    "pvt": (dict(type="PyramidVisionTransformer", num_layers=[1, 1, 1, 1], pretrain_img_size=64), 64, "layer norm"),
}  # fmt: skip


def build(cfg):
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    torch.manual_seed(0)
    module = MODELS.build(dict(cfg))
    for parameter in module.parameters():
        # TridentConv leaves what was in memory, even after init_weights().
        if parameter.ndim > 1 and not bool((parameter.abs() < 10).all()):
            torch.nn.init.kaiming_normal_(parameter)
    for name, buffer in module.named_buffers():
        if name.endswith("weight_gamma"):  # ones, until weights are loaded: activations would overflow
            buffer.mul_(0.02)
    return module


def traced(cfg, size):
    module = build(cfg)
    graph = trace(module, torch.randn(1, 3, size, size))
    assert_every_layer_is_accounted_for(module, graph)
    return module, graph


@pytest.mark.parametrize("name", FREE)
def test_law_where_most_is_prunable(name):
    cfg, size, share = FREE[name]
    module, graph = traced(cfg, size)
    prunable, every = (sum(group.channels for group in groups) for groups in (graph.prunable, graph.groups))
    assert prunable >= share * every, graph.why_not()
    assert_law_on_random_decisions(module, graph, (torch.randn(1, 3, size, size),), seeds=1)


@pytest.mark.parametrize("name", FROZEN)
def test_law_where_much_is_frozen(name):
    cfg, size, words = FROZEN[name]
    module, graph = traced(cfg, size)
    reasons = [*graph.why_not(), *graph.unprunable.values()]
    assert any(words in reason for reason in reasons), reasons
    if name.startswith("detectors"):
        return
    assert_law_on_random_decisions(module, graph, (torch.randn(1, 3, size, size),), seeds=1)


def test_frozen_stages_are_traced():
    module, graph = traced(dict(**R50, style="pytorch"), 64)
    convs = {name for name, child in module.named_modules() if isinstance(child, torch.nn.Conv2d)}
    assert len(convs) == 53
    assert convs == {name for group in graph for name in group.producers}
    assert len([group for group in graph.prunable if not group.coupled]) == 33
    assert len(graph.shortcuts) == 4


def test_all_of_hrnet_and_its_shortcuts_are_found():
    _, graph = traced(*FREE["hrnet"][:2])
    assert {group.frozen for group in graph if group.frozen} == {"output of the traced scope"}
    assert all(shortcut.slots[0].role == "out" for shortcut in graph.shortcuts)
