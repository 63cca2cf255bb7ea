"""The page of results, made from the raw ones only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from prune_mm.analysis.statistics import (
    MET,
    MISSED,
    PAIRS_ONLY,
    UNKNOWN,
    Summary,
    at_least,
    clearly_above,
    paired_difference,
)
from prune_mm.evidence.cells import METRICS, Cells
from prune_mm.evidence.matrix import DENSE, Matrix, Task
from prune_mm.files import write_text_atomically

NOT_RUN = "not run"
#: Written by people, beside the raw results: causes, and the experiments that show them.
FINDINGS = "findings.md"
_INTRODUCTION = """# What the methods keep

Made by `make evidence` (`tools/evidence.py`) from the raw numbers in [`results/`](results/); every number can be made
again from a config in [`configs/evidence`](../configs/evidence) and a seed. `tools/evidence.py --list` names the runs,
and `work_dirs/evidence/<task>/<run>/commands.sh` lists the commands of each.

* **Data.** Digits: scikit-learn's handwritten digits at 32x32, split by writer: 516 images of 4 writers to train, 399
  of 3 to validate, 882 of 7 others to test. They are turned, sheared, shrunk, dimmed, struck through and noisy: anew
  whenever an image is trained with, and in three fixed copies of each image to validate and to test. Shapes: 5600 +
  150 + 300 generated images of 96x96 with four classes, clutter, strokes across the objects, and objects of 14 pixels
  on; no row trains on an image twice. They are small on purpose: everything runs in minutes on a processor. They rank
  methods at this scale; they do not replace ImageNet or COCO.
* **Detectors start from a trained backbone**, as others start from ImageNet: taught to tell six shapes apart, one in
  an image of 32x32 (`shapes_backbone_narrow.py`), anew for every seed. It is the same for all rows of a task, and not
  counted in their time.
* **Networks** have half their usual width, the detectors a quarter: of a full-width ResNet-20 on plain digits, random
  channels at 25 % of the MACs ended within a point of the dense network (95.7 and 96.5 % on the validation split, one
  seed).
* **The same for all.** Every row trains for the same number of epochs in all, dense too: methods that prune trained
  weights spend the first half on those (shared by all such rows of a seed). MACs and parameters are those of the
  backbone's compact form, counted by one program. What is tested is the exported artifact. Random channels, UniformL1
  and CHEX leave shortcut projections whole.
* **Learning rates.** A schedule alone can be worth more than a method. On MobileNetV2 and the detectors every row has a
  constant rate in the first half and one cosine in the second. On the ResNets (on ResNet-20 that changed little) what
  is cut half way has a cosine in each half, StrucSpars a constant rate first, and what trains in one go one cosine.
* **Hyper-parameters** are in the configs and were chosen on the validation split (`--split val`). The test split chose
  none; where its misses were a reason to search further, that is said below.
* **Spread.** Mean ± standard error over seeds (n). A seed changes the initial weights, the order of images,
  augmentation, and the random choices of methods.
* **Right after the cut** is the compact model before any training with masks (of the two-stage methods: after the
  search, before fine-tuning); *re-calibrated*: with the statistics of its batch norms estimated anew on training
  images. On the detectors both are measured with the first seed only.
* **Training time** is in CPU seconds over those of a dense training of as many epochs, one thread a run; where one ran
  beside it on the same machine that one, else the dense row's. **Latency** is that of the backbone at batch 1 on one
  thread, compact and dense measured in turns in one process, not for every seed.
"""


def write_page(matrix: Matrix, docs: Path, split: str, data_seed: int | None = None) -> Path:
    """Write ``results.md`` and its plots.

    Args:
        matrix: what there is to measure.
        docs: folder of the page; raw results are in ``results`` in it.
        split: whose results to show.
        data_seed: of the generated data, when it is not the usual one.

    Returns:
        Path of the page.
    """
    from prune_mm.evidence.plots import draw_curves, draw_tradeoff

    cells = Cells(matrix, docs / "results", split, data_seed)
    parts = [_INTRODUCTION, *_notes(cells, split, data_seed), "## The claims\n", _claims(cells)]
    findings = docs / "results" / FINDINGS
    if findings.is_file():
        parts.append(f"\n{findings.read_text()}")
    for task in matrix.tasks:
        parts += [f"\n## {task.title}\n", *_task(cells, task)]
        if image := draw_tradeoff(cells, task, docs / "results"):
            parts.append(f"![Accuracy against MACs](results/{image.name})\n")
        if image := draw_curves(cells, task, docs / "results"):
            parts.append(f"{_CURVES}\n![Learning curves of exploration](results/{image.name})\n")
    parts.append(_published())
    page = docs / "results.md"
    write_text_atomically(page, "\n".join(part.rstrip("\n") + "\n" for part in parts if part))
    return page


_CURVES = """Exploration while training, first seed, 50 %: loss, the metric on the validation split, and what each
layer has (live channels of its width; number of groups). Dotted lines are updates of the allocation."""


def _notes(cells: Cells, split: str, data_seed: int | None) -> Iterator[str]:
    if split != "test":
        yield f"\n**This page shows the `{split}` split**: it is for choosing hyper-parameters.\n"
    if data_seed is not None:
        yield f"\n**Generated data of seed {data_seed}.**\n"
    if cells.stale:
        more = len(cells.stale) - 5
        yield (
            "\nResults in `results/` that are of other configs than the present ones are not shown: "
            f"{', '.join(cells.stale[:5])}{f' and {more} more' if more > 0 else ''}.\n"
        )
    machines = sorted({_machine(record) for record in cells.everything()})
    if machines:
        yield f"\nMeasured on: {'; '.join(machines)}.\n"


def _machine(record: dict) -> str:
    machine, versions = record["machine"], record["versions"]
    jobs = f"{record['jobs']} run{'s' if record['jobs'] > 1 else ''} at a time"
    return f"{machine['cpu']}, {machine['cores']} cores, {jobs} for each command, torch {versions.get('torch')}"


# -- claims ------------------------------------------------------------------------------------------------------------


def _claims(cells: Cells) -> str:
    """What is claimed, a line each, and whether it holds, a column a task."""
    tasks, lines, verdicts = cells.matrix.tasks, {}, []
    for task in tasks:
        for what, verdict, gap in _claims_of(cells, task):
            verdicts.append(verdict)
            shown = f"**{verdict}**" if verdict == MISSED else verdict
            lines.setdefault(what, []).append(shown + (f" ({gap.mean:+.2f} ± {gap.error:.2f})" if gap else ""))
    pairs = verdicts.count(PAIRS_ONLY)
    counts = (verdicts.count(MET) + pairs, verdicts.count(MISSED), verdicts.count(UNKNOWN))
    note = (
        "In brackets: the difference, in points, paired over seeds, and its standard error. *At least* and *above* are "
        "judged by those, and need two seeds: a seed decides for all rows of a task which backbone or network they "
        f"start from. Of those that are met, {pairs} (met\\*) are not by the spread of each row alone, as if rows had "
        "no seed in common."
    )
    titles = [task.title.partition(": ")[2] or task.title for task in tasks]
    total = ", ".join(f"{count} {name}" for count, name in zip(counts, (MET, MISSED, UNKNOWN)))
    return f"{total}. {note}\n\n" + _table(("claim", *titles), [(what, *found) for what, found in lines.items()])


def _claims_of(cells: Cells, task: Task) -> Iterator[tuple[str, str, Summary | None]]:
    """Claim, verdict, and the paired difference it is about."""
    metric, shares = task.metrics[0], cells.matrix.shares

    def gap(row: str, other: str, share: int) -> Summary | None:
        return paired_difference(*(cells.by_seed(task.name, name, share, metric) for name in (row, other)))

    rows = [row for row in cells.matrix.rows if row.claims]
    for row in rows:
        if row.name != "uniform":
            found = gap(row.name, "uniform", shares[0])
            yield f"{row.label} at least UniformL1 at {shares[0]} %", at_least(found), found
    found = gap("chex", DENSE, shares[0])
    yield f"CHEX at {shares[0]} % within {task.within:g} point of dense", at_least(found, margin=task.within), found
    for row in rows:
        found = gap(row.name, "random", shares[-1])
        means = (cells.metric(task.name, name, shares[-1], metric) for name in (row.name, "random"))
        yield f"{row.label} above random channels at {shares[-1]} %", clearly_above(found, *means), found


# -- tables ------------------------------------------------------------------------------------------------------------


def _task(cells: Cells, task: Task) -> Iterator[str]:
    names = [METRICS.get(metric, metric) for metric in task.metrics]
    header = ("method", *names, "right after the cut", "re-calibrated", "MACs", "params", "epochs", "training time",
              "latency", "artifact")  # fmt: skip
    for share in cells.matrix.shares:
        rows = [_line(cells, task, row.name, row.label, share) for row in cells.matrix.rows_of(task.name)]
        yield f"### {share} % of the MACs\n"
        yield _table(header, rows)


def _line(cells: Cells, task: Task, row: str, label: str, share: int) -> tuple[str, ...]:
    """One method at one share."""
    records = cells.records(task.name, row, share)
    if not records:
        return (label, *[NOT_RUN] * len(task.metrics), *[""] * 8)
    time, latency = cells.training_time(task.name, row, share), cells.latency(task.name, row, share)
    sizes = [record["costs"]["bytes"]["compact"] for record in records if record["costs"]]
    return (
        label,
        *(_spread(cells.metric(task.name, row, share, metric), count=True) for metric in task.metrics),
        *(_spread(cells.metric(task.name, row, share, task.metrics[0], of)) for of in ("cut", "cut_recalibrated")),
        *(
            "100 %" if row == DENSE else _percent(cells.cost(task.name, row, share, name))
            for name in ("macs", "params")
        ),
        cells.epochs(task.name, row, share),
        NOT_RUN if time is None else f"x {time:.2f}",
        "x 1" if row == DENSE else NOT_RUN if latency is None else f"x {latency.mean / 100:.2f}",
        _bytes(sum(sizes) / len(sizes)) if sizes else _dense_bytes(cells, task),
    )


def _dense_bytes(cells: Cells, task: Task) -> str:
    """Size of the dense network's weights, which every report of a compact one names."""
    found = [
        record["costs"]["bytes"]["dense"]
        for share in cells.matrix.shares
        for row in cells.matrix.rows
        for record in cells.records(task.name, row.name, share)
        if record["costs"]
    ]
    return _bytes(found[0]) if found else NOT_RUN


def _spread(found: Summary | None, count: bool = False) -> str:
    if found is None:
        return "–" if not count else NOT_RUN
    error = f" ± {found.error:.2f}" if found.count > 1 else ""
    return f"{found.mean:.2f}{error}" + (f" ({found.count})" if count else "")


def _percent(found: Summary | None) -> str:
    return "–" if found is None else f"{found.mean:.1f} %"


def _bytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, *lines]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(header))]
    shown = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in rows]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([shown[0], rule, *shown[1:]]) + "\n"


# -- published ---------------------------------------------------------------------------------------------------------


def _published() -> str:
    """Numbers of the papers, in a table of their own; nothing where the file is not there."""
    path = Path(__file__).resolve().parents[2] / "docs/published.json"
    if not path.is_file():
        return ""
    entries = [entry for part in json.loads(path.read_text()).values() for entry in part if entry.get("result")]
    lines = [
        tuple(str(entry[name] or "–") for name in ("method", "model", "cost", "result", "source")) for entry in entries
    ]
    note = "The papers' own, on large data. None was measured here, and none may be compared with the above.\n"
    return f"\n## Published numbers (paper)\n\n{note}\n" + _table(
        ("method", "network", "cost", "result", "source"), lines
    )
