"""Living with the OpenMMLab packages that are installed."""

from prune_mm.compat.mmcv_ext import install_mmcv_ops
from prune_mm.compat.mmdet_fixes import fix_ssd_head

__all__ = ["fix_ssd_head", "install_mmcv_ops"]
