"""The CIFAR bases: every model base builds, and goes together with a data base and a pruner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS
from mmpretrain.structures import DataSample
from published_counts import calls

from prune_mm.registry import MODELS

BASES = Path(__file__).parents[2] / "configs" / "_base_"
NAMES = sorted(path.stem for path in (BASES / "models").glob("*.py"))


def config_of(*bases: str, extra: str = "") -> Config:
    paths = [f"{BASES / base}.py" for base in bases]
    return Config.fromstring(f"_base_ = {paths!r}\n{extra}", ".py")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_base_builds_and_classifies(classifier, name):
    config = config_of(f"models/{name}")
    assert set(config) == {"model", "custom_imports"}, "models know nothing of data or schedules"
    classes = {"cifar10": 10, "cifar100": 100, "in1k": 1000}[name.rpartition("_")[2]]
    assert config.model.head.num_classes == classes
    _, _, scores = calls(classifier(name), 224 if classes == 1000 else 32)[-1]
    assert scores == (1, classes)


@pytest.mark.parametrize(("data", "kind", "classes"), [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)])
def test_data_is_as_published(data, kind, classes):
    config = config_of(f"{data}_bs128")
    assert config.default_scope == "mmpretrain"
    assert DATASETS.get(kind) is not None
    for loader, batch, split in (("train", 128, "train"), ("val", 100, "test"), ("test", 100, "test")):
        loaded = config[f"{loader}_dataloader"]
        dataset = loaded.dataset
        assert (loaded.batch_size, dataset.type, dataset.split) == (batch, kind, split)
        assert dataset.data_root.rstrip("/") == f"data/{data}"
    crop, flip, _ = config.train_dataloader.dataset.pipeline
    assert crop == {"type": "RandomCrop", "crop_size": 32, "padding": 4}
    assert flip == {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"}
    preprocessor = config.data_preprocessor
    assert preprocessor.num_classes == classes
    assert [value / 255 for value in preprocessor.mean] == pytest.approx([0.4914, 0.4822, 0.4465])
    assert [value / 255 for value in preprocessor.std] == pytest.approx([0.2023, 0.1994, 0.2010])
    assert not preprocessor.to_rgb, "CIFAR images are RGB as they are loaded"


def test_bases_go_together_under_a_pruner():
    extra = (
        "train_dataloader = dict(batch_size=64)\n"
        "model = dict(_delete_=True, type='prune_mm.PrunableModel', model=_base_.model, scope='backbone',\n"
        "    input_size=32, pruner=dict(type='CHEX', target=dict(macs=0.5)))\n"
    )
    schedule = "mmpretrain::_base_/schedules/cifar10_bs128"
    paths = [f"{BASES}/models/resnet20_cifar100.py", f"{BASES}/cifar100_bs128.py", f"{schedule}.py"]
    config = Config.fromstring(f"_base_ = {paths!r}\n{extra}", ".py")
    assert config.train_dataloader.batch_size == 64
    assert config.optim_wrapper.optimizer.lr == 0.1
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    assert type(model.backbone).__name__ == "CIFARResNet"
    assert len(model.pruner.state_dict()) > 0
    images = torch.randn(2, 3, 32, 32)
    loss = model(images, [DataSample().set_gt_label(label) for label in (3, 99)], mode="loss")["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())
