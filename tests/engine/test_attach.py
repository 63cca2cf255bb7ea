"""PrunableModel attaches a pruner to the dense model, and changes nothing else about it."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from prune_mm.engine.prunable import pruned_module

KINDS = ("classifier", "maskrcnn", "ssd")


def config_of(kind, images, coco, **options):
    return getattr(tiny, kind)(images if kind == "classifier" else coco, "unused", **options)


def built(config, seed=0):
    init_default_scope(config.default_scope)
    torch.manual_seed(seed)
    model = dict(config.model)
    if config.get("data_preprocessor"):
        model["data_preprocessor"] = config.data_preprocessor
    return MODELS.build(model)


def features(model, size=64, seed=0):
    model.eval()
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.extract_feat(image)


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_of_its_class_and_gains_only_pruner_keys(kind, images, coco):
    dense = built(config_of(kind, images, coco, pruner=None))
    model = built(config_of(kind, images, coco))
    assert type(model) is type(dense)
    own = [key for key in model.state_dict() if not key.startswith("pruner.")]
    assert own == list(dense.state_dict())
    assert len(model.state_dict()) > len(own)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    assert list(model.pruner.parameters()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_checkpoint_loads_strictly(kind, images, coco):
    dense = built(config_of(kind, images, coco, pruner=None), seed=1)
    model = built(config_of(kind, images, coco), seed=2)
    model.load_state_dict(dense.state_dict(), strict=True)
    assert_equal(features(model), features(dense))
    assert not bool(model.pruner.started)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_checkpoint_loads_into_the_dense_model_by_name(kind, images, coco, trained):
    config, path = trained(kind)
    dense = built(config_of(kind, images, coco, pruner=None))
    found = load_checkpoint(dense, str(path), map_location="cpu", strict=False)
    assert all(name in found["state_dict"] for name in dense.state_dict())
    masked = built(config)
    masked.load_state_dict(found["state_dict"], strict=True)
    masked.pruner.mask(pruned_module(masked))
    assert tiny.dead_weight(masked) == 0.0
    assert any(not bool(mask.all()) for _, mask in masked.pruner.masks.items())
    assert_equal(features(masked), features(dense))


def test_a_deep_copy_has_decisions_of_its_own(images):
    model = built(tiny.classifier(images, "unused"))
    before = features(model, 32)
    copied = copy.deepcopy(model)
    unit = copied.pruner.units[0].name
    copied.pruner.set_masks({**tiny.masks_of(copied), unit: torch.arange(copied.pruner.masks[unit].numel()) < 1})
    copied.pruner.mask(pruned_module(copied))
    assert bool(model.pruner.masks[unit].all())
    assert_equal(features(model, 32), before)
    assert any(not torch.equal(a, b) for a, b in zip(features(copied, 32), before))


def test_ddp_leaves_the_pruner_alone(images):
    model = built(tiny.classifier(images, "unused"))
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert ignored == {f"pruner.{name}" for name, _ in model.pruner.named_buffers()}


def test_a_model_is_wrapped_once(images):
    config = tiny.classifier(images, "unused")
    config.model = {**config.model, "model": config.model}
    with pytest.raises(ValueError, match="already has a child 'pruner'"):
        built(config)


@pytest.mark.parametrize(
    ("kind", "scope", "pruner"),
    [
        ("classifier", "backbone.layer2", tiny.CHEX),
        ("maskrcnn", "backbone.layer3", tiny.CHEX),
        ("maskrcnn", "neck", {**tiny.UNIFORM, "prune_coupled": True, "prune_stem": True}),
        ("ssd", "neck", {**tiny.UNIFORM, "prune_stem": True}),
        ("ssd", "neck", {**tiny.CHEX, "prune_stem": True}),  # convolutions without norms
    ],
)
def test_any_module_that_extracts_features_may_be_pruned(kind, scope, pruner, images, coco, tmp_path):
    from prune_mm.engine.exporter import export

    config = config_of(kind, images, coco, pruner=pruner, model__scope=scope)
    config.work_dir = str(tmp_path)
    model = tiny.train(config).model
    assert 0.3 < model.pruner.status()["macs"] <= 0.5
    report = export(config, tmp_path / "epoch_3.pth", tmp_path / "artifact")
    assert report["scope"] == scope
    assert report["macs"]["compact"] <= 0.5 * report["macs"]["dense"]


def test_the_hidden_layers_of_a_transformer_are_pruned(images, tmp_path):
    from prune_mm.engine.exporter import export

    config = tiny.classifier(images, tmp_path, {**tiny.UNIFORM, "target": {"macs": 0.7}}, epochs=1)
    config.model.model = {
        "type": "ImageClassifier",
        "backbone": {"type": "VisionTransformer", "arch": "deit-t", "img_size": 32, "patch_size": 16},
        "head": {"type": "VisionTransformerClsHead", "num_classes": 6, "in_channels": 192},
    }
    assert tiny.train(config).model.pruner.status()["macs"] <= 0.7
    report = export(config, tmp_path / "epoch_1.pth", tmp_path / "artifact")
    assert report["macs"]["compact"] <= 0.7 * report["macs"]["dense"]


def test_a_network_that_takes_one_image_size_only(images, tmp_path):
    from prune_mm.engine.exporter import export

    config = tiny.classifier(images, tmp_path, {**tiny.UNIFORM, "target": {"macs": 0.7}}, epochs=1)
    config.model.model = {
        "type": "ImageClassifier",
        "backbone": {"type": "MlpMixer", "arch": "s", "img_size": 32, "patch_size": 16},
        "neck": {"type": "GlobalAveragePooling", "dim": 1},
        "head": {"type": "LinearClsHead", "num_classes": 6, "in_channels": 512},
    }
    tiny.train(config)
    report = export(config, tmp_path / "epoch_1.pth", tmp_path / "artifact")
    assert report["macs"]["compact"] <= 0.7 * report["macs"]["dense"]


def test_what_cannot_be_pruned_says_why(coco):
    # Every convolution of an FPN either makes an output or feeds the top-down sum.
    with pytest.raises(ValueError, match=r"nothing is prunable: .*fpn_convs.0.conv: output"):
        built(tiny.maskrcnn(coco, "unused", pruner=tiny.UNIFORM, model__scope="neck"))
    with pytest.raises(ValueError, match="is not run when MaskRCNN extracts features"):
        built(tiny.maskrcnn(coco, "unused", model__scope="rpn_head"))


@pytest.mark.parametrize("scope", ["", "backbon", "backbone.layer9"])
def test_an_unknown_scope_lists_the_modules(scope, coco):
    with pytest.raises(ValueError, match=r"names no module of MaskRCNN; there are: backbone, neck, rpn_head"):
        built(tiny.maskrcnn(coco, "unused", model__scope=scope))


@pytest.mark.parametrize("size", [0, -1, (32,), (32, 32, 32), (32, 0), 1.5, "big", None])
def test_input_size_is_checked(size, images):
    config = tiny.classifier(images, "unused")
    config.model.input_size = size
    with pytest.raises(ValueError, match="input_size="):
        built(config)
