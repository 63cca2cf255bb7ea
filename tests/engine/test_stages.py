"""Configs of the stages around pruning: what a checkpoint stands for, who teaches."""

from __future__ import annotations

import pytest
from mmengine.config import Config

from prune_mm.engine.stages import filled, finetune_config


def test_checkpoints_are_filled_in():
    settings = {"a": [{"b": "{{pretrained}}"}], "c": 1, "scale": (96, 96), "d": "{{dense}}"}
    paths = {"pretrained": "x.pth", "dense": "y.pth"}
    assert filled(settings, paths) == {"a": [{"b": "x.pth"}], "c": 1, "scale": (96, 96), "d": "y.pth"}


@pytest.mark.parametrize("own", [False, True])
def test_a_teacher_teaches_on_unless_fine_tuning_has_its_own(tmp_path, own):
    hook = {"type": "prune_mm.DistillationHook", "teacher": {"checkpoint": "{{dense}}"}}
    config = Config(
        {
            "model": {"type": "prune_mm.PrunableModel", "model": {"type": "Net", "backbone": {"type": "Body"}}},
            "teacher": {"checkpoint": "{{pretrained}}"},
            "finetune": {"custom_hooks": [hook]} if own else {"train_cfg": {"max_epochs": 1}},
        }
    )
    stage = finetune_config(config, tmp_path, {"pretrained": "p.pth", "dense": "d.pth"})
    assert stage.get("teacher") == (None if own else {"checkpoint": "p.pth"})
    assert [each.teacher.checkpoint for each in stage.custom_hooks] == (["d.pth"] if own else [])
    assert stage.model.checkpoint == str(tmp_path / "compact.pth")
    assert config.teacher.checkpoint == "{{pretrained}}", "the training's config stays what it was"
