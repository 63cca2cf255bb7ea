"""A training run with a pruner: masks change when due, dead weights stay zero, the budget is met, the log says so."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS


class Watch(Hook):
    """Looks at masks before every iteration and at dead weights after every optimizer step."""

    def __init__(self):
        self.masks, self.updates, self.worst, self.steps = [], {}, 0.0, 0

    def before_train(self, runner):
        # Registered after the pruner's own hook, so it sees what the step left behind.
        wrapper = runner.optim_wrapper
        self.handle = wrapper.optimizer.register_step_post_hook(lambda *_: self.look(runner))

    def look(self, runner):
        self.steps += 1
        self.worst = max(self.worst, tiny.dead_weight(runner.model))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.masks.append(tiny.masks_of(runner.model))
        self.updates.setdefault(int(runner.model.pruner.last_update), runner.iter)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.worst = max(self.worst, tiny.dead_weight(runner.model))

    def after_train(self, runner):
        self.handle.remove()

    @property
    def changes(self):
        """Iterations before which the masks changed."""
        return [i for i in range(1, len(self.masks)) if tiny.same(self.masks[i - 1], self.masks[i])]


def test_epochs_update_when_due_and_exactly_at_the_end(images, tmp_path):
    pruner = {**tiny.CHEX, "interval": 2, "end": 5}
    watch = Watch()
    runner = tiny.train(tiny.classifier(images, tmp_path, pruner, epochs=6), watch)
    assert watch.updates == {-1: 0, 2: 6, 4: 12, 5: 15}  # step: first iteration after it, 3 iterations an epoch
    assert set(watch.changes) <= {6, 12, 15}
    assert watch.changes
    assert watch.worst == 0.0
    assert watch.steps == 18
    assert int(runner.model.pruner.updates) == 3
    assert 0.45 <= runner.model.pruner.status()["macs"] <= 0.5


def test_iterations_update_when_due_and_exactly_at_the_end(images, tmp_path):
    config = tiny.by_iteration(tiny.classifier(images, tmp_path), iterations=10, end=8, interval=3)
    config.default_hooks.checkpoint.interval = 100
    watch = Watch()
    runner = tiny.train(config, watch)
    assert watch.updates == {-1: 0, 3: 3, 6: 6, 8: 8}
    assert set(watch.changes) <= {3, 6, 8}
    assert watch.worst == 0.0
    assert 0.45 <= runner.model.pruner.status()["macs"] <= 0.5


def test_before_the_end_more_than_the_target_lives(images, tmp_path):
    watch = Watch()
    tiny.train(tiny.classifier(images, tmp_path, epochs=4), watch)
    live = [sum(int(m.sum()) for m in masks.values()) for masks in watch.masks]
    assert live[0] > live[-1]
    assert live[3] >= live[-1]


def test_uniform_masks_are_set_once(images, tmp_path):
    watch = Watch()
    runner = tiny.train(tiny.classifier(images, tmp_path, tiny.UNIFORM, epochs=2), watch)
    assert watch.changes == []
    assert watch.worst == 0.0
    assert 0.4 <= runner.model.pruner.status()["macs"] <= 0.5


@pytest.mark.parametrize("target", [{"params": 0.4}, {"channels": 0.5}, {"macs": "600k"}])
def test_other_budgets_are_met(target, images, tmp_path):
    pruner = {**tiny.CHEX, "target": target}
    model = tiny.train(tiny.classifier(images, tmp_path, pruner)).model
    kind, value = next(iter(target.items()))
    cost = model.pruner.cost.of(kind, model.pruner.counts())
    budget = 600_000 if kind == "macs" else value * model.pruner.cost.dense(kind)
    assert 0.9 * budget <= cost <= budget + (1 if kind == "channels" else 0)


@pytest.mark.parametrize("kind", ["maskrcnn", "ssd"])
def test_detectors(kind, coco, tmp_path):
    watch = Watch()
    model = tiny.train(getattr(tiny, kind)(coco, tmp_path), watch).model
    assert watch.worst == 0.0
    assert 0.45 <= model.pruner.status()["macs"] <= 0.5


def test_frozen_stages_frozen_statistics_and_checkpointing(coco, tmp_path):
    config = tiny.maskrcnn(coco, tmp_path)
    config.model.model.backbone.update(frozen_stages=1, norm_eval=True, with_cp=True)
    watch = Watch()
    model = tiny.train(config, watch).model
    assert watch.worst == 0.0
    assert not model.backbone.layer1[0].conv1.weight.requires_grad
    # The frozen stage is pruned like the others.
    assert not bool(model.pruner.masks["layer1.0.conv1"].all()) or not bool(model.pruner.masks["layer1.1.conv1"].all())
    assert 0.45 <= model.pruner.status()["macs"] <= 0.5


def test_the_log_has_live_channels_macs_and_the_time_left(images, tmp_path):
    runner = tiny.train(tiny.classifier(images, tmp_path))
    text = next(Path(tmp_path).glob("*/*.log")).read_text()
    line = next(line for line in text.splitlines() if "Epoch(train)" in line and "[3]" in line)
    assert re.search(r"eta: \d+:\d\d:\d\d", line)
    assert re.search(r"live_channels: 0\.\d+", line)
    assert re.search(r"macs: 0\.\d+", line)
    assert "CHEX prunes to 50 % of its MACs" in text
    assert "CHEX update 2 at step 2" in text
    assert "run tools/export.py" in text
    scalars = [
        json.loads(line)
        for line in next(Path(tmp_path).glob("*/vis_data/scalars.json")).read_text().split("\n")
        if line
    ]
    last = [entry for entry in scalars if "macs" in entry][-1]
    assert last["macs"] == pytest.approx(runner.model.pruner.status()["macs"])
    assert last["live_channels"] == pytest.approx(runner.model.pruner.status()["live_channels"])


# -- optimizers -------------------------------------------------------------------------------------------------------


@OPTIM_WRAPPERS.register_module()
class BFloat16Wrapper(OptimWrapper):
    """Automatic mixed precision as MMEngine's AmpOptimWrapper, which wants an accelerator."""

    @contextlib.contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


class Calls(Hook):
    """Counts what the pruner is told about optimizer steps."""

    def __init__(self):
        self.before, self.after, self.steps, self.iterations = 0, 0, 0, 0

    def before_train(self, runner):
        pruner, optimizer = runner.model.pruner, runner.optim_wrapper.optimizer
        original = pruner.after_step
        pruner.before_step = lambda module, optimizer: self.count("before")
        pruner.after_step = lambda module, optimizer: (self.count("after"), original(module, optimizer))
        optimizer.register_step_post_hook(lambda *_: self.count("steps"))

    def count(self, name):
        setattr(self, name, getattr(self, name) + 1)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.iterations += 1


def test_accumulated_gradients_are_one_step(images, tmp_path):
    config = tiny.classifier(images, tmp_path, epochs=4, optim_wrapper__accumulative_counts=4)
    watch, calls = Watch(), Calls()
    tiny.train(config, calls, watch)
    assert calls.iterations == 12
    assert calls.before == calls.after == calls.steps == 3
    assert watch.worst == 0.0


@pytest.mark.parametrize(
    "wrapper",
    [
        {"type": "BFloat16Wrapper"},
        {"type": "BFloat16Wrapper", "accumulative_counts": 2, "clip_grad": {"max_norm": 1.0}},
        {"clip_grad": {"max_norm": 0.1}},
        {"paramwise_cfg": {"norm_decay_mult": 0.0, "custom_keys": {"backbone.layer1": {"lr_mult": 0.1}}}},
        {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}},
        {"optimizer": {"type": "Adam", "lr": 0.01, "amsgrad": True}},
    ],
    ids=["amp", "amp-accumulate-clip", "clip", "paramwise", "sgd", "amsgrad"],
)
def test_dead_weights_stay_zero_under_any_optimizer(wrapper, images, tmp_path):
    config = tiny.classifier(images, tmp_path)
    config.optim_wrapper = {"optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.01}, **wrapper}
    watch = Watch()
    runner = tiny.train(config, watch)
    assert watch.steps > 0
    assert watch.worst == 0.0
    assert 0.45 <= runner.model.pruner.status()["macs"] <= 0.5
    groups = runner.optim_wrapper.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(runner.model.parameters()))


def test_optimizer_hooks_are_gone_after_training(images, tmp_path):
    runner = tiny.train(tiny.classifier(images, tmp_path, epochs=3))
    optimizer = runner.optim_wrapper.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


# -- criteria that look at feature maps -------------------------------------------------------------------------------


class Batches(Hook):
    """Remembers the images of every training batch."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(sum(float(image.double().sum()) for image in data_batch["inputs"]))


@pytest.mark.parametrize("kind", ["classifier", "ssd"])
def test_spatial_information_takes_no_batch_from_the_training(kind, images, coco, tmp_path):
    data = images if kind == "classifier" else coco
    seen = {}
    for criterion in ("l1", "si"):
        batches = Batches()
        pruner = {**tiny.CHEX, "criterion": criterion, **({"si_batches": 2} if criterion == "si" else {})}
        model = tiny.train(getattr(tiny, kind)(data, tmp_path / criterion, pruner), batches, Watch()).model
        seen[criterion] = batches.seen
        assert 0.45 <= model.pruner.status()["macs"] <= 0.5
    assert seen["si"] == seen["l1"]
    assert len(set(seen["l1"])) == len(seen["l1"])


def test_collecting_features_changes_neither_model_nor_random_state(images, tmp_path):
    from prune_mm.engine.features import collect_spatial_information

    runner = tiny.train(tiny.classifier(images, tmp_path, epochs=3))
    model = runner.model
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    scores = collect_spatial_information(model, runner.train_dataloader, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert tiny.same(before, model.state_dict()) == []
    assert modes == [module.training for module in model.modules()]
    assert {name: tuple(score.shape) for name, score in scores.items()} == {
        unit.name: (unit.channels,) for unit in model.pruner.units
    }
    assert all(len(module._forward_hooks) == 0 for module in model.modules())
