"""Structured pruning for OpenMMLab models."""

import sys
from importlib.util import find_spec

from prune_mm.compat import check_openmmlab_packages, install_mmcv_ops

__version__ = "0.1.0"

install_mmcv_ops()

# The channel graph and the structures work on any torch module, with or without MMEngine.
if find_spec("mmengine") is not None:
    check_openmmlab_packages()
    from prune_mm import registry as registry

    # A Runner that is there already learns our loader types; otherwise it does when prune_mm.engine is imported.
    if "mmengine.runner" in sys.modules:
        from prune_mm import engine as engine
