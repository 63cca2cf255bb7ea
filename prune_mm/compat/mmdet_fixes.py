"""Defects of installed OpenMMLab packages that would break a pruned model as they break a dense one."""

from __future__ import annotations

import sys


def fix_ssd_head() -> None:
    """Let ``SSDHead`` predict: it reads ``self.loss_cls``, which this head never sets (mmdetection#11063).

    Does nothing when mmdet is not loaded, or has mended the head.
    """
    module = sys.modules.get("mmdet.models.dense_heads.ssd_head")
    head = getattr(module, "SSDHead", None)
    if head is not None and not hasattr(head, "loss_cls"):
        head.loss_cls = None
