"""What the documents show runs as shown."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torchvision
from mmengine.config import Config
from mmengine.registry import init_default_scope

from prune_mm.engine.compact import without_pretrained
from prune_mm.engine.prunable import build_pruner
from prune_mm.graph import trace
from prune_mm.registry import MODELS, PRUNERS

ROOT = Path(__file__).parents[1]


def python_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.S)


def test_the_config_in_the_readme_builds(tmp_path):
    config = next(block for block in python_blocks("README.md") if "_base_" in block)
    path = tmp_path / "my_config.py"
    path.write_text(config)
    loaded = Config.fromfile(path)
    init_default_scope(loaded.default_scope)
    model = MODELS.build(without_pretrained(loaded.model))
    assert type(model).__name__ == "MaskRCNN"
    assert model.pruner.target.value == 0.5
    assert loaded.custom_hooks == [{"type": "prune_mm.PruningHook"}]


def test_the_graph_example_in_the_readme_prints_groups(capsys):
    exec(next(block for block in python_blocks("README.md") if "trace(" in block), {})
    shown = capsys.readouterr().out
    assert "38 channel groups" in shown
    assert "FROZEN: output of the traced scope" in shown


def test_the_plan_in_the_design_notes_keeps_the_law():
    names: dict = {}
    exec(next(block for block in python_blocks("docs/design.md") if "ShortcutSlice" in block), names)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected, found, dense = (names[name](x) for name in ("masked", "small", "net"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense, expected, rtol=1e-2, atol=1e-2)
    sizes = [sum(p.numel() for p in names[name].parameters()) for name in ("small", "net")]
    assert sizes[0] < sizes[1]


def test_the_method_in_the_design_notes_prunes():
    names: dict = {}
    exec(next(block for block in python_blocks("docs/design.md") if "HalfOfEverything" in block), names)
    try:
        module = torchvision.models.resnet18()
        graph = trace(module, torch.randn(1, 3, 64, 64))
        pruner = names["HalfOfEverything"]({"macs": 0.9})
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        pruner.prepare(module, graph, shapes, dict.fromkeys(graph.weights, 1))
        pruner.commit(module, pruner.start(module), 0)
        assert pruner.status()["live_channels"] == 0.5
    finally:
        PRUNERS._module_dict.pop("HalfOfEverything", None)


def test_the_options_in_the_notes_on_methods_exist():
    lines = [line for block in python_blocks("docs/methods.md") for line in block.splitlines()]
    pruners = [line for line in lines if line.startswith("pruner ")]
    shown = {name for line in pruners for name in re.findall(r'type="(\w+)"', line)}
    assert shown >= {"CHEX", "StrucSpars", "GConvPrune", "Hinge", "OneByN"}
    for line in pruners:
        names: dict = {}
        exec(line, names)
        build_pruner(names["pruner"])
