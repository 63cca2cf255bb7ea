"""Classifiers by the name of their config, built once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from mmengine.config import Config
from torch import nn

from prune_mm.registry import MODELS

CONFIGS = Path(__file__).parents[2] / "configs" / "_base_"


@pytest.fixture(scope="session")
def classifier() -> Callable[[str], nn.Module]:
    """Build model base NAME of this project, or ``mmpretrain/NAME``, without memory for its values."""

    @cache
    def build(name: str) -> nn.Module:
        own = f"{CONFIGS}/models/{name}.py"
        base = f"mmpretrain::_base_/models/{name.partition('/')[2]}.py" if "/" in name else own
        model = Config.fromstring(f"_base_ = {base!r}", ".py").model
        model.type = f"mmpretrain.{model.type}"
        return MODELS.build(model).to("meta")

    return build
