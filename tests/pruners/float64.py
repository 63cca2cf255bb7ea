"""Seeded tensors in double precision, and their comparison with golden numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def randn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def close(found: Tensor, expected: list, digits: float = 1e-9) -> bool:
    expected = torch.tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape
    return bool(((found - expected).abs() <= digits).all())
