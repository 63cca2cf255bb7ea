"""tools/cut.py: needs a method that cuts, and a free name."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from prune_mm.registry import MODELS

ROOT = Path(__file__).resolve().parents[2]


def test_cutting_needs_a_method_that_cuts_and_a_free_name(tmp_path):
    folder, dense = ROOT / "configs/evidence/digits_resnet20", tmp_path / "dense.pth"
    init_default_scope("mmpretrain")
    torch.save({"state_dict": MODELS.build(Config.fromfile(folder / "dense.py").model).state_dict()}, dense)
    end = tiny.tool(tmp_path, "cut.py", folder / "strucspars.py", dense, tmp_path / "cut.pth")
    assert "StrucSpars steers a training" in end.one_line_error
    end = tiny.tool(tmp_path, "cut.py", folder / "uniform.py", dense, tmp_path / "cut.pth")
    assert "live channels 50.0%" in end.out
    end = tiny.tool(tmp_path, "cut.py", folder / "uniform.py", dense, tmp_path / "cut.pth")
    assert "cut.pth' exists; choose another file" in end.one_line_error
