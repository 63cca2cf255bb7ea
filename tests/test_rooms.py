"""Imports run downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prune_mm"
TORCH_ONLY = {"mmengine", "mmdet", "mmpretrain", "mmcv"}
ALLOWED = {
    "structures": {"structures"},
    "graph": {"graph", "structures"},
    "pruners": {"pruners", "graph", "structures", "criteria", "allocation", "files", "registry"},
    "export": {"export", "files", "graph", "structures"},
    "analysis": {"analysis", "graph", "structures"},
    "backbones": {"backbones", "registry"},
    "datasets": {"datasets", "registry"},
    "evidence": {"evidence", "engine", "pruners", "analysis", "files"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_is_below_it(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imported(path):
            head, _, rest = name.partition(".")
            if head == "prune_mm" and rest:
                assert rest.split(".")[0] in ALLOWED[room], f"{path.name} imports {name}"


@pytest.mark.parametrize("room", ["graph", "structures"])
def test_graph_and_structures_know_torch_only(room):
    for path in (PACKAGE / room).rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported(path)} & TORCH_ONLY, path.name


def test_backbones_know_torch_and_mmengine_only():
    for path in (PACKAGE / "backbones").rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported(path)} & (TORCH_ONLY - {"mmengine"}), path.name


def test_the_graph_works_where_mmengine_is_not_installed():
    code = (
        "import sys; sys.modules['mmengine'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.startswith('mmengine') else find(name, *a)\n"
        "import torch, prune_mm; from prune_mm.graph import trace\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3))\n"
        "print(len(trace(net, torch.randn(1, 3, 8, 8)).prunable))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "1", result.stderr
