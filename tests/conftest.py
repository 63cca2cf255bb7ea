"""What all tests share: one thread, and demo data made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Folder of the tiny classification data set; made by the first dataset that asks."""
    return tmp_path_factory.mktemp("data") / "shapes_cls"


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """Folder of the tiny detection data set; made by the first dataset that asks."""
    return tmp_path_factory.mktemp("data") / "shapes"
