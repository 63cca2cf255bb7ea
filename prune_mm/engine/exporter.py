"""From a config and a training checkpoint to an artifact folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import init_default_scope
from safetensors.torch import save_file
from torch import nn

from prune_mm.analysis.report import read_report
from prune_mm.engine.checkpoint import PRUNER_PREFIX, check_checkpoint, fitting, state_dict_of
from prune_mm.engine.compact import compact_model, without_pretrained
from prune_mm.engine.prunable import pruned_module, with_preprocessor
from prune_mm.engine.reading import read_checkpoint
from prune_mm.engine.recalibrate import recalibrate_by_config
from prune_mm.engine.scope import get_scope, scope_inputs, scope_positions
from prune_mm.engine.stages import compact_config
from prune_mm.export.compact_file import CompactFile
from prune_mm.export.law import check_law, largest_difference, outputs_of
from prune_mm.graph import count_gathers
from prune_mm.graph.trace import in_eval_mode
from prune_mm.pruners.options import check_integer
from prune_mm.structures import GroupedConv, Plan
from prune_mm.structures.plan import count_macs

ARTIFACT_FILES = ("compact.pth", "model.safetensors", "config.py", "plan.json", "report.json")
#: What else may be in an artifact's folder and is replaced with it.
EXTRA_FILES = ("report.html", "model.onnx", "__pycache__")


def export(
    config: Config,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    overwrite: bool = False,
    recalibrate: int | None = None,
    recalibrate_frozen: bool = False,
) -> dict:
    """Write the artifact of a pruned checkpoint, or of a fine-tuned compact model.

    Args:
        config: training config, with ``model.type='prune_mm.PrunableModel'`` (or ``CompactModel``: fine-tuned).
        checkpoint: a checkpoint of that training.
        out: folder to write; it appears whole or not at all.
        overwrite: replace an artifact that is already there.
        recalibrate: estimate the statistics of batch norm again over so many training batches of the config, for the
            compact model and after the law was checked; see :mod:`prune_mm.engine.recalibrate`.
        recalibrate_frozen: also those of layers that training leaves alone.

    Returns:
        The report, as in ``report.json``.

    Raises:
        FileExistsError: when ``out`` exists and may not be replaced, or is not an artifact.
        FileNotFoundError: when there is no checkpoint.
        ValueError: one line, when the checkpoint does not fit, was never pruned, or the law does not hold; or when
            there is nothing to re-calibrate, or nothing to do it with.
    """
    if recalibrate is not None:
        check_integer("recalibrate", recalibrate, 1)
    target = _free_target(Path(out), overwrite)
    kind = str(config.model.get("type")).rpartition(".")[2]
    source = _finetuned(config, checkpoint) if kind == "CompactModel" else _pruned(config, checkpoint)
    if recalibrate is not None:
        found = recalibrate_by_config(source.small, config, recalibrate, recalibrate_frozen)
        source.facts["recalibrated"] = asdict(found)
    return _write(target, source)


@dataclass
class _Source:
    """What an artifact is made of."""

    config: Config
    dense: nn.Module
    small: nn.Module
    plan: Plan
    meta: dict[str, Any]
    facts: dict[str, Any]
    input_size: tuple[int, int]


def _pruned(config: Config, path: str | os.PathLike) -> _Source:
    """From a masked checkpoint: the law is checked against the masked model."""
    model, checkpoint = load_pruned(config, path)
    scope = model.prune_scope
    with fitting(f"'{path}'"):
        unfinished = model.pruner.conclude(pruned_module(model))
        stages = tuple(tuple(stage) for stage in model.pruner.stages())
    if unfinished:
        print_log("the search has not ended at this checkpoint; what to cut is decided from it as it is", "current")
    dense = _build_dense(config)
    attached = Plan(scope, (model.prune_attached,) if model.prune_attached else ())
    decided = Plan(scope, stages)
    small = attached.compact(copy.deepcopy(dense))
    small.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(PRUNER_PREFIX)})
    decided.compact(small)
    plan = Plan(scope, (*attached.stages, *decided.stages))
    facts = {
        "pruner": model.pruner.label,
        "target": str(getattr(model.pruner, "target", None) or "what it was given"),
        "law_relative_difference": check_law(
            pruned_module(model), get_scope(small, scope), _check_inputs(dense, scope, model.prune_input_size)
        ),
        **({"unfinished": True} if unfinished else {}),
    }
    return _Source(config, dense, small, plan, _meta(checkpoint, path), facts, model.prune_input_size)


def _finetuned(config: Config, path: str | os.PathLike) -> _Source:
    """From a checkpoint of a compact model that was trained further."""
    origin = str(config.model.checkpoint)
    checkpoint = read_checkpoint(path)
    init_default_scope(config.get("default_scope", "mmengine"))
    small = compact_model(config.model.model, origin, data_preprocessor=_preprocessor(config))
    check_checkpoint(small, checkpoint, f"'{path}'", whole=True)
    with fitting(f"'{path}'"):
        small.load_state_dict(state_dict_of(checkpoint))
    plan = CompactFile.load(origin).plan
    dense = _build_dense(config)
    report = read_report(Path(origin).parent)
    facts = {key: report[key] for key in ("pruner", "target", "law_relative_difference")} | {"finetuned": True}
    return _Source(config, dense, small, plan, _meta(checkpoint, path), facts, tuple(report["input_size"]))


def _build_dense(config: Config) -> nn.Module:
    return MMENGINE_MODELS.build(with_preprocessor(without_pretrained(config.model.model), _preprocessor(config)))


def _preprocessor(config: Config) -> dict | None:
    """What MMEngine's runner would hand to the model."""
    return config.model.get("data_preprocessor", config.get("data_preprocessor"))


def _meta(checkpoint: dict, path: str | os.PathLike) -> dict[str, Any]:
    meta = checkpoint.get("meta")
    found = meta.get("dataset_meta") if isinstance(meta, dict) else None
    return {"dataset_meta": _plain(found or {}), "source": Path(path).name}


def load_pruned(config: Config, path: str | os.PathLike) -> tuple[nn.Module, dict]:
    """The prunable model of a config with a checkpoint loaded, in eval mode, masks in force.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: one line, when config or checkpoint are not of a pruned model.
    """
    checkpoint = read_checkpoint(path)
    model = build_prunable(config)
    check_checkpoint(model, checkpoint, f"'{path}'", whole=True)
    state = state_dict_of(checkpoint)
    if not any(key.startswith(PRUNER_PREFIX) for key in state):
        raise ValueError(f"'{path}' holds no pruning decisions; it is a checkpoint of the dense model")
    with fitting(f"'{path}'"):
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
    _put_back(out)
    if out.exists():
        is_artifact = (out / "compact.pth").is_file() or (out.is_dir() and not any(out.iterdir()))
        if not is_artifact:
            raise FileExistsError(f"'{out}' exists and is not an artifact; choose another folder")
        if any(out.iterdir()) and not overwrite:
            raise FileExistsError(f"'{out}' already holds an artifact; choose another folder or pass --overwrite")
        foreign = sorted(path.name for path in out.iterdir() if path.name not in (*ARTIFACT_FILES, *EXTRA_FILES))
        if foreign:
            raise FileExistsError(f"'{out}' also holds '{foreign[0]}', which is no part of an artifact; move it away")
    return out


def _put_back(out: Path) -> None:
    """Bring back the artifact that a process had moved aside when it was killed, before the new one took its place."""
    moved = sorted(out.parent.glob(f".{out.name}.old.*/{out.name}"), key=lambda path: path.stat().st_mtime)
    if moved and not out.exists():
        os.replace(moved[-1], out)
        moved[-1].parent.rmdir()


def _write(out: Path, source: _Source) -> dict:
    """Fill a folder beside ``out``, then let it take its place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        report = _fill(folder, source)
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


def _fill(folder: Path, source: _Source) -> dict:
    state, scope = source.small.state_dict(), source.plan.scope
    CompactFile(source.plan, state, source.meta).save(folder / "compact.pth")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    (folder / "plan.json").write_text(source.plan.to_json() + "\n")
    (folder / "config.py").write_text(compact_config(source.config).pretty_text + "\n")
    report = _report(source)
    report["bytes"] = {
        "dense": sum(t.numel() * t.element_size() for t in source.dense.state_dict().values()),
        "compact": (folder / "compact.pth").stat().st_size,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    # What was written must be what was checked.
    again = compact_model(source.config.model.model, str(folder / "compact.pth"))
    inputs = _check_inputs(again, scope, source.input_size)
    if largest_difference(get_scope(source.small, scope), get_scope(again, scope), inputs) != 0.0:
        raise ValueError("the written artifact reads back differently; nothing is kept")
    return report


def _check_inputs(model: nn.Module, scope: str, size: tuple[int, int]) -> list[tuple[Any, ...]]:
    """Inputs of two sizes, where the model takes two: the law must not depend on the one that was traced."""
    module, side, found = get_scope(model, scope), min(size), []
    with in_eval_mode(model), torch.no_grad():
        for shape in ((side, side), (side + 32, side + 32), size):
            try:
                inputs = scope_inputs(model, scope, shape)
                outputs_of(module, inputs)
            except (RuntimeError, AssertionError, IndexError):  # some networks take images of one size only
                continue
            found.append(inputs)
    return found[:2]


def _report(source: _Source) -> dict[str, Any]:
    scope = source.plan.scope
    module = get_scope(source.dense, scope)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    measured = scope_positions(source.dense, scope, source.input_size)
    positions = {name: count for name, count in measured.items() if name in shapes}
    compact_shapes, compact_positions = source.plan.shapes(shapes), source.plan.positions(positions)
    return {
        "model": type(source.dense).__name__,
        "scope": scope,
        "input_size": list(source.input_size),
        **source.facts,
        **_gathers(source.plan),
        "macs": {"dense": count_macs(shapes, positions), "compact": count_macs(compact_shapes, compact_positions)},
        "params": {"dense": _parameters(module), "compact": _parameters(get_scope(source.small, scope))},
        "model_params": {"dense": _parameters(source.dense), "compact": _parameters(source.small)},
        "layers": {
            name: {
                "dense": list(shapes[name]) if name in shapes else None,
                "compact": list(compact_shapes[name]),
                "positions": count,
            }
            for name, count in compact_positions.items()
        },
    }


def _gathers(plan: Plan) -> dict[str, Any]:
    """Gathers around grouped convolutions: without folding, and left."""
    divided = [[s for s in stage if isinstance(s, GroupedConv)] for stage in plan.stages]
    if not any(divided):
        return {}
    before, after = (sum(map(count_gathers, stages)) for stages in (divided, plan.stages))
    return {"gathers": {"unfolded": before, "folded": after}}


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _plain(value: Any) -> Any:
    """Only types that load with ``weights_only=True``."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
