"""Structured pruning for OpenMMLab models."""

from prune_mm.compat import install_mmcv_ops

__version__ = "0.1.0"

install_mmcv_ops()
