"""What all tests share: one thread, and demo data made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import prune_mm  # noqa: F401  (supplies mmcv's operators, which mmdet looks for when it is imported)

# `make stress` lets hypothesis look much further; how long a test takes says nothing on a shared machine.
_ROUNDS = int(os.environ.get("PRUNE_MM_STRESS", "0"))
_ANYWHERE = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", **_ANYWHERE)
settings.register_profile("stress", max_examples=500 * max(1, _ROUNDS), **_ANYWHERE)
settings.load_profile("stress" if _ROUNDS else "quick")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _quick():
    from tiny import make_mmengine_quick

    make_mmengine_quick()


@pytest.fixture(scope="session")
def images(tmp_path_factory, _quick) -> Path:
    """Folder of the tiny classification data set; made by the first dataset that asks."""
    return tmp_path_factory.mktemp("data") / "shapes_cls"


@pytest.fixture(scope="session")
def coco(tmp_path_factory, _quick) -> Path:
    """Folder of the tiny detection data set; made by the first dataset that asks."""
    return tmp_path_factory.mktemp("data") / "shapes"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, images, coco):
    """Train a tiny model once per session: ``trained('classifier')`` gives its config and last checkpoint."""
    import tiny

    runs: dict[str, tuple] = {}

    def run(kind: str) -> tuple:
        if kind not in runs:
            work = tmp_path_factory.mktemp(f"trained_{kind}")
            build, epochs = getattr(tiny, kind), 3
            config = build(images if kind == "classifier" else coco, work, epochs=epochs)
            tiny.train(config)
            tiny.write(config, work / "train.py")
            runs[kind] = (config, work / f"epoch_{epochs}.pth")
        return runs[kind]

    return run
