"""What a user does wrong is told in one line before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from mmengine.hooks import Hook

ROOT = Path(__file__).resolve().parents[2]


def refused_by_train(config, folder, *words, cold=False):
    """The one line tools/train.py ends with; no epoch was trained."""
    path = tiny.write(config, folder / "train.py")
    if cold:
        end = tiny.cold_tool(folder, tiny.TOOLS / "train.py", path, *words)
    else:
        end = tiny.tool(folder, "train.py", path, *words)
    message = end.one_line_error
    assert "Epoch(train)" not in end.out + end.err
    assert not list(folder.rglob("*.pth"))
    return message


@pytest.mark.parametrize(
    ("pruner", "words"),
    [
        ({"target": {"macs": 1.3}}, "target macs=1.3 must be a share in (0, 1]"),
        ({"target": {"macs": 0.0}}, "target macs=0.0 must be a share in (0, 1]"),
        ({"target": {"macs": 0}}, "target macs=0 must be positive"),
        ({"target": {"macs": -1}}, "target macs=-1 must be positive"),
        ({"target": {"macs": -0.5}}, "must be a share"),
        ({"target": {"macs": "1.2X"}}, "is not a number such as '2.05G'"),
        ({"target": {"macs": None}}, "must be a number"),
        ({"target": {"flops": 0.5}}, "target must be a dict with one of the keys macs"),
        ({"target": {"macs": 0.5, "params": 0.5}}, "target must be a dict with one of the keys"),
        ({"target": 0.5}, "target must be a dict"),
        ({"target": {"macs": 0.01}}, "is out of reach"),
        ({"targets": {"macs": 0.5}}, "CHEX has no option 'targets'; there are: target, "),
        ({"type": "CHEXX"}, "unknown pruner 'CHEXX'; there are: CHEX, "),
        ({"type": None}, "unknown pruner"),
        ({"criterion": "l2"}, "criterion='l2' must be one of css, l1"),
        ({"interval": 0}, "interval=0"),
        ({"interval": 3}, "interval=3 must not exceed end=2"),
        ({"end": 3}, "end=3 (T_max) must be below the training length of 3 epochs"),
        ({"end": 30}, "end=30 (T_max) must be below the training length of 3 epochs"),
        ({"end": 9, "by_epoch": False}, "end=9 (T_max) must be below the training length of 9 iterations"),
        ({"initial_regrow": 1.5}, "initial_regrow=1.5 must be a share"),
        ({"min_channels": 0}, "min_channels=0"),
        ({"round_to": "8"}, "round_to='8'"),
        ({"ignore": [".*"]}, "nothing is prunable"),
        ({"ignore": ["nolayer"]}, "ignore pattern 'nolayer' matches no prunable layer; there are: layer1.0.conv1"),
    ],
)
def test_pruner_options(pruner, words, images, tmp_path):
    config = tiny.classifier(images, tmp_path / "run", {**tiny.CHEX, **pruner})
    with pytest.raises(ValueError, match=r".") as caught:
        tiny.train(config, NoTraining())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


class NoTraining(Hook):
    """Fails the test when a batch is trained."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        raise AssertionError("training has started")


def test_no_pruner_options(images, tmp_path):
    config = tiny.classifier(images, tmp_path / "run")
    config.model.pruner = {"target": {"macs": 0.5}}
    assert "pruner must be a dict with a 'type'" in refused_by_train(config, tmp_path)


def test_scope_names_no_module_in_a_fresh_interpreter(images, tmp_path):
    config = tiny.classifier(images, tmp_path / "run", model__scope="backbon")
    message = refused_by_train(config, tmp_path, cold=True)
    assert message == "scope='backbon' names no module of ImageClassifier; there are: backbone, neck, head"


def test_missing_data_in_a_fresh_interpreter(tmp_path):
    end = tiny.cold_tool(tmp_path, tiny.TOOLS / "train.py", ROOT / "configs/chex_maskrcnn_r50.py")
    message = end.one_line_error
    assert "train_dataloader" in message
    assert "annotations/instances_train2017.json' is missing" in message
    assert str(tmp_path / "data/coco") in message
    assert "cocodataset.org" in message
    assert "data_root=DIR" in message


def test_the_end_of_exploration_in_a_fresh_interpreter(images, tmp_path):
    path = tiny.write(tiny.classifier(images, tmp_path / "run"), tmp_path / "train.py")
    end = tiny.cold_tool(tmp_path, tiny.TOOLS / "train.py", path, "--cfg-options", "model.pruner.end=3")
    assert "end=3 (T_max) must be below the training length of 3 epochs" in end.one_line_error


@pytest.mark.parametrize(
    ("pruner", "words"),
    [
        ({"target": {"macs": 1.3}}, "target macs=1.3"),
        ({"target": {"macs": 0.01}}, "is out of reach"),
        ({"typo": 1}, "CHEX has no option 'typo'"),
        ({"type": "Chex"}, "unknown pruner 'Chex'"),
        ({"end": 5}, "end=5 (T_max)"),
        ({"ignore": [".*"]}, "nothing is prunable"),
    ],
)
def test_the_tool_says_it_in_one_line(pruner, words, images, tmp_path):
    config = tiny.classifier(images, tmp_path / "run", {**tiny.CHEX, **pruner})
    assert words in refused_by_train(config, tmp_path)


def test_epochs_and_iterations_are_not_mixed_up(images, tmp_path):
    config = tiny.by_iteration(tiny.classifier(images, tmp_path / "run"), 10, end=8, interval=3)
    config.model.pruner.by_epoch = True
    message = refused_by_train(config, tmp_path)
    assert message == "the training counts iterations: set by_epoch=False, and interval and end in iterations"


@pytest.mark.parametrize("kind", ["load_from", "resume"])
def test_a_checkpoint_of_another_architecture(kind, images, trained, tmp_path):
    _, checkpoint = trained("ssd")  # the same backbone, cut after layer3
    path = tiny.write(tiny.classifier(images, tmp_path / "run"), tmp_path / "train.py")
    words = ["--cfg-options", f"load_from={checkpoint}"] if kind == "load_from" else ["--resume", checkpoint]
    end = tiny.tool(tmp_path, "train.py", path, *words)
    assert "is not a checkpoint of this ImageClassifier" in end.one_line_error
    assert str(checkpoint) in end.one_line_error


def test_an_artifact_is_no_checkpoint_to_prune(images, trained, tmp_path):
    from prune_mm.engine.exporter import export

    config, checkpoint = trained("classifier")
    export(config, checkpoint, tmp_path / "a")
    path = tiny.write(tiny.classifier(images, tmp_path / "run"), tmp_path / "train.py")
    end = tiny.tool(tmp_path, "train.py", path, "--cfg-options", f"load_from={tmp_path / 'a/compact.pth'}")
    assert "is a compact artifact; load it through type='prune_mm.CompactModel'" in end.one_line_error


@pytest.mark.parametrize("kind", ["load_from", "resume"])
def test_a_checkpoint_that_is_missing_or_damaged(kind, images, trained, tmp_path):
    path = tiny.write(tiny.classifier(images, tmp_path / "run"), tmp_path / "train.py")
    damaged = tmp_path / "cut.pth"
    damaged.write_bytes(trained("classifier")[1].read_bytes()[:4000])
    for file, message in ((tmp_path / "none.pth", "no checkpoint at"), (damaged, "is damaged or not a checkpoint")):
        words = ["--cfg-options", f"load_from={file}"] if kind == "load_from" else ["--resume", file]
        end = tiny.tool(tmp_path, "train.py", path, *words)
        assert message in end.one_line_error
        assert str(file) in end.one_line_error


def test_the_hook_without_the_model(images, tmp_path):
    config = tiny.classifier(images, tmp_path / "run", pruner=None)
    config.custom_hooks = [{"type": "prune_mm.PruningHook"}]
    message = refused_by_train(config, tmp_path)
    assert message == "ImageClassifier has no pruner; its config needs type='prune_mm.PrunableModel'"


def test_the_model_without_the_hook(images, tmp_path):
    config = tiny.classifier(images, tmp_path / "run")
    config.custom_hooks = []
    assert "custom_hooks=[dict(type='prune_mm.PruningHook')]" in refused_by_train(config, tmp_path)


def test_options_of_the_tools(images, trained, tmp_path):
    _, checkpoint = trained("classifier")
    path = tiny.write(tiny.classifier(images, tmp_path / "run"), tmp_path / "train.py")
    odd = tiny.classifier(images, tmp_path / "run", optim_wrapper__type="AnotherWrapper")
    scale = tiny.classifier(images, tmp_path / "run")
    scale.pop("auto_scale_lr")
    for tool, words, message in [
        ("train.py", [tmp_path / "none.py"], "no config at"),
        ("train.py", [tiny.write(odd, tmp_path / "odd.py"), "--amp"], "--amp is not supported"),
        ("train.py", [tiny.write(scale, tmp_path / "scale.py"), "--auto-scale-lr"], "base_batch_size"),
        ("test.py", [path], "a checkpoint is needed"),
        ("test.py", [path, tmp_path / "none.pth"], "no checkpoint at"),
        ("test.py", [path, tiny.TOOLS / "test.py"], "is damaged or not a checkpoint"),
        ("report.py", [tmp_path / "nowhere"], "nowhere"),
        ("compress.py", [tmp_path / "none.py"], "no config at"),
    ]:
        assert message in tiny.tool(tmp_path, tool, *words).one_line_error
    assert checkpoint.is_file()


def test_an_error_of_the_program_keeps_its_traceback(images, tmp_path):
    config = tiny.classifier(images, tmp_path / "run")
    config.train_dataloader.dataset.pipeline.append({"type": "Nothing"})
    end = tiny.tool(tmp_path, "train.py", tiny.write(config, tmp_path / "train.py"))
    assert end.status == 1
    assert "Traceback" in end.err
    assert not torch.cuda.is_initialized()
