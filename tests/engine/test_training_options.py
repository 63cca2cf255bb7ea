"""MMEngine's options for distributed and faster training: each runs with pruning, or is refused before the run."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.runner import FlexibleRunner
from test_distributed import config_of, processes, pruner_state, state

from prune_mm.engine.training_options import check_training_options

DDP = {"type": "MMDistributedDataParallel", "broadcast_buffers": False}
STRUC = {"type": "StrucSpars", "target": {"macs": 0.6}, "warmup": 0, "interval": 2, "delta": 0.01, "threshold": 0.3}
EMA = [{"type": "EMAHook", "momentum": 0.2}]
OPTIONS = {
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"model_wrapper_cfg": {**DDP, "static_graph": True}},
    "with_cp and static_graph": {
        "model.model.backbone.with_cp": True,
        "model_wrapper_cfg": {**DDP, "static_graph": True},
    },
    "gradient buckets": {"model_wrapper_cfg": {**DDP, "gradient_as_bucket_view": True}, "model.pruner": STRUC},
    "accumulation": {"optim_wrapper.accumulative_counts": 2},
    "average, buffers from rank 0": {
        "custom_hooks": EMA,
        "model_wrapper_cfg": {**DDP, "broadcast_buffers": True},
    },
}


def changed(config, options):
    """The config with options by dotted name; hooks are added."""
    options = dict(options)
    hooks = options.pop("custom_hooks", [])
    config.model.pruner = options.pop("model.pruner", config.model.pruner)
    config.merge_from_dict(options)
    config.custom_hooks = [*hooks, *config.custom_hooks]
    return config


def assert_dead_rows_are_zero(state):
    """Rows of a layer that its mask has killed."""
    masks = {name.removeprefix("pruner.masks."): m for name, m in state.items() if name.startswith("pruner.masks.")}
    assert masks
    for name, mask in masks.items():
        weight = state[f"backbone.{name.replace('/', '.')}.weight"]
        assert not weight[~mask].any(), name
        assert weight[mask].any(), name


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes(name, images, tmp_path):
    config = changed(config_of(images, tmp_path), OPTIONS[name])
    ends = processes(2, config, tmp_path)
    assert [end.status for end in ends] == [0, 0], ends
    a, b = (state(tmp_path, rank, 2) for rank in (0, 1))
    assert tiny.same(pruner_state(a), pruner_state(b)) == []
    weights = [key for key in a if key.endswith("weight") and not key.startswith("pruner.")]
    assert tiny.same({k: a[k] for k in weights}, {k: b[k] for k in weights}) == []
    if name != "gradient buckets":
        assert int(a["pruner.updates"]) == 2
        assert_dead_rows_are_zero(a)


def test_compiled(images, tmp_path):
    """``compile=...`` compiles the step; decisions and masks are those of the ordinary run.

    The backend that runs the captured graphs as they are: the default one generates C++ or Triton for a minute first.
    """
    ends = {}
    for name in ("ordinary", "compiled"):
        config = tiny.classifier(images, tmp_path / name)
        if name == "compiled":
            config.compile = {"backend": "eager"}
        model = tiny.train(config).model
        assert tiny.dead_weight(model) == 0.0
        ends[name] = model.state_dict()
    assert tiny.same(*(pruner_state(end) for end in ends.values())) == []
    for key, tensor in ends["ordinary"].items():
        torch.testing.assert_close(ends["compiled"][key], tensor, rtol=1e-3, atol=1e-4, msg=key)


# -- refused ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "flexible runner": (
        {"runner_type": "FlexibleRunner", "strategy": {"type": "DeepSpeedStrategy"}},
        "runner_type='FlexibleRunner' (DeepSpeed, FSDP, ColossalAI) does not work with PruningHook",
    ),
    "sharded": (
        {"model_wrapper_cfg": {"type": "MMFullyShardedDataParallel"}},
        "model_wrapper_cfg.type='MMFullyShardedDataParallel' cuts the model into parts",
    ),
    "separate": (
        {"model_wrapper_cfg": {"type": "MMSeparateDistributedDataParallel"}},
        "model_wrapper_cfg.type='MMSeparateDistributedDataParallel' cuts the model into parts",
    ),
    "static graph with accumulation": (
        {"model_wrapper_cfg": {**DDP, "static_graph": True}, "optim_wrapper.accumulative_counts": 4},
        "static_graph=True and optim_wrapper.accumulative_counts=4 do not go together",
    ),
    "checkpointing with unused parameters": (
        {"model.model.backbone.with_cp": True, "find_unused_parameters": True},
        "find_unused_parameters=True and with_cp=True do not go together",
    ),
}
ON_CPU = {
    "sync_bn": ({"sync_bn": "torch"}, "sync_bn needs GPUs and there is none: train one process"),
    "SyncBN": (
        {"model.model.backbone.norm_cfg": {"type": "SyncBN", "requires_grad": True}},
        "norm_cfg.type='SyncBN' needs GPUs and there is none",
    ),
    "amp": (
        {"optim_wrapper.type": "AmpOptimWrapper"},
        "optim_wrapper.type='AmpOptimWrapper' needs a GPU and there is none",
    ),
}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("name", [*REFUSED, *(pytest.param(name, marks=without_gpu) for name in ON_CPU)])
def test_refused_in_a_distributed_run(name, images, tmp_path):
    options, message = (REFUSED | ON_CPU)[name]
    config = changed(tiny.classifier(images, tmp_path), options)
    config.launcher = "pytorch"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_training_options(config)


def test_the_tool_refuses_in_one_line(images, tmp_path):
    options, message = REFUSED["flexible runner"]
    path = tiny.write(changed(tiny.classifier(images, tmp_path), options), tmp_path / "train.py")
    assert message in tiny.tool(tmp_path, "train.py", path).one_line_error


def test_one_process_needs_none_of_it(images, tmp_path):
    config = changed(tiny.classifier(images, tmp_path), {"sync_bn": "torch", "find_unused_parameters": True})
    check_training_options(config)


def test_a_dense_model_may_have_any_runner(images, tmp_path):
    config = changed(Config(tiny.classifier(images, tmp_path).to_dict()), {"runner_type": "FlexibleRunner"})
    config.model = config.model.model
    check_training_options(config)


def test_the_hook_refuses_another_runner(images, tmp_path):
    """For the ``tools/train.py`` of MMDetection and MMPretrain, which do not look."""
    config = changed(tiny.classifier(images, tmp_path), {"strategy": {"type": "SingleDeviceStrategy"}})
    runner = FlexibleRunner.from_cfg(config)
    with pytest.raises(ValueError, match=re.escape("runner_type='FlexibleRunner'")):
        runner.train()


def test_another_number_of_processes_is_not_resumed_by_a_pruner_that_counts_iterations(images, tmp_path):
    tiny.train(tiny.classifier(images, tmp_path, STRUC, epochs=2))
    config = tiny.classifier(images, tmp_path, STRUC, epochs=2)
    # As two processes would have it.
    config.train_dataloader.batch_size = 32
    config.load_from, config.resume = str(tmp_path / "epoch_1.pth"), True
    with pytest.raises(
        ValueError, match="has done 3 iterations in 1 epochs, and here an epoch has 2; the pruner counts"
    ):
        tiny.train(config)
