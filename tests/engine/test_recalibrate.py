"""Statistics of batch norm estimated again: the numbers, whom they reach, and what they are worth after a cut."""

from __future__ import annotations

import copy
import json
import re
from multiprocessing import get_context

import pytest
import tiny
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from prune_mm.engine.compact import compact_model
from prune_mm.engine.exporter import export
from prune_mm.engine.recalibrate import RecalibrateBN, recalibrate, recalibrate_by_config, training_loader


class Network(BaseModel):
    """Two normalised layers, dropout between them, and one norm that nothing runs through."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 4, 3), norm(4)
        self.dropout = nn.Dropout(0.5)
        self.second, self.second_norm = nn.Conv2d(4, 5, 3), norm(5)
        self.spare = norm(2)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = torch.stack(inputs) if isinstance(inputs, list) else inputs
        x = self.second_norm(self.second(self.dropout(self.first_norm(self.first(x)).relu())))
        return {"loss": x.mean()} if mode == "loss" else x


def batches(count=3, size=4):
    torch.manual_seed(0)
    return [{"inputs": 3.0 * torch.rand(size + number, 3, 8, 8) + number} for number in range(count)]


def touched(model):
    """The model after some training, so that its statistics are of something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(torch.rand(buffer.shape) + 0.5 if buffer.dtype.is_floating_point else torch.tensor(7))
    return model


def by_hand(model, data):
    """Means of the batches' means and unbiased variances, in float64; each norm divides by what its own batch has."""
    model, sums = copy.deepcopy(model).double(), {}
    for batch in data:
        x = batch["inputs"].double()
        for layer, norm in (("first", model.first_norm), ("second", model.second_norm)):
            x = getattr(model, layer)(x)
            mean, centred = x.mean((0, 2, 3)), x - x.mean((0, 2, 3), keepdim=True)
            total = centred.square().sum((0, 2, 3))
            count = x.numel() / x.shape[1]
            sums.setdefault(layer, []).append((mean, total / (count - 1)))
            x = centred / (total / count + norm.eps).sqrt().view(1, -1, 1, 1)
            x = (x * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)).relu()
    return {layer: [torch.stack(values).mean(0).float() for values in zip(*pairs)] for layer, pairs in sums.items()}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_the_numbers_are_those_of_a_hand_computation(norm):
    model, data = touched(Network(norm)), batches()
    expected, before = by_hand(model, data), copy.deepcopy(model.state_dict())
    model.train()
    found = recalibrate(model, data, 3)
    for layer, (mean, variance) in expected.items():
        layer = getattr(model, f"{layer}_norm")
        torch.testing.assert_close(layer.running_mean, mean.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var, variance.detach(), rtol=1e-5, atol=1e-6)
        assert layer.num_batches_tracked == 3
        assert layer.momentum == 0.1
    # A layer that no batch reaches keeps what it had, and so does everything that is no statistic.
    changed = tiny.same(before, model.state_dict())
    assert {name.rpartition(".")[0] for name in changed} == {"first_norm", "second_norm"}
    assert not any(name.endswith(("weight", "bias")) for name in changed)
    assert str(found) == "2 batch norm layers over 3 batches (1 unused kept theirs)"
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_short_loader_is_read_again():
    once, twice, data = touched(Network()), touched(Network()), batches(2)
    twice.load_state_dict(once.state_dict())
    recalibrate(once, [*data, *data, data[0]], 5)
    recalibrate(twice, data, 5)
    assert tiny.same(once.state_dict(), twice.state_dict()) == []


def test_frozen_layers_stay_unless_asked():
    model, data = touched(Network()), batches()
    model.first_norm.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    found = recalibrate(model, data, 2)
    assert (found.layers, found.frozen, found.unused) == (1, 1, 1)
    assert not any(name.startswith("first") for name in tiny.same(before, model.state_dict()))
    assert recalibrate(model, data, 2, include_frozen=True).frozen == 0
    assert "first_norm.running_mean" in tiny.same(before, model.state_dict())


def test_frozen_stages_of_a_detector(coco, tmp_path):
    """MMDetection's two ways to freeze: stages, and ``norm_eval`` for all norms of a backbone."""
    config = tiny.maskrcnn(coco, tmp_path, None, model__backbone__frozen_stages=1)
    model = tiny.build(config).model
    before = copy.deepcopy(model.state_dict())
    found = recalibrate_by_config(model, config, 2)
    changed = {name.removesuffix(".running_var") for name in tiny.same(before, model.state_dict()) if "_var" in name}
    frozen = ("backbone.bn1", "backbone.layer1.")
    expected = {
        name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not name.startswith(frozen)
    }
    assert changed == expected
    assert (found.layers, found.frozen) == (len(expected), 5)
    model.backbone.norm_eval = True
    with pytest.raises(ValueError, match=r"all 20 batch norm layers of MaskRCNN are frozen .*--recalibrate-frozen"):
        recalibrate_by_config(model, config, 2)
    assert recalibrate_by_config(model, config, 1, include_frozen=True).layers == 20


@pytest.mark.parametrize("number", [0, -3, 1.5, True])
def test_a_number_of_batches_that_is_none(number):
    with pytest.raises(ValueError, match=re.escape(f"batches={number!r} must be a whole number of at least 1")):
        recalibrate(Network(), batches(), number)
    with pytest.raises(ValueError, match=re.escape(f"batches={number!r} must be a whole number of at least 1")):
        RecalibrateBN(number)


def test_what_cannot_be_estimated_is_refused_and_leaves_the_model_as_it_was():
    class Plain(Network):
        def __init__(self):
            super().__init__(nn.InstanceNorm2d)

    with pytest.raises(ValueError, match="Plain has no batch norm layer with running statistics"):
        recalibrate(Plain(), batches(), 1)
    model = touched(Network())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the training data loader yields no batch"):
        recalibrate(model, [], 1)
    with pytest.raises(ValueError, match="batch norm layer 'first_norm' sees numbers that are not finite"):
        recalibrate(model, [{"inputs": torch.full((2, 3, 8, 8), float("nan"))}], 1)
    assert tiny.same(before, model.state_dict()) == []
    assert model.first_norm.momentum == 0.1


def rank_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = touched(Network())
    recalibrate(model, batches(4)[rank::2], 2)
    torch.save(model.state_dict(), f"{folder}/rank{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_ranks_estimate_what_one_does_with_all_batches(tmp_path):
    context = get_context("forkserver")
    ranks = [context.Process(target=rank_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    torch.manual_seed(0)
    alone = touched(Network())
    recalibrate(alone, batches(4), 4)
    assert tiny.same(first, second) == []
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6)


# -- a cut network ----------------------------------------------------------------------------------------------------


def classifier(data, work_dir, pruner, epochs):
    """The tiny classifier with a few hundred images and a learning rate that it learns with."""
    config = tiny.classifier(data, work_dir, pruner, epochs=epochs)
    for name in ("train", "val", "test"):
        config[f"{name}_dataloader"].dataset.make = {"train_per_class": 100, "val_per_class": 30, "size": 32}
        config[f"{name}_dataloader"].batch_size = 30
    del config.train_dataloader.dataset.pipeline[1]
    config.optim_wrapper.optimizer.lr = 5e-3
    config.param_scheduler = [{"type": "CosineAnnealingLR", "by_epoch": True, "T_max": epochs}]
    return config


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Config and checkpoint of a network that was trained, then cut to 70 % of its MACs, then left alone."""
    folder = tmp_path_factory.mktemp("cut")
    data = folder / "images"
    tiny.train(classifier(data, folder / "dense", None, 8))
    config = classifier(data, folder / "cut", {**tiny.UNIFORM, "target": {"macs": 0.7}}, 1)
    config.load_from = str(folder / "dense/epoch_8.pth")
    runner = tiny.build(config, Cut())
    with pytest.raises(StopIteration):
        runner.train()
    return config, folder / "cut/cut.pth"


class Cut(Hook):
    """Saves the checkpoint of a network that has not trained since it was cut."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        runner.save_checkpoint(runner.work_dir, "cut.pth", save_optimizer=False)
        raise StopIteration


@torch.no_grad()
def evaluated(config, model):
    """Loss and accuracy on the validation images."""
    model.eval()
    loss = right = count = 0
    for batch in Runner.build_dataloader(config.val_dataloader):
        data = model.data_preprocessor(batch)
        logits, truth = model(data["inputs"]), torch.cat([sample.gt_label for sample in data["data_samples"]])
        loss += float(nn.functional.cross_entropy(logits, truth, reduction="sum"))
        right += int((logits.argmax(1) == truth).sum())
        count += len(truth)
    return loss / count, right / count


def load(config, artifact):
    return compact_model(config.model.model, str(artifact / "compact.pth"), None, config.data_preprocessor)


def test_a_freshly_cut_network_gets_its_accuracy_back(cut, tmp_path):
    config, checkpoint = cut
    plain = export(config, checkpoint, tmp_path / "plain")
    report = export(config, checkpoint, tmp_path / "again", recalibrate=15)
    assert "recalibrated" not in plain
    assert report["recalibrated"] == {"batches": 15, "layers": 20, "frozen": 0, "unused": 0}
    assert json.loads((tmp_path / "again/report.json").read_text()) == report
    assert report["law_relative_difference"] == plain["law_relative_difference"]
    models = [load(config, tmp_path / name) for name in ("plain", "again")]
    (loss, accuracy), (loss_again, accuracy_again) = (evaluated(config, model) for model in models)
    assert loss_again < loss - 0.05
    assert accuracy_again > accuracy
    changed = tiny.same(*(model.state_dict() for model in models))
    assert changed
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in changed)


def test_the_artifact_holds_the_statistics_bit_by_bit(cut, tmp_path):
    """What is in the file is what the function estimates on the small model, now and when exported again."""
    config, checkpoint = cut
    export(config, checkpoint, tmp_path / "plain")
    export(config, checkpoint, tmp_path / "again", recalibrate=3)
    model = load(config, tmp_path / "plain")
    recalibrate(model, training_loader(config, config.randomness.seed), 3, seed=config.randomness.seed)
    written = load(config, tmp_path / "again")
    assert tiny.same(model.state_dict(), written.state_dict()) == []
    assert tiny.same(torch.load(tmp_path / "again/compact.pth")["state_dict"], written.state_dict()) == []


def test_the_tool(cut, tmp_path):
    config, checkpoint = cut
    path = tiny.write(config, tmp_path / "cut.py")
    done = tiny.tool(tmp_path, "export.py", path, checkpoint, tmp_path / "small", "--recalibrate", 2)
    assert done.status == 0, done
    assert "batch norm re-calibrated: 20 layers, 2 batches" in done.out
    alone = tiny.tool(tmp_path, "export.py", path, checkpoint, tmp_path / "none", "--recalibrate-frozen")
    assert alone.one_line_error == "--recalibrate-frozen needs --recalibrate N"
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="recalibrate=0 must be a whole number of at least 1"):
        export(config, checkpoint, tmp_path / "none", recalibrate=0)
    config = copy.deepcopy(config)
    config.train_dataloader = None
    with pytest.raises(ValueError, match="the config has no train_dataloader"):
        export(config, checkpoint, tmp_path / "none", recalibrate=1)
    assert not (tmp_path / "none").exists()


# -- the hook ---------------------------------------------------------------------------------------------------------


class Watch(Hook):
    """Statistics that each validation sees, and the state of the model around it."""

    priority = "VERY_LOW"

    def __init__(self):
        self.during, self.before, self.after = [], [], []

    def state(self, runner):
        return copy.deepcopy(runner.model.state_dict())

    def before_val(self, runner):
        self.before.append(self.state(runner))

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.during.append(self.state(runner))

    def after_val(self, runner):
        self.after.append(self.state(runner))


@pytest.mark.parametrize("averaged", [False, True])
def test_validation_sees_new_statistics_and_training_goes_on_with_its_own(averaged, images, tmp_path):
    def trained(name, *more, watch=()):
        config = tiny.classifier(images, tmp_path / name, epochs=3, train_cfg__val_interval=1)
        average = [{"type": "EMAHook", "momentum": 0.2, "update_buffers": True}] if averaged else []
        config.custom_hooks = [*config.custom_hooks, *average, *more]
        runner = tiny.train(config, *watch)
        hook = next((hook for hook in runner.hooks if isinstance(hook, EMAHook)), None)
        average = hook.ema_model.state_dict() if hook else {}
        return torch.load(tmp_path / name / "epoch_3.pth", weights_only=False), average

    watch = Watch()
    plain, plain_average = trained("plain")
    with_hook, average = trained("hook", {"type": "prune_mm.RecalibrateBN", "batches": 2}, watch=[watch])
    assert tiny.same(plain["state_dict"], with_hook["state_dict"]) == []
    assert tiny.same(plain_average, average) == []
    assert len(watch.during) >= 3
    for before, after in zip(watch.before, watch.after):
        assert tiny.same(before, after) == []
    changed = tiny.same(watch.before[0], watch.during[0])
    assert any(name.endswith("running_mean") for name in changed)
    if averaged:
        assert tiny.same(plain["ema_state_dict"], with_hook["ema_state_dict"]) == []
        # It is the averaged weights that are evaluated.
        assert any(name.endswith("conv1.weight") for name in changed)
    else:
        assert all("running" in name or "num_batches" in name for name in changed)


def test_testing_a_masked_checkpoint(cut, tmp_path):
    config, checkpoint = cut
    results = []
    for hooks in ([], [{"type": "prune_mm.RecalibrateBN", "batches": 10}]):
        config = copy.deepcopy(config)
        config.load_from, config.work_dir = str(checkpoint), str(tmp_path)
        config.custom_hooks = [*config.custom_hooks, *hooks]
        runner = tiny.build(config)
        metrics = runner.test()
        results.append((metrics["accuracy/top1"], runner.model.state_dict()))
    assert results[1][0] > results[0][0]
    assert tiny.same(results[0][1], results[1][1]) == []
