"""The baselines: as many channels of every layer, by norm or at random."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny
import torch
import torchvision
from torch import nn

from prune_mm.engine.exporter import export
from prune_mm.engine.prunable import build_pruner
from prune_mm.graph import trace
from prune_mm.pruners import RandomChannels, UniformL1


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3)
    )


def prepared(pruner: nn.Module, module: nn.Module) -> nn.Module:
    graph = trace(module, torch.randn(1, 3, 16, 16))
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    pruner.prepare(module, graph, shapes, dict.fromkeys(graph.weights, 1))
    return pruner


def drawn(seed: int, module: nn.Module | None = None) -> dict[str, torch.Tensor]:
    module = network() if module is None else module
    return prepared(RandomChannels({"macs": 0.5}, seed=seed, prune_stem=True), module).start(module)


def test_random_channels_keep_as_many_as_uniform_l1():
    module = network()
    by_norm = prepared(UniformL1({"macs": 0.5}, prune_stem=True), module).start(module)
    at_random = drawn(0, module)
    assert len(at_random) == 2
    assert {n: int(m.sum()) for n, m in at_random.items()} == {n: int(m.sum()) for n, m in by_norm.items()}
    assert tiny.same(at_random, by_norm)


def test_the_draw_is_a_function_of_the_seed_alone():
    first = drawn(3)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    torch.rand(17)
    state = torch.get_rng_state()
    other_weights = network()
    used = torch.get_rng_state()
    assert not torch.equal(state, used)
    assert tiny.same(first, drawn(3, other_weights)) == []
    assert set(tiny.same(first, drawn(4))) == set(first)


def test_the_draw_leaves_the_generator_of_the_run_alone():
    module = network()
    pruner = prepared(RandomChannels({"macs": 0.5}), module)
    before = torch.get_rng_state()
    pruner.start(module)
    assert torch.equal(before, torch.get_rng_state())


def test_every_channel_may_go():
    """Over many seeds each channel of a layer is kept about as often as its share says."""
    kept = sum(torch.stack(list(drawn(seed).values())[:1]).sum(0) for seed in range(60)) / 60
    share = float(next(iter(drawn(0).values())).float().mean())
    assert float((kept - share).abs().max()) < 5 * (share * (1 - share) / 60) ** 0.5


@pytest.mark.parametrize("method", [UniformL1, RandomChannels])
def test_shortcuts_stay_whole_unless_asked_for(method):
    module = torchvision.models.resnet18(num_classes=4)
    projections = {f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)}
    usual, asked = (set(prepared(method({"macs": 0.5}, **options), module).start(module))
                    for options in ({}, {"prune_shortcuts": True}))  # fmt: skip
    assert asked - usual == projections
    assert usual < asked


def test_a_run_is_cut_as_drawn_and_resumes_so(images, tmp_path):
    pruner = {**tiny.UNIFORM, "type": "RandomChannels", "seed": 5}
    whole = tiny.train(tiny.classifier(images, tmp_path / "whole", pruner, epochs=2))
    rest = tiny.classifier(images, tmp_path / "rest", pruner, epochs=2)
    rest.load_from, rest.resume = str(tmp_path / "whole/epoch_1.pth"), True
    again = tiny.train(rest)
    assert tiny.same(tiny.masks_of(whole.model), tiny.masks_of(again.model)) == []
    assert tiny.dead_weight(again.model) == 0.0
    assert 0.4 < whole.model.pruner.status()["macs"] <= 0.5
    report = export(rest, tmp_path / "rest/epoch_2.pth", tmp_path / "small")
    assert report["pruner"] == "RandomChannels"
    assert report["macs"]["compact"] <= 0.5 * report["macs"]["dense"]


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="seed=-1 must be a whole number of at least 0"):
        build_pruner({"type": "RandomChannels", "target": {"macs": 0.5}, "seed": -1})
    with pytest.raises(ValueError, match="RandomChannels has no option 'criterion'"):
        build_pruner({"type": "RandomChannels", "target": {"macs": 0.5}, "criterion": "l1"})
