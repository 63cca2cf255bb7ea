"""Registries of the scope ``prune_mm``: children of MMEngine's, so ordinary configs find what is here."""

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

_SCOPE = "prune_mm"

MODELS = Registry("model", parent=MMENGINE_MODELS, scope=_SCOPE, locations=["prune_mm.engine", "prune_mm.backbones"])
HOOKS = Registry("hook", parent=MMENGINE_HOOKS, scope=_SCOPE, locations=["prune_mm.engine"])
DATASETS = Registry(
    "dataset",
    parent=MMENGINE_DATASETS,
    scope=_SCOPE,
    locations=["prune_mm.datasets.demo", "prune_mm.datasets.recordio"],
)
DATA_SAMPLERS = Registry(
    "data sampler", parent=MMENGINE_DATA_SAMPLERS, scope=_SCOPE, locations=["prune_mm.datasets.sampling"]
)
TRANSFORMS = Registry("transform", parent=MMENGINE_TRANSFORMS, scope=_SCOPE, locations=["prune_mm.engine"])
#: Data loaders, which MMEngine itself does not know by type: see :mod:`prune_mm.engine.dataloaders`.
DATALOADERS = Registry("data loader", scope=_SCOPE, locations=["prune_mm.datasets.dali"])
#: Pruning methods. Built with ``PRUNERS.build(dict(type='CHEX', target=dict(macs=0.5)))``.
PRUNERS = Registry("pruner", scope=_SCOPE, locations=["prune_mm.pruners"])
