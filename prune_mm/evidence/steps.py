"""What one run does: train, export, fine-tune, test, by the tools of the project, each step once.

Every step leaves a note in the folder of the run when it has ended; a run that was killed goes on behind the last
note, and inside a training from its last checkpoint. ``commands.sh`` lists the steps as one would type them.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from typing import Any

from mmengine.config import Config

from prune_mm.engine.launch import latest_checkpoint
from prune_mm.engine.stages import filled, finetune_config
from prune_mm.engine.stopwatch import FILE as STOPWATCH
from prune_mm.evidence.curves import read_curve
from prune_mm.evidence.matrix import Plan, lengthen
from prune_mm.files import write_text_atomically

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@dataclass(frozen=True)
class Bench:
    """The folder of a run, with its notes, its log and its commands."""

    folder: Path

    def once(self, name: str, step: Callable[[], Any]) -> Any:
        """What ``step`` returns (plain JSON); when it has ended before, what it returned then."""
        note = self.folder / "steps" / f"{name}.json"
        if note.is_file():
            return json.loads(note.read_text())
        found = step()
        write_text_atomically(note, json.dumps(found, indent=1) + "\n")
        return found

    def tool(self, name: str, *words: Any) -> None:
        """Run a tool in a process of its own.

        The process is forked from this one, which has imported what tools need: that saves the seconds of a start.

        Raises:
            RuntimeError: it failed; with its last words and the place of its log.
        """
        command = [str(TOOLS / name), *map(str, words)]
        log = self.folder / "log.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "commands.sh").open("a") as file:
            if not file.tell() and (threads := os.environ.get("OMP_NUM_THREADS")):
                # Sums in another order give other weights.
                print(f"export OMP_NUM_THREADS={threads}", file=file)
            print("python", f"tools/{name}", *(shlex.quote(word) for word in command[1:]), file=file)
        child = os.fork()
        if child == 0:
            _be_tool(command, log)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise RuntimeError(f"{name} failed with status {status}: {(words or ['no words'])[-1][:300]}; see {log}")

    def write_config(self, name: str, config: Config) -> Path:
        """A resolved config as a file."""
        path = self.folder / f"{name}.py"
        text = config.pretty_text + "\n"
        if not path.is_file() or path.read_text() != text:
            write_text_atomically(path, text)
        return path

    def train(self, name: str, config: Config) -> dict[str, Any]:
        """Train to the end, from the last checkpoint if there is one.

        Returns:
            ``checkpoint``, and what the stopwatch says: ``epochs``, ``wall_seconds``, ``cpu_seconds``.
        """
        folder = self.folder / name

        def step() -> dict[str, Any]:
            self.tool("train.py", self.write_config(name, config), "--work-dir", folder, "--resume")
            return {"checkpoint": latest_checkpoint(folder), **json.loads((folder / STOPWATCH).read_text())}

        return self.once(name, step)

    def export(self, name: str, config: Path, checkpoint: str, *options: str) -> dict[str, Any]:
        """Write an artifact; returns its report."""
        out = self.folder / name

        def step() -> dict[str, Any]:
            self.tool("export.py", config, checkpoint, out, "--overwrite", *options)
            return json.loads((out / "report.json").read_text())

        return self.once(f"export_{name}", step)

    def test(self, name: str, config: Config, split: str, checkpoint: str | None = None) -> dict[str, float]:
        """Metrics of a model on a split."""
        out = self.folder / f"{name}_{split}_metrics.json"

        def step() -> dict[str, float]:
            path = self.write_config(f"{name}_{split}", on_split(config, split))
            words = [path, *([checkpoint] if checkpoint else [])]
            self.tool("test.py", *words, "--work-dir", self.folder / "tests", "--metrics-out", out)
            return json.loads(out.read_text())

        return self.once(f"test_{name}_{split}", step)

    def test_artifact(self, name: str, split: str) -> dict[str, float]:
        """Metrics of an artifact in the folder of the run, from its own config."""
        return self.test(f"tested_{name}", Config.fromfile(self.folder / name / "config.py"), split)


def _be_tool(command: list[str], log: Path) -> None:
    """Become a tool, in the child of a fork."""
    status = 1
    die_with_parent()
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.argv = command
        run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def die_with_parent() -> None:
    """Let the system end this process when the one that started it ends, however that ends (Linux only).

    Else a training would go on behind the back of the next call, in the same folder.
    """
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return


def on_split(config: Config, split: str) -> Config:
    """A config whose ``test_dataloader`` reads the split; configs have the test split there, and val for validation."""
    if split == "val":
        config = Config(config.to_dict())
        config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
    return config


# -- runs --------------------------------------------------------------------------------------------------------------


def run_folder(work: Path, plan: Plan) -> Path:
    """Where a run leaves its files."""
    run = plan.run
    return work / run.task / f"{run.row}-{run.share}-s{run.seed}-{plan.key[:8]}"


def backbone_folder(work: Path, plan: Plan) -> Path:
    """Where the training that all rows start from leaves its files; tasks may share it."""
    return work / plan.config.starts_from / f"s{plan.run.seed}-{str(plan.backbone_key)[:8]}"


def train_backbone(plan: Plan, work: Path) -> str:
    """Train what all rows of a task start from; returns its checkpoint."""
    return Bench(backbone_folder(work, plan)).train("train", plan.backbone)["checkpoint"]


def is_backbone_trained(plan: Plan, work: Path) -> bool:
    """Whether that has been done."""
    return (backbone_folder(work, plan) / "steps" / "train.json").is_file()


def _with_backbone(plan: Plan, config: Config, work: Path) -> Config:
    """A config that starts from the trained backbone, where the task has one."""
    if plan.backbone is None:
        return config
    return Config(filled(config.to_dict(), {"backbone": train_backbone(plan, work)}))


def pretrain_folder(work: Path, plan: Plan) -> Path:
    """Where the dense training that rows share leaves its files."""
    return work / plan.run.task / f"pretrained-s{plan.run.seed}-{str(plan.pretrain_key)[:8]}"


def pretrain(plan: Plan, work: Path, split: str) -> dict[str, Any]:
    """Train and test the dense network that pruning starts from."""
    bench, config = Bench(pretrain_folder(work, plan)), _with_backbone(plan, plan.pretrain, work)
    trained = bench.train("train", config)
    return {"trained": trained, "metrics": bench.test("trained", config, split, trained["checkpoint"])}


def is_pretrained(plan: Plan, work: Path, split: str) -> bool:
    """Whether that has been done."""
    return (pretrain_folder(work, plan) / "steps" / f"test_trained_{split}.json").is_file()


def _train_dense(plan: Plan, work: Path) -> dict[str, Any]:
    """The training of the dense row."""
    return Bench(run_folder(work, plan)).train("train", _with_backbone(plan, plan.config, work))


def is_dense_trained(plan: Plan, work: Path) -> bool:
    """Whether that has been done."""
    return (run_folder(work, plan) / "steps" / "train.json").is_file()


def run_dense(plan: Plan, work: Path, split: str) -> dict[str, Any]:
    """The dense row: train and test."""
    bench = Bench(run_folder(work, plan))
    trained = _train_dense(plan, work)
    final = bench.test("trained", _with_backbone(plan, plan.config, work), split, trained["checkpoint"])
    return _result(plan, bench, {"train": trained}, {"final": final}, None, None)


def run_pruned(plan: Plan, work: Path, split: str) -> dict[str, Any]:
    """A method: (pre-train,) prune, export (, fine-tune, export), test; and what is left right after the cut."""
    bench, stages, metrics, start = Bench(run_folder(work, plan)), {}, {}, None
    checkpoints: dict[str, str] = {}
    if plan.teacher is not None:
        checkpoints["dense"] = _train_dense(plan.teacher, work)["checkpoint"]
    if plan.starts_trained:
        before = pretrain(plan, work, split)
        stages["pretrain"], metrics["dense"] = before["trained"], before["metrics"]
        checkpoints["pretrained"] = start = before["trained"]["checkpoint"]
    config = Config(filled(_with_backbone(plan, plan.config, work).to_dict(), checkpoints))
    config.load_from = start
    stages["train"] = trained = bench.train("train", config)
    path = bench.write_config("train", config)
    report, last = bench.export("artifact", path, trained["checkpoint"]), "artifact"
    if plan.config.get("finetune"):
        unused = config.train_cfg.max_epochs - trained["epochs"]
        tuned = finetune_config(plan.config, bench.folder / "artifact", checkpoints)
        # Epochs that the search left over, so that every row trains for the same time.
        lengthen(tuned, unused)
        stages["finetune"] = bench.train("finetune", tuned)
        report = bench.export("finetuned", bench.write_config("finetune", tuned), stages["finetune"]["checkpoint"])
        last = "finetuned"
        if plan.recalibrate:
            metrics |= _after_cut(plan, bench, path, trained["checkpoint"], split, "artifact")
    elif plan.starts_trained and plan.recalibrate:
        cut = bench.folder / "cut.pth"
        bench.once("cut", lambda: cut.unlink(missing_ok=True) or bench.tool("cut.py", path, start, cut))
        metrics |= _after_cut(plan, bench, path, str(cut), split)
    metrics["final"] = bench.test_artifact(last, split)
    return _result(plan, bench, stages, metrics, report, _dense_epoch(plan, work))


def _after_cut(
    plan: Plan, bench: Bench, config: Path, checkpoint: str, split: str, exported: str | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of the compact model before it trains on, without and with re-calibrated batch norms."""
    if exported is None:
        exported = "cut"
        bench.export("cut", config, checkpoint)
    found = {"cut": bench.test_artifact(exported, split)}
    bench.export("cut_recalibrated", config, checkpoint, "--recalibrate", str(plan.recalibrate))
    return found | {"cut_recalibrated": bench.test_artifact("cut_recalibrated", split)}


def _dense_epoch(plan: Plan, work: Path) -> float | None:
    """CPU seconds an epoch of the latest dense training of the task and seed in this work dir; None without one.

    A dense training of another machine is no measure of the time that methods add.
    """
    found = [
        note
        for kind in ("pretrained-", "dense-100-")
        for note in (work / plan.run.task).glob(f"{kind}s{plan.run.seed}-*/steps/train.json")
    ]
    if not found:
        return None
    trained = json.loads(max(found, key=lambda note: note.stat().st_mtime).read_text())
    return round(trained["cpu_seconds"] / trained["epochs"], 4)


def _result(
    plan: Plan, bench: Bench, stages: dict, metrics: dict, report: dict | None, dense_epoch: float | None
) -> dict[str, Any]:
    """The raw numbers of a run."""
    epochs = {name: stage["epochs"] for name, stage in stages.items()}
    seconds = {name: sum(stage[name] for stage in stages.values()) for name in ("wall_seconds", "cpu_seconds")}
    costs = {name: report[name] for name in ("macs", "params", "bytes")} if report else None
    return {
        "metrics": metrics,
        "costs": costs,
        "artifact": None if report is None else "finetuned" if "finetune" in stages else "artifact",
        "epochs": {**epochs, "total": sum(epochs.values())},
        "training": {
            **{name: round(value, 2) for name, value in seconds.items()},
            "dense_cpu_seconds_an_epoch": dense_epoch,
        },
        "curve": bench.once("curve", lambda: read_curve(bench.folder / "train", plan.config)),
    }
