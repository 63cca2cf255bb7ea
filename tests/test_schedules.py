"""Published recipes that MMEngine's settings do not show at a glance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS

from prune_mm.engine.exporter import build_prunable

CONFIGS = Path(__file__).parents[1] / "configs"


def test_chex_warms_up_and_decays_by_epoch():
    config = Config.fromfile(CONFIGS / "chex_resnet50.py")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr)
    schedulers = [PARAM_SCHEDULERS.build({**settings, "optimizer": optimizer}) for settings in config.param_scheduler]
    for epoch in range(config.train_cfg.max_epochs):
        share = (epoch + 1) / 8 if epoch < 8 else (1 + math.cos(math.pi * (epoch - 8) / (250 - 8))) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1.024 * share)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize(("name", "scale"), [("chex_resnet18", 0.5), ("strucspars_resnet50", 1.0)])
def test_networks_trained_from_random_weights_start_with_the_published_norms(name, scale):
    model = build_prunable(Config.fromfile(CONFIGS / f"{name}.py"))
    model.init_weights()
    norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(bool((norm.weight == scale).all()) and not bool(norm.bias.any()) for norm in norms)
