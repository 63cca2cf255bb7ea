"""Averaged models are masked as the model they follow, and are what a checkpoint exports."""

from __future__ import annotations

import pytest
import tiny
import torch
from mmengine.hooks import EMAHook, Hook

from prune_mm.engine.compact import compact_model
from prune_mm.engine.exporter import export


class WatchAverage(Hook):
    """Compares the averaged model with the trained one after every iteration."""

    def __init__(self):
        self.worst, self.masks_differ, self.weights_differ = 0.0, [], False

    def average(self, runner):
        return next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        average = self.average(runner)
        self.worst = max(self.worst, tiny.dead_weight(average))
        self.masks_differ += tiny.same(tiny.masks_of(average), tiny.masks_of(runner.model))
        self.weights_differ |= bool(tiny.same(dict(average.named_parameters()), dict(runner.model.named_parameters())))

    def after_train(self, runner):
        self.final = self.average(runner)


def with_average(config, **options):
    config.custom_hooks = [{"type": "EMAHook", "momentum": 0.2, **options}, *config.custom_hooks]
    return config


@pytest.mark.parametrize(
    "options",
    [{"update_buffers": False}, {"update_buffers": True}, {"update_buffers": True, "begin_epoch": 2}],
    ids=["parameters", "buffers", "late"],
)
def test_the_average_is_masked_and_exported(options, images, tmp_path):
    config = with_average(tiny.classifier(images, tmp_path, epochs=4), **options)
    watch = WatchAverage()
    runner = tiny.train(config, watch)
    assert watch.worst == 0.0
    assert watch.masks_differ == []
    assert watch.weights_differ
    export(config, tmp_path / "epoch_4.pth", tmp_path / "artifact")
    small = compact_model(config.model.model, str(tmp_path / "artifact/compact.pth"))
    image = torch.randn(4, 3, 32, 32)
    small.eval()
    watch.final.eval()
    runner.model.eval()
    with torch.no_grad():
        averaged, compact, trained = (model.extract_feat(image)[0] for model in (watch.final, small, runner.model))
    torch.testing.assert_close(compact, averaged, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(compact, trained, rtol=1e-2, atol=1e-3)


def test_the_order_of_the_hooks_in_the_config_does_not_matter(images, tmp_path):
    config = with_average(tiny.classifier(images, tmp_path, epochs=3))
    config.custom_hooks = config.custom_hooks[::-1]
    watch = WatchAverage()
    tiny.train(config, watch)
    assert watch.worst == 0.0
    assert watch.masks_differ == []


@pytest.mark.parametrize("update_buffers", [False, True])
def test_resume_with_an_average_is_exact(update_buffers, images, tmp_path):
    whole = with_average(tiny.classifier(images, tmp_path / "whole", epochs=4), update_buffers=update_buffers)
    tiny.train(whole)
    rest = with_average(tiny.classifier(images, tmp_path / "rest", epochs=4), update_buffers=update_buffers)
    rest.load_from, rest.resume = str(tmp_path / "whole/epoch_1.pth"), True
    tiny.train(rest)
    first, second = (torch.load(tmp_path / run / "epoch_4.pth", weights_only=False) for run in ("whole", "rest"))
    assert tiny.same(first["state_dict"], second["state_dict"]) == []
    assert tiny.same(first["ema_state_dict"], second["ema_state_dict"]) == []
