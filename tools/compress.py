"""Compress from a config to the end: pretrain (when the config says how), train, export, fine-tune (likewise), test,
report.

``tools/compress.py configs/demo/chex_maskrcnn.py``. Every step is one of the other tools and is printed as it would be
typed; run again with ``--resume`` to go on after an interruption.

A config may hold ``finetune = dict(...)``: settings that are merged into the artifact's config to train the compact
model further, for instance ``finetune=dict(train_cfg=dict(max_epochs=4))``. Likewise ``pretrain = dict(...)`` trains
the dense model first, for methods that start from trained weights where there are none to load. In ``finetune`` and
``teacher``, ``{{pretrained}}`` stands for the dense checkpoint: that of the pretraining, or the config's ``load_from``.
So the pruned model can learn from the dense one, while it is pruned and while it is fine-tuned::

    teacher = dict(checkpoint='{{pretrained}}')

or while it is fine-tuned only::

    finetune = dict(teacher=dict(checkpoint='{{pretrained}}'))
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from mmengine.config import Config

from prune_mm.engine.distillation import hook_of
from prune_mm.engine.launch import add_common_arguments, check_data, load_config, run_tool
from prune_mm.engine.stages import dense_config, filled, finetune_config
from prune_mm.engine.training_options import check_training_options
from prune_mm.files import write_text_atomically

TOOLS = Path(__file__).resolve().parent
#: What stands for the dense checkpoint in ``finetune`` and ``teacher``.
PRETRAINED = "{{pretrained}}"


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, help="processes of torchrun on this machine (launcher pytorch)")
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    return parser.parse_args()


def run(*command: str) -> None:
    """Run one step in sight of the user; stop when it fails."""
    shown = " ".join(shlex.quote(word) for word in command)
    print(f"\n$ {shown.replace(sys.executable, 'python').replace(str(TOOLS), os.path.relpath(TOOLS))}", flush=True)
    status = subprocess.run(command).returncode
    if status:
        print(f"error: this step failed with status {status}; nothing after it was run", file=sys.stderr)
        sys.exit(status)


def launched(args: argparse.Namespace, tool: str, *words: str) -> list[str]:
    """The command of a training or test step, under torchrun where asked."""
    command = [str(TOOLS / tool), *words, "--launcher", args.launcher]
    if args.launcher == "pytorch":
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.gpus}", *command]
    return [sys.executable, *command]


def last_checkpoint(work_dir: Path) -> str:
    """The newest checkpoint of a run.

    Raises:
        FileNotFoundError: when the run has written none.
    """
    pointer = work_dir / "last_checkpoint"
    if not pointer.is_file():
        raise FileNotFoundError(f"no checkpoint in '{work_dir}'; did the training write any?")
    return pointer.read_text().strip()


def options(args: argparse.Namespace) -> list[str]:
    """Options of every training step; one that an interrupted run never reached has nothing to resume, and starts."""
    return [*(["--amp"] if args.amp else []), *(["--resume"] if args.resume else [])]


def pretrain(args: argparse.Namespace, config: Config, work: Path) -> tuple[str, Path]:
    """Train the dense model; returns its last checkpoint and its metrics."""
    stage = dense_config(config)
    stage.merge_from_dict(config.pretrain.to_dict())
    path, folder, metrics = work / "pretrain.py", work / "pretrain", work / "dense_metrics.json"
    write_text_atomically(path, stage.pretty_text + "\n")
    run(*launched(args, "train.py", str(path), "--work-dir", str(folder), *options(args)))
    checkpoint = last_checkpoint(folder)
    run(*launched(args, "test.py", str(path), checkpoint, "--work-dir", str(folder), "--metrics-out", str(metrics)))
    return checkpoint, metrics


def train_and_export(args: argparse.Namespace, resolved: str, work: Path, start: str | None) -> tuple[Path, Path]:
    """Train with pruning, then export; returns the artifact and the metrics of the masked checkpoint."""
    extra = [*options(args), *(["--cfg-options", f"load_from={start}"] if start else [])]
    run(*launched(args, "train.py", resolved, "--work-dir", str(work), *extra))
    checkpoint, artifact, before = last_checkpoint(work), work / "artifact", work / "masked_metrics.json"
    run(sys.executable, str(TOOLS / "export.py"), resolved, checkpoint, str(artifact), "--overwrite")
    run(*launched(args, "test.py", resolved, checkpoint, "--work-dir", str(work), "--metrics-out", str(before)))
    return artifact, before


def check_placeholder(config: Config) -> None:
    """Make sure that there is something ``{{pretrained}}`` can stand for.

    Raises:
        ValueError: when there is not.
    """
    for name in ("finetune", "teacher"):
        if PRETRAINED in str(config.get(name)) and not (config.get("pretrain") or config.get("load_from")):
            raise ValueError(f"{name} mentions {PRETRAINED}, but the config has neither 'pretrain' nor 'load_from'")


def finetune(args: argparse.Namespace, config: Config, artifact: Path, work: Path, start: str | None) -> Path:
    """Train the compact model further; its weights replace those in a second artifact folder."""
    stage = finetune_config(config, artifact, {"pretrained": start or config.get("load_from")})
    path, folder = work / "finetune.py", work / "finetune"
    write_text_atomically(path, stage.pretty_text + "\n")
    run(*launched(args, "train.py", str(path), "--work-dir", str(folder), *options(args)))
    tuned = work / "artifact_finetuned"
    run(
        sys.executable, str(TOOLS / "export.py"), str(path), last_checkpoint(folder), str(tuned), "--overwrite"
    )  # fmt: skip
    return tuned


def main() -> None:
    """Run every stage."""
    args = parse_args()
    if args.launcher in ("slurm", "mpi"):
        raise ValueError(f"--launcher {args.launcher} is for single steps; on a cluster run those, see docs/cluster.md")
    config = load_config(args)
    check_training_options(config)
    check_placeholder(config)
    if config.get("teacher"):
        hook_of(config.teacher)
    check_data(config, "train_dataloader", "val_dataloader", "test_dataloader")
    work = Path(config.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    resolved = work / "compress.py"
    write_text_atomically(resolved, config.pretty_text + "\n")
    start, dense = pretrain(args, config, work) if config.get("pretrain") else (None, None)
    if config.get("teacher"):
        config.teacher = filled(config.teacher.to_dict(), {"pretrained": start or config.get("load_from")})
        write_text_atomically(resolved, config.pretty_text + "\n")
    artifact, masked = train_and_export(args, str(resolved), work, start)
    if config.get("finetune"):
        artifact = finetune(args, config, artifact, work, start)
    after = work / "compact_metrics.json"
    test = [str(artifact / "config.py"), "--work-dir", str(work / "compact_test"), "--metrics-out", str(after)]
    run(*launched(args, "test.py", *test))
    before = ["--dense-metrics", str(dense)] if dense else ["--masked-metrics", str(masked)]
    run(sys.executable, str(TOOLS / "report.py"), str(artifact), *before, "--compact-metrics", str(after))
    print(f"\nThe small model is in {artifact}: python tools/test.py {artifact}/config.py")


if __name__ == "__main__":
    run_tool(main)
