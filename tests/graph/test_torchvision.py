"""Every CNN family of torchvision."""

import pytest
import torch
import torchvision
from channel_law import assert_every_layer_is_accounted_for, assert_law_on_random_decisions

from prune_mm.graph import trace

#: Network: groups, prunable ones, shortcut projections.
EXPECTED = {
    "resnet18": (13, 12, 3),
    "resnext50_32x4d": (38, 37, 4),
    "vgg11_bn": (11, 10, 0),
    "densenet121": (121, 120, 0),
    "mobilenet_v2": (26, 25, 0),
    "mobilenet_v3_small": (28, 27, 0),
    "efficientnet_b0": (41, 40, 0),
    "regnet_y_400mf": (54, 53, 4),
    "convnext_tiny": (24, 18, 0),
    "googlenet": (58, 57, 0),
    "shufflenet_v2_x0_5": (None, None, 0),
    "mnasnet0_5": (26, 25, 0),
    "squeezenet1_0": (26, 25, 0),
}


def build(name):
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=10, **kwargs)


@pytest.mark.parametrize("name", EXPECTED)
def test_law(name):
    model = build(name)
    if name == "vgg11_bn":  # its 120 million linear weights take longer than all the rest
        model.classifier = torch.nn.Linear(512 * 49, 10)
    graph = trace(model, torch.randn(1, 3, 64, 64))
    expected = EXPECTED[name]
    if name == "vgg11_bn":
        expected = (9, 8, 0)
    if expected[0] is not None:
        assert (len(graph.groups), len(graph.prunable), len(graph.shortcuts)) == expected
    assert_every_layer_is_accounted_for(model, graph)
    assert_law_on_random_decisions(model, graph, (torch.randn(2, 3, 64, 64),), seeds=1)


def test_resnet50_groups_are_the_textbook_ones():
    model = build("resnet50")
    graph = trace(model, torch.randn(1, 3, 64, 64))
    inner = [g for g in graph.prunable if not g.coupled and not g.stem]
    coupled = [g for g in graph.prunable if g.coupled]
    assert len(inner) == 32
    assert [g.channels for g in coupled] == [256, 512, 1024, 2048]
    assert graph["conv1"].stem
    assert graph["fc"].frozen == "output of the traced scope"
    assert [s.layer for s in graph.shortcuts] == [f"layer{i}.0.downsample.0" for i in (1, 2, 3, 4)]
    assert graph.shortcuts[0].end == "layer1.0.downsample.1"


def test_swin_is_frozen_where_it_must_be():
    model = build("swin_t")
    graph = trace(model, torch.randn(1, 3, 64, 64))
    assert {g.channels for g in graph.prunable} == {384, 768, 1536, 3072}, "the hidden layers of the MLPs"
    assert any("attention" in g.frozen for g in graph.groups if g.frozen)
    assert_every_layer_is_accounted_for(model, graph)
    assert_law_on_random_decisions(model, graph, (torch.randn(1, 3, 64, 64),), seeds=1)


def test_module_is_left_as_it_was():
    model = build("resnet18").train()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    trace(model, torch.randn(1, 3, 64, 64))
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
