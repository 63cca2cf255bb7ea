"""Demo data sets as dataset types: made on first use, then read by the stock classes."""

from __future__ import annotations

from typing import Any

from mmengine.registry import DATASETS as MMENGINE_DATASETS

from prune_mm.datasets.digits import Digits as Digits  # registers itself
from prune_mm.datasets.shapes import COCO_CLASSES, make_shapes_coco, make_shapes_imagefolder
from prune_mm.registry import DATASETS


@DATASETS.register_module(name="ShapesCoco")
def shapes_coco(data_root: str = "data/shapes", make: dict | None = None, **kwargs: Any) -> Any:
    """``mmdet.CocoDataset`` over generated shapes with boxes and masks.

    Args:
        data_root: folder of the data; made when it is missing.
        make: arguments of :func:`~prune_mm.datasets.shapes.make_shapes_coco`.
        kwargs: arguments of ``CocoDataset``.
    """
    make_shapes_coco(data_root, **(make or {}))
    kwargs.setdefault("metainfo", {"classes": tuple((make or {}).get("classes", COCO_CLASSES))})
    return MMENGINE_DATASETS.build({"type": "mmdet.CocoDataset", "data_root": data_root, **kwargs})


@DATASETS.register_module(name="ShapesFolder")
def shapes_folder(data_root: str = "data/shapes_cls", make: dict | None = None, **kwargs: Any) -> Any:
    """``mmpretrain.CustomDataset`` over a generated image folder of six classes.

    Args:
        data_root: folder of the data; made when it is missing.
        make: arguments of :func:`~prune_mm.datasets.shapes.make_shapes_imagefolder`.
        kwargs: arguments of ``CustomDataset``.
    """
    make_shapes_imagefolder(data_root, **(make or {}))
    return MMENGINE_DATASETS.build({"type": "mmpretrain.CustomDataset", "data_root": data_root, **kwargs})
