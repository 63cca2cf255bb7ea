"""CompactModel: the small network, built from the dense config and the plan in an artifact."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from prune_mm.compat import fix_ssd_head
from prune_mm.engine.prunable import with_preprocessor
from prune_mm.engine.trial import Trial
from prune_mm.export.compact_file import CompactFile, load_into
from prune_mm.registry import MODELS
from prune_mm.structures.json_text import one_line


@MODELS.register_module(name="CompactModel")
def compact_model(
    model: dict, checkpoint: str, backbone: dict | None = None, data_preprocessor: dict | None = None
) -> nn.Module:
    """Build the dense model, make it small by the plan in ``checkpoint``, and load the weights.

    The result is a plain model of the dense class (a ``MaskRCNN``), ready to test, fine-tune and deploy.

    Args:
        model: config of the dense model.
        checkpoint: path of ``compact.pth``.
        backbone: not used; ``mmdet.apis.init_detector`` looks for this key in every model config.
        data_preprocessor: the ``data_preprocessor`` at the top of a config, which MMEngine hands to the model.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: one line, when the file is damaged or does not fit the config.
    """
    file = CompactFile.load(checkpoint)
    built = MMENGINE_MODELS.build(with_preprocessor(without_pretrained(model), data_preprocessor))
    fix_ssd_head()
    try:
        trial = Trial(built, file.plan.scope)
        file.plan.compact(built)
    except ValueError as error:
        raise ValueError(f"'{checkpoint}' does not fit its config: {one_line(error)}") from error
    load_into(built, file.state_dict, checkpoint)
    try:
        trial.check(built, file.plan.scope)
    except ValueError as error:
        raise ValueError(f"'{checkpoint}' is damaged: {one_line(error)}") from error
    # The runner initialises weights before training; these are the ones to keep.
    built.init_weights = _keep_weights
    return built


def _keep_weights() -> None:
    """The weights come from the artifact."""


def without_pretrained(config: Any) -> Any:
    """A copy of a model config in which nothing fetches pretrained weights."""
    config = copy.deepcopy(config)
    _drop_pretrained(config)
    return config


def _drop_pretrained(node: Any) -> None:
    if isinstance(node, dict):
        init = node.get("init_cfg")
        if isinstance(init, dict) and init.get("type") == "Pretrained":
            node["init_cfg"] = None
        if isinstance(node.get("pretrained"), str):
            node["pretrained"] = None
        for value in node.values():
            _drop_pretrained(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _drop_pretrained(value)
