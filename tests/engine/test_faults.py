"""What is lost when a process dies, a disk fills up, data is damaged or a loss breaks down: nothing that was saved."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from methods import PRUNERS, config_of, sabotaged
from mmengine.hooks import CheckpointHook, Hook
from test_distributed import two_processes

from prune_mm.engine.checkpointing import AtomicBackend, SafeCheckpointHook
from prune_mm.engine.failures import OVERFLOWS, BrokenTraining, LossWatch

HERE = Path(__file__).parent
EPOCHS = 5
#: Deaths in a row, and how often that is tried; ``make stress`` asks for more.
STRESS = int(os.environ.get("PRUNE_MM_STRESS", "0"))


def losses_of(folder):
    """Loss per iteration; what a resumed run did again counts."""
    found = {}
    for path in sorted(Path(folder).glob("*/vis_data/scalars.json"), key=lambda path: path.parent.parent.name):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
        found |= {line["step"]: line["loss"] for line in lines if "loss" in line}
    return found


def last_state(folder):
    from prune_mm.engine.launch import latest_checkpoint

    return torch.load(latest_checkpoint(folder), weights_only=False)


def run(config, folder, *words, name="train.py"):
    # Runs within one second would share a log folder.
    return tiny.tool(folder, "train.py", tiny.write(config, folder / name), *words, PYTHONPATH=HERE)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Events, losses and end of the uninterrupted run of a method."""
    ends = {}

    def end(method):
        if method not in ends:
            folder = tmp_path_factory.mktemp(f"whole_{method}")
            config = config_of(method, images, folder / "run", EPOCHS)
            config.default_hooks.checkpoint.max_keep_ckpts = 1
            done = run(sabotaged(config, type="DieAtEvent", number=0, log=str(folder / "events")), folder)
            assert done.status == 0, done
            events = (folder / "events").read_text().splitlines()
            ends[method] = len(events), losses_of(folder / "run"), last_state(folder / "run")
        return ends[method]

    return end


@pytest.mark.parametrize("seed", range(max(1, STRESS)))
@pytest.mark.parametrize("method", PRUNERS)
def test_killed_anywhere_twice(method, seed, images, whole, tmp_path):
    """With one checkpoint kept, a process that dies at two random events ends where an uninterrupted one ends."""
    events, losses, end = whole(method)
    config = config_of(method, images, tmp_path / "run", EPOCHS)
    config.default_hooks.checkpoint.max_keep_ckpts = 1
    draw = random.Random(f"{method}{seed}")
    for number in (draw.randint(1, events), draw.randint(1, events // 2)):
        deadly = sabotaged(config, type="DieAtEvent", number=number, log=str(tmp_path / "events"))
        died = run(deadly, tmp_path, "--resume", name="deadly.py")
        assert died.status in (-signal.SIGKILL, 0), died
    resumed = run(config, tmp_path, "--resume")
    where = (tmp_path / "events").read_text().splitlines()[-3:]
    assert resumed.status == 0, (where, resumed)
    found = last_state(tmp_path / "run")
    assert tiny.same(found["state_dict"], end["state_dict"]) == [], where
    assert found["meta"]["iter"] == end["meta"]["iter"]
    again = losses_of(tmp_path / "run")
    assert {step: again[step] for step in losses if step in again} == pytest.approx(
        {step: loss for step, loss in losses.items() if step in again}, rel=1e-5
    )
    assert max(losses) in again
    left = sorted(path.name for path in (tmp_path / "run").glob("*.pth"))
    assert left, where


@pytest.fixture(scope="module")
def of_two(images, tmp_path_factory):
    """End of an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("of_two")
    config = config_of("chex", images, folder / "run", EPOCHS)
    config.train_dataloader.batch_size = 8
    assert [end.status for end in two_processes(config, folder)] == [0, 0]
    return last_state(folder / "run")["state_dict"]


@pytest.mark.parametrize(("event", "number"), [("after decide", 2), ("half a write", 3)])
def test_a_rank_that_is_killed_ends_all_and_both_go_on(event, number, images, of_two, tmp_path):
    """Between the decision of rank 0 and its broadcast, and inside a checkpoint."""
    config = config_of("chex", images, tmp_path / "run", EPOCHS)
    config.train_dataloader.batch_size = 8
    deadly = sabotaged(config, type="DieAtEvent", number=number, only=event, log=str(tmp_path / "events"))
    died = two_processes(deadly, tmp_path)
    assert died[0].status == -signal.SIGKILL, died
    assert died[1].status not in (0, None), died
    resumed = two_processes(config, tmp_path, "--resume")
    assert [end.status for end in resumed] == [0, 0], resumed
    both = last_state(tmp_path / "run")["state_dict"], of_two
    decided = [{k: v for k, v in s.items() if k.startswith("pruner.") and v.dtype == torch.bool} for s in both]
    assert decided[0]
    assert tiny.same(*decided) == []
    # Running statistics of rank 1 are not in the checkpoint; weights do not depend on them.
    weights = [{k: v for k, v in s.items() if k.endswith("weight") and "pruner" not in k} for s in both]
    assert tiny.same(*weights) == []


@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk(keep, images, tmp_path):
    config = config_of("chex", images, tmp_path / "run", EPOCHS)
    config.default_hooks.checkpoint.max_keep_ckpts = keep
    end = run(sabotaged(config, type="FillDisk", epoch=2, size=400_000), tmp_path)
    message = end.one_line_error
    assert "no room to write" in message
    assert "epoch_3.pth" in message
    assert "--resume" in message
    kept = {f"epoch_{epoch}.pth" for epoch in range(3 - keep, 3)}
    assert {path.name for path in (tmp_path / "run").glob("*.pth*")} == kept
    assert not list((tmp_path / "run").glob(".epoch*"))
    resumed = run(config, tmp_path, "--resume")
    assert resumed.status == 0, resumed
    assert "resumed epoch: 2" in resumed.out + resumed.err


def test_the_best_checkpoint_goes_only_when_a_better_one_is_whole(images, tmp_path):
    config = config_of("chex", images, tmp_path / "run", EPOCHS)
    config.train_cfg.val_interval = 1
    config.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=1, save_best="accuracy/top1", rule="less")
    # Removals, and what was whole when they happened.
    seen = []

    class Watching(AtomicBackend):
        def remove(self, path):
            seen.append((Path(path).name, sorted(file.name for file in Path(path).parent.glob("*.pth"))))
            super().remove(path)

    class Watch(Hook):
        def before_train(self, runner):
            (hook,) = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
            assert type(hook) is SafeCheckpointHook
            hook.file_backend = Watching()

        def before_val_epoch(self, runner):
            # Better and better, whatever was learned.
            runner.val_loop.evaluator.evaluate = lambda size: {"accuracy/top1": -float(runner.epoch)}

    tiny.train(config, Watch())
    assert [gone for gone, _ in seen if gone.startswith("best")] == [
        f"best_accuracy_top1_epoch_{n}.pth" for n in (1, 2, 3, 4)
    ]
    for gone, whole in seen:
        number = int(gone.rpartition("_")[2].removesuffix(".pth"))
        assert gone.replace(f"_{number}.", f"_{number + 1}.") in whole
    left = {path.name for path in (tmp_path / "run").glob("*.pth")}
    assert left == {f"epoch_{EPOCHS}.pth", f"best_accuracy_top1_epoch_{EPOCHS}.pth"}


def test_losses_that_overflow_in_mixed_precision_are_skipped_ten_times():
    def runner(loss, **wrapper):
        scalars = {"train/loss": SimpleNamespace(current=lambda: loss)}
        optim = SimpleNamespace(get_lr=lambda: {"lr": [0.1]}, **wrapper)
        return SimpleNamespace(message_hub=SimpleNamespace(log_scalars=scalars), optim_wrapper=optim, iter=6)

    watch, outputs = LossWatch(), {"loss": None}
    for _ in range(OVERFLOWS):
        watch.check(runner(float("inf"), loss_scaler=None), outputs)
    watch.check(runner(1.0, loss_scaler=None), outputs)
    for _ in range(OVERFLOWS):
        watch.check(runner(float("nan"), loss_scaler=None), outputs)
    with pytest.raises(BrokenTraining, match="in iteration 7: loss=nan"):
        watch.check(runner(float("nan"), loss_scaler=None), outputs)
    with pytest.raises(BrokenTraining, match=r"it is 0\.1"):
        LossWatch().check(runner(float("inf")), outputs)


def test_a_loss_that_is_not_a_number(images, tmp_path):
    config = config_of("chex", images, tmp_path / "run", EPOCHS)
    config.param_scheduler = []
    config.optim_wrapper.optimizer.lr = 1e30
    message = run(config, tmp_path).one_line_error
    assert "the training broke down in iteration" in message
    assert "loss=nan" in message or "loss=inf" in message
    assert "it is 1e+30" in message
    assert not list((tmp_path / "run").glob("*.pth"))


def test_broken_weights_are_not_saved_over_good_ones(images, tmp_path):
    config = config_of("chex", images, tmp_path / "run", EPOCHS)
    config.default_hooks.checkpoint.max_keep_ckpts = 1
    message = run(sabotaged(config, type="BreakWeight", epoch=2), tmp_path).one_line_error
    assert "holds NaN or infinity, so saving them over good ones is refused" in message
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["epoch_2.pth"]


def test_nothing_is_decided_by_broken_weights(images, tmp_path):
    config = config_of("chex", images, tmp_path / "run", EPOCHS)
    config.default_hooks.checkpoint.interval = 100
    message = run(sabotaged(config, type="BreakWeight", epoch=1), tmp_path).one_line_error
    assert "so deciding by them what to prune is refused" in message


@pytest.mark.parametrize("content", [b"", b"no image"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image(content, workers, images, tmp_path, trained):
    trained("classifier")  # makes the images
    data = tmp_path / "data"
    shutil.copytree(images, data)
    victim = sorted(data.rglob("train/**/*.png"))[5]
    victim.write_bytes(content)
    config = config_of("chex", data, tmp_path / "run", EPOCHS)
    config.train_dataloader.update(num_workers=workers)
    message = run(config, tmp_path).one_line_error
    assert str(victim) in message
    assert "cannot be read" in message


def test_a_data_worker_that_dies(images, tmp_path):
    config = config_of("chex", images, tmp_path / "run", EPOCHS)
    config.train_dataloader.update(num_workers=1)
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    config.train_dataloader.dataset.pipeline.append({"type": "DieInWorker"})
    message = run(config, tmp_path).one_line_error
    assert "a data worker died" in message
    assert "num_workers" in message


@pytest.mark.parametrize("rename", [1, 2, 3, 4])
def test_an_export_that_is_killed(rename, trained, tmp_path):
    """Whatever rename it dies before: compact.pth, the old artifact aside, the new one into its place, none."""
    config, checkpoint = trained("classifier")
    path, out = tiny.write(config, tmp_path / "train.py"), tmp_path / "small"
    assert tiny.tool(tmp_path, "export.py", path, checkpoint, out).status == 0
    (out / "report.html").write_text("mine")
    died = tiny.tool(tmp_path, HERE / "deadly_export.py", rename, path, checkpoint, out, "--overwrite")
    assert died.status == (0 if rename == 4 else -signal.SIGKILL), died
    if rename < 3:
        assert (out / "report.html").read_text() == "mine"
    again = tiny.tool(tmp_path, "export.py", path, checkpoint, out)
    assert "already holds an artifact" in again.one_line_error
    assert {"compact.pth", "config.py", "report.json"} <= {item.name for item in out.iterdir()}
    assert (out / "report.html").exists() == (rename < 4)
    assert tiny.tool(tmp_path, "export.py", path, checkpoint, out, "--overwrite").status == 0
    assert tiny.tool(tmp_path, "test.py", out / "config.py", out / "compact.pth").status == 0
