"""Prune right away: ``tools/cut.py CONFIG DENSE_CHECKPOINT OUT.pth`` writes the checkpoint of a one-shot method as it
is before any training with masks.

``tools/export.py CONFIG OUT.pth FOLDER`` makes the small model of it, for instance to see what the cut costs before
fine-tuning, or what re-calibrated batch norms give back.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from prune_mm.engine.checkpoint import check_checkpoint, state_dict_of, strip_pruner
from prune_mm.engine.exporter import build_prunable
from prune_mm.engine.launch import add_common_arguments, load_config, run_tool
from prune_mm.engine.prunable import pruned_module
from prune_mm.engine.reading import read_checkpoint
from prune_mm.files import write_atomically


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("checkpoint", help="checkpoint of the dense network")
    parser.add_argument("out", help="checkpoint to write")
    return parser.parse_args()


def main() -> None:
    """Build, load, let the method decide, write."""
    args = parse_args()
    if Path(args.out).exists():
        raise FileExistsError(f"'{args.out}' exists; choose another file")
    config = load_config(args)
    model = build_prunable(config)
    checkpoint = read_checkpoint(args.checkpoint)
    strip_pruner(checkpoint)
    check_checkpoint(model, checkpoint, f"'{args.checkpoint}'")
    model.load_state_dict(state_dict_of(checkpoint), strict=False)
    pruner, module = model.pruner, pruned_module(model)
    epochs, iterations = config.train_cfg.get("max_epochs"), config.train_cfg.get("max_iters")
    pruner.set_schedule(epochs, iterations or epochs * 10**6)
    if pruner.needs_training:
        raise ValueError(f"{pruner.label} steers a training; it has nothing to cut before that")
    pruner.commit(module, pruner.start(module), 0)
    pruner.started.fill_(True)
    content = {"meta": checkpoint.get("meta", {}), "state_dict": model.state_dict()}
    write_atomically(args.out, lambda path: torch.save(content, path))
    shares = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in pruner.status().items())
    print(f"{args.out}: {pruner.label}, {shares}")


if __name__ == "__main__":
    run_tool(main)
