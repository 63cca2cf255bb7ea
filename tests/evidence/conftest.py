"""The little matrix, as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_evidence import BASE, UNIFORM


@pytest.fixture(scope="session")
def tiny_matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "tiny").mkdir()
    (folder / "tiny/dense.py").write_text(BASE)
    (folder / "tiny/uniform.py").write_text(UNIFORM)
    (folder / "tiny/random.py").write_text(UNIFORM.replace("UniformL1", "RandomChannels"))
    # No row of the matrix, so that nothing runs it: the claim about CHEX finds its results by name.
    (folder / "tiny/chex.py").write_text(UNIFORM)
    content = {
        "seeds": [0],
        "shares": [50, 25],
        "rows": [
            {"name": "dense", "label": "dense"},
            {"name": "random", "label": "RandomChannels"},
            {"name": "uniform", "label": "UniformL1", "claims": True},
            {"name": "elsewhere", "label": "a row of other tasks"},
        ],
        "tasks": [{"name": "tiny", "title": "Tiny digits", "metrics": ["accuracy/top1"], "within": 1.0}],
    }
    path = folder / "matrix.json"
    path.write_text(json.dumps(content))
    return path
