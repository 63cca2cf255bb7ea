"""Structured pruning for OpenMMLab models."""

from importlib.util import find_spec

from prune_mm.compat import install_mmcv_ops

__version__ = "0.1.0"

install_mmcv_ops()

# The channel graph and the structures work on any torch module, with or without MMEngine.
if find_spec("mmengine") is not None:
    from prune_mm import registry as registry
