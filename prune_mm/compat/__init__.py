"""mmcv's operators without compiling mmcv."""

from .mmcv_ext import install_mmcv_ops

__all__ = ["install_mmcv_ops"]
