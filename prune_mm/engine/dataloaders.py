"""Loader types in ordinary configs: ``train_dataloader = dict(type='prune_mm.DALIDataLoader', ...)``.

MMEngine's Runner builds ``torch.utils.data.DataLoader`` and nothing else. Here its ``build_dataloader`` learns to look
at ``type``; a config without one, or with a type that is not registered here, goes to MMEngine as it is.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from mmengine.runner import Runner
from torch.utils.data import DataLoader

from prune_mm.registry import DATALOADERS

#: Options of our loaders; all others describe PyTorch's loader that they are made from.
_OWN = ("device", "prefetch")


def install_loader_types() -> None:
    """Teach MMEngine's Runner the loader types of :data:`~prune_mm.registry.DATALOADERS`. Safe to call twice."""
    original = Runner.build_dataloader
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        kind = dataloader.get("type") if isinstance(dataloader, dict) else None
        registered = DATALOADERS.get(kind) if isinstance(kind, str) else None
        if registered is None:
            return original(dataloader, seed=seed, diff_rank_seed=diff_rank_seed)
        own: dict[str, Any] = {key: dataloader[key] for key in _OWN if key in dataloader}
        stock = {key: value for key, value in dataloader.items() if key not in ("type", *_OWN)}
        try:
            loader = original(stock, seed, diff_rank_seed)
        except (RuntimeError, AssertionError, OSError, ValueError, TypeError) as error:
            raise ValueError(f"{kind} cannot read its data: {error}") from error
        return registered(loader, seed=seed, **own)

    Runner.build_dataloader = staticmethod(build_dataloader)
