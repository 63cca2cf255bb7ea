"""docs/matrix.md says what the configs give."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from prune_mm.analysis.complexity import measure_complexity
from prune_mm.engine.exporter import build_prunable
from prune_mm.engine.prunable import pruned_module
from prune_mm.registry import MODELS
from prune_mm.structures import Plan
from prune_mm.structures.plan import count_macs

ROOT = Path(__file__).parents[1]
METHODS = ("chex", "strucspars", "gconv", "hinge", "onexn")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_matrix

    return make_matrix


@pytest.fixture
def lines():
    return (ROOT / "docs" / "matrix.md").read_text().splitlines()


def test_every_method_is_there_on_every_task_with_its_demo(tool, lines):
    for task, cells in tool.TASKS.items():
        assert {name.split("_")[0] for name in cells} == set(METHODS), task
        for name, demo in cells.items():
            assert demo.startswith(f"{name.split('_')[0]}_")
            for link in (f"[`{name}`](../configs/{name}.py)", f"[`demo/{demo}`](../configs/demo/{demo}.py)"):
                rows = [row for row in lines if row.startswith(f"| {link} ")]
                assert [row.count("|") for row in rows] == [8, 5], f"{link}: one line of costs and one of training"


def test_every_link_leads_somewhere(lines):
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(lines))
    assert len(set(links)) >= 31
    assert all((ROOT / "docs" / link).is_file() for link in links)


@pytest.mark.parametrize(
    "name", ["demo/strucspars_resnet18", "demo/hinge_ssd", "demo/onexn_maskrcnn", "gconv_resnet50"]
)
def test_a_config_gives_its_lines(tool, lines, name):
    cell = tool.build(name)
    for line in (cell.cost_line(), cell.training_line(), *(f"* {note}" for note in cell.notes())):
        assert line in lines, "run `python docs/make_matrix.py`"


def test_published_numbers_are_the_file_s_and_tagged(tool, lines):
    published = tool.json.loads(tool.PUBLISHED.read_text())
    assert list(published) == list(tool.TASKS)
    for entries in published.values():
        assert all(row in lines for row in tool.published_lines(entries)), "run `python docs/make_matrix.py`"
        assert {entry["method"].lower()[:5] for entry in entries} == {"chex", "struc", "gconv", "hinge", "oneby"}
        for entry in entries:
            for number in (entry["cost"], entry["result"]):
                assert number is None or number == "not at hand" or "(paper)" in number


def pruned(name: str, **options: object) -> tuple[Config, Plan, torch.nn.Module]:
    """A config with some options of its pruner changed, what that decides about random weights, and the backbone."""
    config = Config.fromfile(ROOT / "configs" / f"{name}.py")
    config.model.pruner.update(options)
    torch.manual_seed(0)
    model = build_prunable(config)
    module, pruner = pruned_module(model), model.pruner
    pruner.set_schedule(config.train_cfg.max_epochs, 1000)
    pruner.commit(module, pruner.start(module), 0)
    if "chex" in name:
        pruner.commit(module, pruner.decide(module, pruner.end), pruner.end)
    plan = Plan("", tuple(tuple(stage) for stage in pruner.stages()))
    return config, plan, module


@pytest.mark.parametrize(
    ("name", "options", "exact"),
    [
        ("demo/gconv_ssd", {}, True),
        ("demo/onexn_ssd", {}, True),
        ("demo/onexn_mobilenet", {}, False),
        ("demo/chex_ssd", {"allocation": "uniform"}, True),
    ],
)
def test_what_is_announced_is_what_is_left(tool, name, options, exact, tmp_path):
    config, plan, module = pruned(name, **options)
    config.dump(tmp_path / "config.py")
    cell = tool.build(name, tmp_path / "config.py")
    shapes = plan.shapes({key: tuple(p.shape) for key, p in module.named_parameters()})
    left = {
        "macs": count_macs(shapes, plan.positions(cell.cost.positions)),
        "params": sum(map(math.prod, shapes.values())),
    }
    for kind, count in left.items():
        span = getattr(cell.goal, kind)
        if exact:
            assert (span.low, span.high) == (count, count)
        elif span is not None:
            assert (span.low or 0) < count < span.high


def test_the_dense_cost_is_that_of_the_whole_model(tool):
    cell = tool.build("demo/chex_ssd")
    init_default_scope(cell.config.default_scope)
    dense = MODELS.build(cell.config.model.model)
    whole = measure_complexity(dense, example_inputs=torch.zeros(1, 3, *[cell.config.model.input_size] * 2))
    assert sum(cell.cost.macs.values()) == whole.macs
    assert sum(cell.cost.params.values()) == whole.params
