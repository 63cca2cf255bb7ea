"""A tiny training of every method, for tests of what all methods share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from mmengine.config import Config

PRUNERS: dict[str, Any] = {
    "chex": {**tiny.CHEX, "end": 4},
    "strucspars": {
        "type": "StrucSpars", "target": {"macs": 0.6}, "warmup": 1, "interval": 2, "delta": 0.01, "threshold": 0.3,
    },
    "gconv": {"type": "GConvPrune", "groups": 2},
    "hinge": {"type": "Hinge", "target": {"macs": 0.6}, "strength": 10.0, "threshold": 0.2, "min_share": 0.1},
    "onexn": {
        "type": "OneByN", "n": 4, "kernels": "all", "rearrange": True, "schedule": "gradual", "begin": 1, "end": 3,
    },
    "list": [{**tiny.CHEX, "round_to": 2}, {"type": "OneByN", "n": 4, "kernels": "all", "tail": "pad"}],
}  # fmt: skip


def config_of(method: str, images: Path, folder: Path, epochs: int = 5, kind: str = "classifier") -> Config:
    """Config of a tiny training by a method; Hinge's ends itself."""
    config = getattr(tiny, kind)(images, folder, epochs=epochs)
    config.model.pruner = PRUNERS[method]
    if method == "hinge":
        config.optim_wrapper.paramwise_cfg = {"custom_keys": {".pair.weight": {"lr_mult": 10.0}}}
        config.param_scheduler = []
    return config


def sabotaged(config: Config, **hook: Any) -> Config:
    """The config with one of the saboteurs."""
    config = Config(config._cfg_dict.to_dict())
    config.custom_hooks = [*config.custom_hooks, hook]
    config.custom_imports = {"imports": [*config.custom_imports.imports, "saboteurs"], "allow_failed_imports": False}
    return config
