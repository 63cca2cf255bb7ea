"""The report of an artifact: what was pruned, what it costs now, what it scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_mm.analysis.table import Row
from prune_mm.structures.json_text import one_line, read_json_file

#: Names of metrics as OpenMMLab reports them, and how to show them.
METRICS = {
    "coco/bbox_mAP": ("box AP", "ap"),
    "coco/segm_mAP": ("mask AP", "ap"),
    "accuracy/top1": ("top-1 (%)", "percent"),
    "accuracy/top5": ("top-5 (%)", "percent"),
}

#: Longest side of the images that a model is measured with, in pixels.
MAX_SIDE = 1 << 14


def read_report(artifact: str | Path) -> dict[str, Any]:
    """Read ``report.json`` of an artifact folder.

    Raises:
        FileNotFoundError: when the folder holds no artifact.
        ValueError: one line naming the file and what is wrong with it.
    """
    path = Path(artifact) / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"'{artifact}' is not an artifact: it has no report.json; tools/export.py writes one")
    try:
        report = read_json_file(path)
        check_report(report)
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {one_line(error)}") from error
    return report


def read_metrics(path: str | Path) -> dict[str, Any]:
    """Read what ``tools/test.py --metrics-out`` wrote: numbers by name, None where a metric is not defined.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: one line naming the file and what is wrong with it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no metrics at '{path}'; tools/test.py --metrics-out writes them")
    try:
        metrics = read_json_file(path, not_finite=True)
        _check_metrics(metrics, "it")
    except ValueError as error:
        raise ValueError(f"'{path}' holds no metrics: {one_line(error)}") from error
    return metrics


def check_report(report: Any) -> None:
    """Make sure that a report has the parts that are used, of the right kind; others are left alone.

    Raises:
        ValueError: naming the part.
    """
    _check_table(report, "the report")
    for key in ("model", "scope", "pruner", "target"):
        if not isinstance(report.get(key), str) or not report[key].isprintable() or len(report[key]) > 1000:
            raise ValueError(f"'{key}' must be a short text")
    size = report.get("input_size")
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or not 0 < n <= MAX_SIDE for n in size):
        raise ValueError(f"'input_size' must be two sides of at most {MAX_SIDE} pixels")
    _number(report.get("law_relative_difference"), "law_relative_difference")
    for key in ("macs", "params", "model_macs", "model_params", "bytes"):
        if key in report or key in ("macs", "params"):
            _check_table(report.get(key), f"'{key}'")
            for side in ("dense", "compact"):
                _number(report[key].get(side), f"{key}.{side}")
    if "gathers" in report:
        _check_table(report["gathers"], "'gathers'")
        for key in ("unfolded", "folded"):
            _number(report["gathers"].get(key), f"gathers.{key}")
    _check_lists(report)


def _check_lists(report: dict[str, Any]) -> None:
    _check_table(report.get("layers"), "'layers'")
    for name, layer in report["layers"].items():
        _check_table(layer, f"layer '{name:.80}'")
        for side in ("dense", "compact"):
            shape = layer.get(side, 0)
            if shape is None and side == "dense":
                continue
            if not name.isprintable() or not isinstance(shape, list) or any(type(n) is not int for n in shape):
                raise ValueError(f"layer '{name:.80}' must have a list of sizes as '{side}'")
    latency = report.get("latency", [])
    if not isinstance(latency, list):
        raise ValueError("'latency' must be a list")
    for entry in latency:
        _check_table(entry, "an entry of 'latency'")
        if not isinstance(entry.get("what"), str) or not entry["what"].isprintable():
            raise ValueError("latency.what must be text")
        for key in ("batch", "dense_ms", "compact_ms"):
            _number(entry.get(key), f"latency.{key}")
    metrics = report.get("metrics", {})
    _check_table(metrics, "'metrics'")
    for key, values in metrics.items():
        _check_metrics(values, f"metrics '{key:.80}'")


def _check_metrics(metrics: Any, what: str) -> None:
    _check_table(metrics, what)
    for key in METRICS:
        if metrics.get(key) is not None:
            _number(metrics[key], key)


def _check_table(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a table, got {type(value).__name__}")


def _number(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} must be a number, got {type(value).__name__}")


def report_rows(report: dict[str, Any]) -> list[Row]:
    """Rows of the summary table: costs of the scope, of the whole model, latency and metrics, as far as measured."""
    scope = report["scope"]
    rows: list[Row] = [(f"{scope} MACs", *_pair(report["macs"]), "macs")]
    for key, name, form in (
        ("model_macs", "model MACs", "macs"),
        ("params", f"{scope} params", "params"),
        ("model_params", "model params", "params"),
        ("bytes", "weights file", "bytes"),
    ):
        if key in report:
            rows.append((name, *_pair(report[key]), form))
    if "gathers" in report:
        gathers = report["gathers"]
        rows.append((f"gathers left of {gathers['unfolded']}", None, gathers["folded"], "count"))
    for latency in report.get("latency", ()):
        what = f"{latency['what']} latency, batch {latency['batch']}"
        rows.append((what, latency["dense_ms"], latency["compact_ms"], "ms"))
    metrics = report.get("metrics", {})
    for key, (name, form) in METRICS.items():
        # Without a trained dense model, the masked checkpoint stands for it: of dense size, and the same function.
        known = metrics.get("dense", metrics.get("masked", {}))
        before, after = known.get(key), metrics.get("compact", {}).get(key)
        if report.get("finetuned") and "dense" not in metrics:
            name += ", before and after fine-tuning"
        if before is not None or after is not None:
            rows.append((name, before, after, form))
    return rows


def layer_lines(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Per weight layer its name, and ``outputs x inputs`` before and after."""
    return [
        (name.removesuffix(".weight"), _width(layer["dense"]), _width(layer["compact"]))
        for name, layer in report["layers"].items()
    ]


def _width(shape: list[int] | None) -> str:
    return "–" if shape is None else " x ".join(str(size) for size in shape)


def _pair(values: dict[str, float]) -> tuple[float | None, float | None]:
    return values.get("dense"), values.get("compact")
