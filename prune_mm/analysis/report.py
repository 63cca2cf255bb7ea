"""The report of an artifact: what was pruned, what it costs now, what it scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_mm.analysis.table import Row

#: Names of metrics as OpenMMLab reports them, and how to show them.
METRICS = {
    "coco/bbox_mAP": ("box AP", "ap"),
    "coco/segm_mAP": ("mask AP", "ap"),
    "accuracy/top1": ("top-1 (%)", "percent"),
    "accuracy/top5": ("top-5 (%)", "percent"),
}


def read_report(artifact: str | Path) -> dict[str, Any]:
    """Read ``report.json`` of an artifact folder.

    Raises:
        FileNotFoundError: when the folder holds no artifact.
        ValueError: when the report is damaged.
    """
    path = Path(artifact) / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"'{artifact}' is not an artifact: it has no report.json; tools/export.py writes one")
    try:
        report = json.loads(path.read_text())
        report["macs"]["dense"], report["params"]["compact"], report["layers"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is damaged: {error!r}") from error
    return report


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
