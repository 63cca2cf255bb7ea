"""Every config of the project builds its model, and its method fits the training it plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

from prune_mm.engine.compact import without_pretrained
from prune_mm.engine.launch import check_data
from prune_mm.engine.stages import compact_config, dense_config
from prune_mm.registry import MODELS

CONFIGS = Path(__file__).parents[1] / "configs"
# Those of the evidence are looked at in tests/evidence.
PATHS = sorted(path for path in CONFIGS.rglob("*.py") if not {"_base_", "evidence"} & set(path.parts))


def test_there_is_a_config_for_each_method_and_task():
    names = {path.stem for path in CONFIGS.glob("*.py")}
    demos = {path.stem for path in (CONFIGS / "demo").glob("*.py")}
    for method in ("chex", "strucspars", "gconv", "hinge", "onexn"):
        assert f"{method}_maskrcnn_r50" in names
        assert any(name.startswith(f"{method}_ssd") for name in names)
        assert {f"{method}_ssd", f"{method}_maskrcnn"} <= demos


def test_data_that_fetches_itself_is_not_missing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_data(Config.fromfile(CONFIGS / "gconv_condensenet86_cifar10.py"), "train_dataloader", "val_dataloader")
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json' is missing"):
        check_data(Config.fromfile(CONFIGS / "gconv_maskrcnn_r50.py"), "train_dataloader")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_it_builds_and_meets_its_schedule(path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    model = MODELS.build(without_pretrained(config.model))
    model.pruner.set_schedule(config.train_cfg.get("max_epochs"), config.train_cfg.get("max_iters") or 10**6)
    assert any(hook.type == "prune_mm.PruningHook" for hook in config.custom_hooks)
    # Further stages are the same config with some settings changed; a name that is not there would be a typing error.
    for stage, base in (("pretrain", dense_config), ("finetune", compact_config)):
        if stage in config:
            settings = base(config)
            settings.merge_from_dict(config[stage].to_dict())
            assert settings.train_cfg.get("max_epochs") or settings.train_cfg.get("max_iters")
