"""Detectors learn from features and heads of a teacher."""

from __future__ import annotations

import math
import re

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import MODELS

from prune_mm.compat import fix_ssd_head
from prune_mm.engine.compact import compact_model
from prune_mm.engine.distillation import DistillationHook
from prune_mm.engine.exporter import export


@pytest.fixture(scope="module")
def dense(coco, tmp_path_factory):
    """``dense('ssd')``: checkpoint of a tiny dense detector that has trained a little."""
    found = {}

    def checkpoint(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp(kind)
            runner = tiny.build(getattr(tiny, kind)(coco, folder, None, epochs=1))
            fix_ssd_head()
            runner.train()
            found[kind] = folder / "epoch_1.pth"
        return str(found[kind])

    return checkpoint


class Watch(Hook):
    """Notes what the run trains with, and what it logs."""

    def before_train_epoch(self, runner):
        self.hook = next(hook for hook in runner.hooks if isinstance(hook, DistillationHook))
        self.teacher, self.seen = self.hook.teacher, []
        self.start = {name: tensor.clone() for name, tensor in self.teacher.state_dict().items()}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append({name: float(value) for name, value in outputs.items()})
        assert not any(module.training for module in self.teacher.modules())


TERMS = {"features": {"loss_kd_features"}, "head": {"loss_kd_cls", "loss_kd_bbox"}}


@pytest.mark.parametrize(("kind", "what"), [("ssd", "head"), ("ssd", "features"), ("maskrcnn", None)])
def test_while_it_is_pruned(kind, what, coco, dense, tmp_path):
    """With averages and accumulated gradients; what is saved is what a run without a teacher saves."""
    config = getattr(tiny, kind)(coco, tmp_path, tiny.UNIFORM, epochs=1)
    config.teacher = {"checkpoint": dense(kind), **({"what": what} if what else {})}
    config.custom_hooks = [{"type": "EMAHook", "momentum": 0.2}, *config.custom_hooks]
    config.optim_wrapper.accumulative_counts = 2
    watch = Watch()
    runner = tiny.train(config, watch)
    assert tiny.dead_weight(runner.model) == 0.0
    assert tiny.same(watch.start, watch.teacher.state_dict()) == []
    assert tiny.same(watch.start, torch.load(dense(kind), weights_only=False)["state_dict"]) == []
    terms = TERMS[what or "features"]
    assert len(watch.seen) == 4
    for line in watch.seen:
        assert {name for name in line if "loss_kd" in name} == terms
        assert all(line[name] > 0 for name in terms)
        parts = sum(value for name, value in line.items() if "loss" in name and name != "loss")
        assert line["loss"] == pytest.approx(parts, rel=1e-3)
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert all(f"{name}: " in log for name in terms)
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"]
    plain = tiny.build(getattr(tiny, kind)(coco, tmp_path / "plain", tiny.UNIFORM)).model
    assert set(saved) == set(plain.state_dict())
    assert "loss" not in vars(runner.model)
    average = next(hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook))
    assert "loss" not in vars(average.module)
    export(config, tmp_path / "epoch_1.pth", tmp_path / "small")
    assert "teacher" not in Config.fromfile(tmp_path / "small/config.py")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ssd", {"what": "head"}), ("ssd", {"what": "head", "temperature": 2.0}), ("ssd", {"match": "mse"}),
        ("maskrcnn", {}),
    ],
)  # fmt: skip
def test_the_student_moves_towards_the_teacher(kind, options, coco, dense, tmp_path):
    """With the terms of distillation alone, a compact network comes closer to the dense one it was cut from."""
    config = getattr(tiny, kind)(coco, tmp_path, tiny.UNIFORM, epochs=1)
    config.load_from = dense(kind)
    runner = tiny.build(config)
    teacher = tiny.build(getattr(tiny, kind)(coco, tmp_path / "teacher", None)).model
    teacher.load_state_dict(torch.load(dense(kind), weights_only=False)["state_dict"])
    teacher.requires_grad_(False).eval()
    runner.model.load_state_dict(teacher.state_dict(), strict=False)
    pruner, scope = runner.model.pruner, runner.model.get_submodule("backbone")
    pruner.commit(scope, pruner.start(scope), 0)
    student, before = runner.model, {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    hook = DistillationHook({"checkpoint": "unused"}, weight=1.0, **options)
    hook.attach(student, teacher)
    batch = student.data_preprocessor(next(iter(runner.build_dataloader(config.train_dataloader, seed=0))), True)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    history = []
    student.train()
    for _ in range(12):
        found = student(**batch, mode="loss")
        loss = sum(value for name, value in found.items() if "loss_kd" in name)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss))
    assert history[-1] < 0.7 * history[0], history
    assert tiny.same(before, teacher.state_dict()) == []
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.backbone.conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("what", ["head", "features"])
def test_terms_are_float32_under_mixed_precision(what, coco, dense, tmp_path):
    student, teacher = (tiny.build(tiny.ssd(coco, tmp_path / name, None)).model for name in ("student", "teacher"))
    config = tiny.ssd(coco, tmp_path, None)
    teacher.eval()
    DistillationHook({"checkpoint": "unused"}, what=what).attach(student, teacher)
    batch = student.data_preprocessor(next(iter(tiny.build(config).build_dataloader(config.train_dataloader))), True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = student(**batch, mode="loss")
    kd = {name: value for name, value in found.items() if "loss_kd" in name}
    assert kd
    for value in kd.values():
        assert value.dtype == torch.float32
        assert math.isfinite(float(value))
    sum(kd.values()).backward()
    assert student.backbone.conv1.weight.grad.abs().max() > 0


def test_a_compact_detector_is_fine_tuned_and_resumes(coco, dense, tmp_path):
    config = tiny.ssd(coco, tmp_path / "pruned", tiny.UNIFORM, epochs=1)
    config.load_from = dense("ssd")
    tiny.train(config)
    export(config, tmp_path / "pruned/epoch_1.pth", tmp_path / "small")
    ends = []
    for name in ("whole", "rest"):
        tune = Config.fromfile(tmp_path / "small/config.py")
        tune.work_dir, tune.train_cfg.max_epochs = str(tmp_path / name), 2
        tune.custom_hooks = [
            {"type": "prune_mm.DistillationHook", "teacher": {"checkpoint": dense("ssd")}, "what": "head"}
        ]
        if name == "rest":
            tune.load_from, tune.resume = str(tmp_path / "whole/epoch_1.pth"), True
        tune.randomness = {"seed": 0}
        # Without PruningHook the samples of a resumed run are others, but for a pipeline that draws nothing.
        tune.train_dataloader.dataset.pipeline = [
            step
            for step in tune.train_dataloader.dataset.pipeline
            if not step.type.startswith(("Random", "Photo", "Min", "Exp"))
        ]
        tiny.train(tune)
        ends.append(torch.load(tmp_path / name / "epoch_2.pth", weights_only=False)["state_dict"])
    small = compact_model(config.model.model, str(tmp_path / "small/compact.pth"))
    assert set(ends[0]) == set(small.state_dict())
    assert tiny.same(*ends) == []


@pytest.mark.parametrize("count", [1, 2])
def test_processes(count, coco, dense, tmp_path):
    from test_distributed import processes, state

    config = tiny.ssd(coco, tmp_path, tiny.UNIFORM, epochs=1)
    config.teacher = {"checkpoint": dense("ssd"), "what": "head"}
    config.train_dataloader.batch_size = 4 // count
    config.custom_hooks = [*config.custom_hooks, {"type": "SaveEachRank"}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    ends = processes(count, config, tmp_path)
    assert [end.status for end in ends] == [0] * count, ends
    assert "loss_kd_bbox" in ends[0].out + ends[0].err
    if count == 2:
        states = [{k: v for k, v in state(tmp_path, rank, 0).items() if "running" not in k} for rank in (0, 1)]
        assert tiny.same(*states) == []


def refused(config, teacher):
    """The one line that stops a run before anything is trained."""
    config.teacher = teacher
    with pytest.raises(ValueError, match=re.compile(r"\A.+\Z")) as caught:
        tiny.train(config)
    return str(caught.value)


def test_what_cannot_be_compared_is_refused_before_training(images, coco, dense, tmp_path):
    def ssd():
        return tiny.ssd(coco, tmp_path / "run", tiny.UNIFORM, epochs=1)

    def saved(config, name):
        model = MODELS.build(config.model.to_dict())
        torch.save({"state_dict": model.state_dict()}, tmp_path / f"{name}.pth")
        return {"checkpoint": str(tmp_path / f"{name}.pth"), "model": config.model.to_dict()}

    checkpoint = {"checkpoint": dense("ssd")}
    found = refused(ssd(), {**checkpoint, "what": "logits"})
    assert found.startswith("what='logits' compares the logits of image classifiers; the model is a SingleStage")
    assert found.endswith(": use what='features'")
    mask = tiny.maskrcnn(coco, tmp_path / "run", tiny.UNIFORM, epochs=1)
    found = refused(mask, {"checkpoint": dense("maskrcnn"), "what": "head"})
    assert "dense bbox_head, as of an SSD; the model is a MaskRCNN: use what='features'" in found
    # Other widths, fewer levels, more classes, and a network of another kind.
    wider = tiny.ssd(coco, tmp_path / "wider", None)
    wider.model.neck.out_channels = wider.model.bbox_head.in_channels = (32, 24, 16, 16)
    found = refused(ssd(), saved(wider, "wider"))
    assert found.startswith("teacher: for an image of ")
    assert "24x" in found
    classes = tiny.ssd(coco, tmp_path / "classes", None)
    classes.model.bbox_head.num_classes = 5
    teacher = saved(classes, "classes")
    found = refused(ssd(), {**teacher, "what": "head"})
    assert found == "teacher: it gives 6 scores a box by softmax, the model 4 scores a box by softmax"
    classifier = tiny.classifier(images, tmp_path / "classifier", None)
    found = refused(ssd(), saved(classifier, "classifier"))
    assert "pixels it puts out 1 tensors (64x" in found
    assert "they must be the same to be compared" in found
    found = refused(ssd(), {"checkpoint": dense("maskrcnn")})
    assert "is not a checkpoint of this SingleStageDetector" in found
    assert not list((tmp_path / "run").rglob("epoch_*.pth"))
