"""From a config and a training checkpoint to an artifact folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import init_default_scope
from safetensors.torch import save_file
from torch import nn

from prune_mm.analysis.complexity import measure_complexity
from prune_mm.engine.checkpoint import PRUNER_PREFIX, check_checkpoint, state_dict_of
from prune_mm.engine.compact import compact_model, without_pretrained
from prune_mm.engine.prunable import pruned_module
from prune_mm.engine.scope import scope_inputs, scope_positions
from prune_mm.export.compact_file import CompactFile
from prune_mm.export.law import check_law
from prune_mm.structures import Plan
from prune_mm.structures.plan import count_macs

ARTIFACT_FILES = ("compact.pth", "model.safetensors", "config.py", "plan.json", "report.json")


def export(config: Config, checkpoint: str | os.PathLike, out: str | os.PathLike, overwrite: bool = False) -> dict:
    """Write the artifact of a pruned checkpoint.

    Args:
        config: training config, with ``model.type='prune_mm.PrunableModel'``.
        checkpoint: a checkpoint of that training.
        out: folder to write; it appears whole or not at all.
        overwrite: replace an artifact that is already there.

    Returns:
        The report, as in ``report.json``.

    Raises:
        FileExistsError: when ``out`` exists and may not be replaced, or is not an artifact.
        FileNotFoundError: when there is no checkpoint.
        ValueError: one line, when the checkpoint does not fit, was never pruned, or the law does not hold.
    """
    target = _free_target(Path(out), overwrite)
    model, file = load_pruned(config, checkpoint)
    return _write(target, config, model, file, str(checkpoint))


def load_pruned(config: Config, path: str | os.PathLike) -> tuple[nn.Module, dict]:
    """The prunable model of a config with a checkpoint loaded, in eval mode, masks in force.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: one line, when config or checkpoint are not of a pruned model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at '{path}'")
    model = build_prunable(config)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # torch.load has no common error for damaged files
        raise ValueError(f"'{path}' is damaged or not a checkpoint: {type(error).__name__}") from error
    check_checkpoint(model, checkpoint, f"'{path}'", whole=True)
    state = state_dict_of(checkpoint)
    if not any(key.startswith(PRUNER_PREFIX) for key in state):
        raise ValueError(f"'{path}' holds no pruning decisions; it is a checkpoint of the dense model")
    model.load_state_dict(state)
    if not bool(model.pruner.started):
        raise ValueError(f"'{path}' was saved before pruning started")
    model.pruner.mask(pruned_module(model))
    model.eval()
    return model, checkpoint


def build_prunable(config: Config) -> nn.Module:
    """Build the model of a training config, without fetching pretrained weights.

    Raises:
        ValueError: when the config is not of a prunable model.
    """
    if str(config.model.get("type")).rpartition(".")[2] != "PrunableModel":
        raise ValueError(f"the config's model is {config.model.get('type')!r}, not 'prune_mm.PrunableModel'")
    init_default_scope(config.get("default_scope", "mmengine"))
    return MMENGINE_MODELS.build(without_pretrained(config.model))


def _free_target(out: Path, overwrite: bool) -> Path:
    if out.exists():
        is_artifact = (out / "compact.pth").is_file() or (out.is_dir() and not any(out.iterdir()))
        if not is_artifact:
            raise FileExistsError(f"'{out}' exists and is not an artifact; choose another folder")
        if any(out.iterdir()) and not overwrite:
            raise FileExistsError(f"'{out}' already holds an artifact; choose another folder or pass --overwrite")
    return out


def _write(out: Path, config: Config, model: nn.Module, checkpoint: dict, source: str) -> dict:
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        report = _fill(folder, config, model, checkpoint, source)
        folder.chmod(0o755)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            os.replace(out, old / out.name)
            os.replace(folder, out)
            shutil.rmtree(old)
        else:
            os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return report


def _fill(folder: Path, config: Config, model: nn.Module, checkpoint: dict, source: str) -> dict:
    scope = model.prune_scope
    dense = MMENGINE_MODELS.build(without_pretrained(config.model.model))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(PRUNER_PREFIX)}
    dense.load_state_dict(state)
    plan = Plan(scope, (tuple(model.pruner.structures()),))
    small = plan.compact(copy.deepcopy(dense))
    inputs = [scope_inputs(dense, scope, (side, side)) for side in _check_sizes(model)]
    difference = check_law(pruned_module(model), small.get_submodule(scope), inputs)

    meta = {"dataset_meta": _plain(checkpoint.get("meta", {}).get("dataset_meta") or {}), "source": source}
    CompactFile(plan, small.state_dict(), meta).save(folder / "compact.pth")
    save_file({k: v.contiguous() for k, v in small.state_dict().items()}, folder / "model.safetensors")
    (folder / "plan.json").write_text(plan.to_json() + "\n")
    (folder / "config.py").write_text(compact_config(config).pretty_text + "\n")
    report = _report(config, model, dense, small, plan) | {"law_relative_difference": difference}
    report["bytes"] = {"compact": (folder / "compact.pth").stat().st_size}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    # What was written must be what was checked.
    again = compact_model(config.model.model, str(folder / "compact.pth"))
    if check_law(small.get_submodule(scope), again.get_submodule(scope), inputs) != 0.0:
        raise ValueError("the written artifact reads back differently; nothing is kept")
    return report


def _check_sizes(model: nn.Module) -> tuple[int, ...]:
    """Two image sides: the law must not depend on the one that was traced."""
    side = min(model.prune_input_size)
    return (side, side + 32)


def _report(config: Config, model: nn.Module, dense: nn.Module, small: nn.Module, plan: Plan) -> dict[str, Any]:
    scope, size = model.prune_scope, model.prune_input_size
    module = dense.get_submodule(scope)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    positions = {name: n for name, n in scope_positions(dense, scope, size).items() if name in shapes}
    compact_shapes = plan.shapes(shapes)
    whole = {"dense": _parameters(dense), "compact": _parameters(small)}
    return {
        "model": type(dense).__name__,
        "scope": scope,
        "pruner": type(model.pruner).__name__,
        "target": str(getattr(model.pruner, "target", "")),
        "input_size": list(size),
        "macs": {"dense": count_macs(shapes, positions), "compact": count_macs(compact_shapes, positions)},
        "params": {"dense": _parameters(module), "compact": _parameters(small.get_submodule(scope))},
        "model_params": whole,
        "layers": {
            name: {"dense": list(shapes[name]), "compact": list(compact_shapes[name]), "positions": positions[name]}
            for name in positions
        },
    }


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def compact_config(config: Config) -> Config:
    """The training config as a config of the compact model: resolved, and without the search."""
    resolved = copy.deepcopy(config)
    dense = without_pretrained(config.model.model)
    resolved.model = {
        "type": "prune_mm.CompactModel",
        "model": dense,
        "checkpoint": "{{ fileDirname }}/compact.pth",
    }
    hooks = [h for h in config.get("custom_hooks") or [] if str(h.get("type")).rpartition(".")[2] != "PruningHook"]
    resolved.custom_hooks = hooks
    imports = config.get("custom_imports") or {"imports": []}
    names = imports["imports"] if isinstance(imports["imports"], (list, tuple)) else [imports["imports"]]
    resolved.custom_imports = {"imports": list(dict.fromkeys([*names, "prune_mm"])), "allow_failed_imports": False}
    resolved.load_from, resolved.resume = None, False
    for key in ("work_dir", "finetune", "launcher"):
        resolved.pop(key, None)
    return resolved


def _plain(value: Any) -> Any:
    """Only types that load with ``weights_only=True``."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def whole_model_macs(model: nn.Module, batch: Any) -> int:
    """MACs of one test step, whatever heads and proposals it runs."""
    return measure_complexity(model, forward=lambda: model.test_step(batch)).macs
