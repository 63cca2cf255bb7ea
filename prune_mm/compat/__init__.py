"""Living with the OpenMMLab packages that are installed."""

from prune_mm.compat.mmcv_ext import install_mmcv_ops
from prune_mm.compat.mmdet_fixes import fix_ssd_head
from prune_mm.compat.packages import check_openmmlab_packages

__all__ = ["check_openmmlab_packages", "fix_ssd_head", "install_mmcv_ops"]
