"""mmcv's operators for the tests of them, which are skipped where those are not ours."""

import pytest
import torch

from prune_mm.compat import install_mmcv_ops

if not install_mmcv_ops():
    pytest.skip("mmcv is absent, or has its own compiled operators", allow_module_level=True)

import mmcv.ops as ops
from mmcv.utils import ext_loader

__all__ = ["DOUBLE", "ext_loader", "ops"]

DOUBLE = torch.float64
