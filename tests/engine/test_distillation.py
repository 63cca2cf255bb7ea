"""Distillation: the terms, whom gradients reach, and that the model stays what it is."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.models import ImageClassifier
from torch import nn

from prune_mm.engine.distillation import DistillationHook, check_teacher
from prune_mm.engine.distillation_parts import Logits
from prune_mm.engine.exporter import export
from prune_mm.engine.stages import compact_config, dense_config


@pytest.fixture(scope="module")
def dense(images, tmp_path_factory):
    """Config file and checkpoint of a tiny dense classifier."""
    folder = tmp_path_factory.mktemp("teacher")
    config = tiny.classifier(images, folder, None, epochs=1)
    tiny.train(config)
    return tiny.write(config, folder / "teacher.py"), folder / "epoch_1.pth"


@pytest.fixture(scope="module")
def artifact(images, dense, tmp_path_factory):
    """Folder of a compact model that was pruned from it."""
    folder = tmp_path_factory.mktemp("pruned")
    config = tiny.classifier(images, folder, tiny.UNIFORM, epochs=1)
    config.load_from = str(dense[1])
    tiny.train(config)
    export(config, folder / "epoch_1.pth", folder / "small")
    return folder / "small"


def finetune(artifact, work_dir, teacher, epochs=1, **options):
    config = Config.fromfile(artifact / "config.py")
    config.work_dir, config.train_cfg.max_epochs = str(work_dir), epochs
    config.custom_hooks = [{"type": "prune_mm.DistillationHook", "teacher": teacher, **options}]
    return config


class Watch(Hook):
    """Notes what hook and model are while training."""

    def before_train_epoch(self, runner):
        self.hook = next(hook for hook in runner.hooks if isinstance(hook, DistillationHook))
        self.teacher, self.modes = self.hook.teacher, set()
        self.start = {name: tensor.clone() for name, tensor in self.teacher.state_dict().items()}
        optimized = {id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group["params"]}
        self.optimized = optimized & {id(p) for p in self.teacher.parameters()}
        self.average = next((hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)), None)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.modes.add(self.teacher.training)
        self.outputs = outputs


def test_the_compact_model_learns_from_the_dense_one(artifact, dense, tmp_path):
    config = finetune(artifact, tmp_path, {"checkpoint": str(dense[1])})
    config.custom_hooks.append({"type": "EMAHook", "momentum": 0.2})
    watch = Watch()
    runner = tiny.train(config, watch)
    assert type(runner.model) is ImageClassifier
    assert watch.modes == {False}
    assert watch.optimized == set()
    assert tiny.same(watch.start, watch.teacher.state_dict()) == []
    assert tiny.same(watch.start, torch.load(dense[1], weights_only=False)["state_dict"]) == []
    assert not any(p.requires_grad or p.grad is not None for p in watch.teacher.parameters())
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    assert set(saved["state_dict"]) == set(torch.load(artifact / "compact.pth")["state_dict"])
    # The method is the class's again, and was never another in the averaged copy.
    assert "loss" not in vars(runner.model)
    assert "loss" not in vars(watch.average.module)
    lines = [json.loads(line) for path in tmp_path.glob("*/vis_data/scalars.json") for line in path.open()]
    logged = [line for line in lines if "loss_kd" in line]
    assert len(logged) == 3
    for line in logged:
        assert line["loss"] == pytest.approx(line["loss_ce"] + line["loss_kd"], rel=1e-4)
        assert line["loss_kd"] > 0
    assert export(config, tmp_path / "epoch_1.pth", tmp_path / "tuned")["finetuned"]


class Table(nn.Module):
    """A backbone that gives back given features, one for each image."""

    def __init__(self, features):
        super().__init__()
        self.features = nn.Parameter(features.float())

    def forward(self, x):
        return (self.features[: len(x)] + 0.0 * x.mean(),)


def with_logits(logits):
    """A classifier that tells these logits."""
    init_default_scope("mmpretrain")
    identity = {"type": "mmpretrain.LinearClsHead", "num_classes": logits.shape[1], "in_channels": logits.shape[1]}
    model = ImageClassifier(backbone=Table(logits), head=identity)
    model.head.fc.weight.data.copy_(torch.eye(logits.shape[1]))
    model.head.fc.bias.data.zero_()
    return model


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_published_loss(weight):
    """Spec 16.11, and 0.4 * KD + 0.6 * CE."""
    from mmpretrain.structures import DataSample

    student, teacher = (with_logits(torch.from_numpy(np.random.RandomState(seed).randn(2, 5))) for seed in (1, 2))
    images, samples = torch.rand(2, 3, 4, 4), [DataSample().set_gt_label(label) for label in (3, 0)]
    plain = student.loss(images, samples)["loss"]
    hook = DistillationHook({"checkpoint": "unused"}, weight=weight)
    hook.attach(student, teacher.requires_grad_(False).eval())
    terms = student(images, samples, mode="loss")
    assert set(terms) == {"loss_ce", "loss_kd"}
    assert float(terms["loss_kd"]) == pytest.approx(weight * 1.3103456473, rel=1e-6)
    assert float(terms["loss_ce"]) == pytest.approx((1 - weight) * float(plain), rel=1e-6, abs=1e-9)
    sum(terms.values()).backward()
    assert student.backbone.features.grad.abs().max() > 0
    assert teacher.backbone.features.grad is None


def test_the_teacher_sees_the_images_as_the_student_does():
    from mmpretrain.structures import DataSample

    student, teacher = with_logits(torch.zeros(2, 3)), with_logits(torch.zeros(2, 3))
    seen = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    hook = DistillationHook({"checkpoint": "unused"})
    hook.attach(student, teacher)
    seen.clear()
    images = torch.rand(2, 3, 4, 4)
    student.loss(images, [DataSample().set_gt_label(0)] * 2)
    assert seen[0] is images


@pytest.mark.parametrize("kind", ["config", "model"])
def test_any_classifier_and_any_teacher(kind, images, dense, tmp_path):
    path, checkpoint = dense
    given = str(path) if kind == "config" else Config.fromfile(path).model.to_dict()
    config = tiny.classifier(images, tmp_path, None, epochs=1)
    teacher = {kind: given, "checkpoint": str(checkpoint)}
    config.custom_hooks = [{"type": "prune_mm.DistillationHook", "teacher": teacher, "temperature": 2.0}]
    watch = Watch()
    tiny.train(config, watch)
    assert float(watch.outputs["loss_kd"]) > 0


def test_while_it_is_pruned(images, dense, tmp_path):
    config = tiny.classifier(images, tmp_path, tiny.UNIFORM, epochs=1)
    teacher = {"checkpoint": str(dense[1])}
    config.custom_hooks = [*config.custom_hooks, {"type": "prune_mm.DistillationHook", "teacher": teacher}]
    watch = Watch()
    runner = tiny.train(config, watch)
    assert float(watch.outputs["loss_kd"]) > 0
    assert not hasattr(watch.teacher, "pruner")
    assert tiny.dead_weight(runner.model) == 0.0


@pytest.mark.parametrize("match", ["correlation", "mse"])
def test_features_of_a_classifier(match, artifact, dense, tmp_path):
    config = finetune(artifact, tmp_path, {"checkpoint": str(dense[1])}, what="features", match=match)
    watch = Watch()
    tiny.train(config, watch)
    assert set(watch.outputs) >= {"loss_kd_features", "loss_ce"}
    assert float(watch.outputs["loss"]) == pytest.approx(
        float(watch.outputs["loss_kd_features"]) + float(watch.outputs["loss_ce"]), rel=1e-5
    )
    assert tiny.same(watch.start, watch.teacher.state_dict()) == []


# -- teacher=dict(...) at the top of a config -------------------------------------------------------------------------


def test_a_teacher_in_the_config_is_the_hook_in_the_config(images, dense, tmp_path):
    """By the tool, and by a plain Runner with PruningHook."""
    ends = []
    for kind in ("hook", "runner", "tool"):
        config = tiny.classifier(images, tmp_path / kind, tiny.UNIFORM, epochs=1)
        teacher = {"checkpoint": str(dense[1])}
        if kind == "hook":
            options = {"teacher": teacher, "temperature": 2.0, "weight": 0.7}
            config.custom_hooks = [*config.custom_hooks, {"type": "prune_mm.DistillationHook", **options}]
        else:
            config.teacher = {**teacher, "temperature": 2.0, "weight": 0.7}
        if kind == "tool":
            path = tiny.write(config, tmp_path / "train.py")
            end = tiny.tool(tmp_path, "train.py", path)
            assert end.status == 0, end
        else:
            runner = tiny.train(config)
            assert sum(isinstance(hook, DistillationHook) for hook in runner.hooks) == 1
        ends.append(torch.load(tmp_path / kind / "epoch_1.pth", weights_only=False)["state_dict"])
    assert tiny.same(ends[0], ends[1]) == []
    assert tiny.same(ends[0], ends[2]) == []
    # What is made of it has no teacher, in its config either.
    report = export(config, tmp_path / "tool/epoch_1.pth", tmp_path / "small")
    assert report["pruner"] == "UniformL1"
    for made in (Config.fromfile(tmp_path / "small/config.py"), compact_config(config), dense_config(config)):
        assert made.get("teacher") is None
        assert "Distillation" not in made.pretty_text


def test_a_teacher_of_any_training(images, dense, tmp_path):
    """Of a dense model, with a teacher from another config."""
    config = tiny.classifier(images, tmp_path / "run", None, epochs=1)
    config.teacher = {"checkpoint": str(dense[1]), "config": str(dense[0]), "what": "features"}
    end = tiny.tool(tmp_path, "train.py", tiny.write(config, tmp_path / "train.py"))
    assert end.status == 0, end
    assert "loss_kd_features" in end.out + end.err


def test_bad_teachers_in_the_config(dense, tmp_path):
    def message(teacher, hooks=(), kind=ValueError):
        with pytest.raises(kind) as caught:
            check_teacher(Config({"teacher": teacher, "custom_hooks": list(hooks)}))
        return str(caught.value)

    assert message({"checkpoint": "a", "what": "head", "wieght": 1}).startswith("teacher has no option 'wieght'; there")
    assert "must be dict(checkpoint=PATH)" in message({"what": "head"})
    assert "teacher='dense.pth' must be dict(checkpoint=PATH)" in message("dense.pth")
    assert "weight=-1 must be a positive number" in message({"checkpoint": "a", "weight": -1})
    assert message({"checkpoint": "none.pth"}, kind=FileNotFoundError) == "teacher: no checkpoint at 'none.pth'"
    both = message({"checkpoint": str(dense[1])}, [{"type": "prune_mm.DistillationHook"}])
    assert both == "the config has both teacher=dict(...) and a DistillationHook; leave one of them out"


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(images, dense, tmp_path):
    def config(folder):
        made = tiny.classifier(images, tmp_path / folder, tiny.UNIFORM, epochs=2)
        teacher = {"checkpoint": str(dense[1])}
        made.custom_hooks = [*made.custom_hooks, {"type": "prune_mm.DistillationHook", "teacher": teacher}]
        return made

    tiny.train(config("whole"))
    rest = config("rest")
    rest.load_from, rest.resume = str(tmp_path / "whole/epoch_1.pth"), True
    tiny.train(rest)
    first, second = (torch.load(tmp_path / run / "epoch_2.pth", weights_only=False) for run in ("whole", "rest"))
    assert tiny.same(first["state_dict"], second["state_dict"]) == []


def test_the_teacher_draws_no_random_numbers(artifact, dense, tmp_path):
    """Building it leaves the order of images and their crops alone: with no weight, the training is as without it."""
    ends = []
    for folder in ("with", "without"):
        config = finetune(artifact, tmp_path / folder, {"checkpoint": str(dense[1])}, weight=1e-12)
        if folder == "without":
            config.custom_hooks = []
        tiny.train(config)
        ends.append(torch.load(tmp_path / folder / "epoch_1.pth", weights_only=False)["state_dict"])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-5)


def test_two_processes(artifact, dense, tmp_path):
    from test_distributed import SABOTEURS, state, two_processes

    config = finetune(artifact, tmp_path, {"checkpoint": str(dense[1])})
    config.train_dataloader.batch_size = 8
    config.custom_hooks.append({"type": "SaveEachRank"})
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    assert SABOTEURS.is_dir()
    ends = two_processes(config, tmp_path)
    assert [end.status for end in ends] == [0, 0], ends
    assert "loss_kd" in ends[0].out + ends[0].err
    states = [{k: v for k, v in state(tmp_path, rank, 0).items() if "running" not in k} for rank in (0, 1)]
    assert tiny.same(*states) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "dense.pth"}, "teacher='dense.pth' must be dict(checkpoint=PATH)"),
        ({"teacher": {"config": "a.py"}}, "must be dict(checkpoint=PATH)"),
        ({"teacher": {"checkpoint": "a", "config": "a", "model": {}}}, "must be dict(checkpoint=PATH)"),
        ({"teacher": {"checkpoint": "a", "weights": 1}}, "must be dict(checkpoint=PATH)"),
        ({"temperature": 0}, "temperature=0 must be a positive number"),
        ({"weight": 0}, "weight=0 must be a positive number"),
        ({"weight": 1.5, "what": "logits"}, "weight=1.5 must be a share in (0, 1]"),
        ({"what": "attention"}, "what='attention' must be one of logits, features, head"),
        ({"what": "features", "match": "cosine"}, "match='cosine' must be one of correlation, mse"),
        ({"what": "features", "temperature": 2.0}, "temperature=2.0 means nothing for what='features'; leave it out"),
        ({"what": "head", "match": "mse"}, "match='mse' means nothing for what='head'; leave it out"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DistillationHook(**{"teacher": {"checkpoint": "dense.pth"}, **options})


def refused(config, kind=ValueError):
    """The message that stops a run before anything is trained."""
    with pytest.raises(kind) as caught:
        tiny.train(config)
    return str(caught.value)


def test_what_cannot_work_is_refused_before_training(images, coco, artifact, dense, tmp_path):
    path, checkpoint = (str(item) for item in dense)
    missing = finetune(artifact, tmp_path, {"checkpoint": str(tmp_path / "none.pth")})
    assert "teacher: no checkpoint at" in refused(missing, FileNotFoundError)
    nowhere = finetune(artifact, tmp_path, {"checkpoint": checkpoint, "config": "none.py"})
    assert "teacher: no config at 'none.py'" in refused(nowhere, FileNotFoundError)
    (tmp_path / "broken.pth").write_bytes(b"PK" + b"0" * 99)
    broken = finetune(artifact, tmp_path, {"checkpoint": str(tmp_path / "broken.pth")})
    assert "is damaged or not a checkpoint" in refused(broken)

    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    partial = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    torch.save({"state_dict": partial}, tmp_path / "partial.pth")
    lacking = finetune(artifact, tmp_path, {"checkpoint": str(tmp_path / "partial.pth")})
    assert "it lacks 'head.fc.weight' and 1 more" in refused(lacking)
    torch.save({"state_dict": {**state, "backbone.more": torch.zeros(1)}}, tmp_path / "more.pth")
    more = finetune(artifact, tmp_path, {"checkpoint": str(tmp_path / "more.pth")})
    assert "it also holds 'backbone.more' and 0 more tensors" in refused(more)
    compact = finetune(artifact, tmp_path, {"checkpoint": str(artifact / "compact.pth")})
    assert "is not a checkpoint of this ImageClassifier" in refused(compact)

    plain = tiny.classifier(images, tmp_path, None, epochs=1)
    plain.custom_hooks = [{"type": "prune_mm.DistillationHook", "teacher": {"checkpoint": checkpoint}}]
    assert "names no network" in refused(plain)
    model = Config.fromfile(path).model.to_dict()
    wider = {**model, "head": {**model["head"], "num_classes": 7}}
    torch.save({"state_dict": {**state, "head.fc.weight": torch.zeros(7, 64), "head.fc.bias": torch.zeros(7)}},
               tmp_path / "wider.pth")  # fmt: skip
    other = finetune(artifact, tmp_path, {"checkpoint": str(tmp_path / "wider.pth"), "model": wider})
    assert "teacher: it tells 7 classes, the model 6" in refused(other)
    detector = tiny.maskrcnn(coco, tmp_path / "detector", None, epochs=1)
    found = tiny.write(detector, tmp_path / "detector.py")
    taught = finetune(artifact, tmp_path, {"checkpoint": checkpoint, "config": str(found)})
    assert "what='logits' compares the logits of image classifiers; the teacher is a MaskRCNN" in refused(taught)
    heavy = finetune(artifact, tmp_path, {"checkpoint": checkpoint}, weight=2)
    assert "weight=2 must be a share in (0, 1]" in refused(heavy)
    twice = finetune(artifact, tmp_path, {"checkpoint": checkpoint})
    twice.custom_hooks = twice.custom_hooks * 2
    assert "the model has a teacher already" in refused(twice)
    assert not list(tmp_path.rglob("epoch_*.pth"))


def test_heads_without_logits():
    """Heads that put out several scores, and classifiers without heads, cannot be compared."""
    part, model = Logits(), with_logits(torch.zeros(1, 3))
    part.check_alike(model, model)
    model.head.forward = lambda feats: (feats[0], feats[0])
    with pytest.raises(ValueError, match="the head of the model, a LinearClsHead, does not put out logits"):
        part.check_alike(model, model)
    model.head = None
    with pytest.raises(ValueError, match="the teacher is a ImageClassifier without a head"):
        part.module(model, "the teacher")


def test_testing_an_artifact_needs_no_teacher(artifact, tmp_path):
    config = finetune(artifact, tmp_path, {"checkpoint": "gone.pth"})
    config.experiment_name = "test_only"
    Runner.from_cfg(config).test()
