"""Plots of the page of results; every method has the same colour and marker in all of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from prune_mm.evidence.cells import METRICS, Cells, points
from prune_mm.evidence.matrix import DENSE, Task
from prune_mm.files import write_atomically

#: Least width of the axis of MACs, in percent.
_NARROWEST = 8.0
_STYLE = {
    "random": ("0.6", "x"),
    "uniform": ("black", "o"),
    "uniform_kd": ("0.35", "P"),
    "chex": ("tab:red", "s"),
    "strucspars": ("tab:blue", "^"),
    "gconv": ("tab:cyan", "v"),
    "hinge": ("tab:green", "D"),
    "onexn": ("tab:purple", "p"),
    "chex_onexn": ("tab:orange", "*"),
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same numbers give the same file.
    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "prune_mm"})
    return plt


def _save(figure: Any, path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content.getvalue()))
    return path


def draw_tradeoff(cells: Cells, task: Task, folder: Path) -> Path | None:
    """Metric against measured MACs with standard errors, and the band of the dense network; None without results."""
    plt = _pyplot()
    metric, drawn = task.metrics[0], 0
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for place, row in enumerate(cells.matrix.rows):
        dots = []
        for share in sorted(cells.matrix.shares):
            cost, value = (
                cells.cost(task.name, row.name, share, "macs"),
                cells.metric(task.name, row.name, share, metric),
            )
            if row.name != DENSE and cost is not None and value is not None:
                dots.append((cost.mean, value.mean, value.error))
        if dots:
            colour, marker = _STYLE.get(row.name, (f"C{place}", "h"))
            x, y, error = zip(*dots)
            axis.errorbar(x, y, error, color=colour, marker=marker, capsize=3, lw=1.2, ms=6, label=row.label)
            drawn += 1
    dense = cells.metric(task.name, DENSE, 100, metric)
    if dense is not None:
        axis.axhline(dense.mean, color="tab:brown", ls="--", lw=1, label="dense")
        axis.axhspan(dense.mean - dense.error, dense.mean + dense.error, color="tab:brown", alpha=0.15, lw=0)
    if not drawn:
        plt.close(figure)
        return None
    low, high = axis.get_xlim()
    if high - low < _NARROWEST:  # one share only: differences of whole channels would look like much
        axis.set_xlim((low + high - _NARROWEST) / 2, (low + high + _NARROWEST) / 2)
    axis.set(xlabel="MACs of the compact backbone, % of dense", ylabel=METRICS.get(metric, metric), title=task.title)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    path = _save(figure, folder / f"{task.name}.png")
    plt.close(figure)
    return path


def draw_curves(cells: Cells, task: Task, folder: Path) -> Path | None:
    """Exploration of CHEX and StrucSpars at the first share and seed; None when none was recorded."""
    shown = []
    for row in cells.matrix.rows:
        records = (
            cells.records(task.name, row.name, cells.matrix.shares[0]) if row.name in ("chex", "strucspars") else []
        )
        curve = next((record["curve"] for record in records if record.get("curve")), None)
        if curve is not None:
            shown.append((row.label, curve))
    if not shown:
        return None
    plt = _pyplot()
    size = (5.2 * len(shown), 7.6)
    figure, axes = plt.subplots(3, len(shown), figsize=size, sharex="col", squeeze=False, layout="constrained")
    for column, (label, curve) in zip(axes.T, shown):
        _draw_curve(column, label, curve, task.metrics[0])
    path = _save(figure, folder / f"{task.name}_curves.png")
    plt.close(figure)
    return path


def _draw_curve(axes: Any, label: str, curve: dict[str, Any], metric: str) -> None:
    """Loss, validation and allocation, one below the other, over epochs."""
    loss, val, allocation = axes
    length = max(curve["iters_per_epoch"], 1)
    loss.plot([step / length for step, _ in curve["loss"]], [value for _, value in curve["loss"]], lw=0.9, color="0.25")
    loss.set(title=label, ylabel="training loss", yscale="log")
    _plain_ticks(loss, 10, (1.0, 2.0, 5.0))
    dots = [(epoch, points(metric, values[metric])) for epoch, values in curve["val"] if metric in values]
    if dots:
        val.plot(*zip(*dots), marker=".", lw=1, color="tab:red")
    val.set(ylabel=f"{METRICS.get(metric, metric)}, validation")
    moved = curve["allocation"]
    if moved is not None:
        epochs = [epoch for epoch, _ in moved["values"]]
        for index, _ in enumerate(moved["layers"]):
            # A checkpoint has what was decided before its epoch.
            colour = _pyplot().get_cmap("viridis")(index / max(len(moved["layers"]) - 1, 1))
            allocation.step(epochs, [values[index] for _, values in moved["values"]], where="pre", lw=1, color=colour)
        pairs = zip(moved["values"], moved["values"][1:])
        for begin in (before[0] for before, after in pairs if before[1] != after[1]):
            for axis in axes:
                axis.axvline(begin, color="0.6", lw=0.6, ls=":")
        allocation.set_yscale("log", base=2)
        _plain_ticks(allocation, 2, (1.0,))
        allocation.set(ylabel=f"{moved['kind']} per layer (dark: first)")
    allocation.set(xlabel="epoch")


def _plain_ticks(axis: Any, base: float, subs: tuple[float, ...]) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.yaxis.set_major_locator(LogLocator(base, subs))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")
