"""Two processes take the decisions of one, agree about them, and stop together when they do not."""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
from pathlib import Path

import tiny
import torch

SABOTEURS = Path(__file__).parent


def config_of(images, work_dir, hook=None, pruner=tiny.CHEX, epochs=3):
    config = tiny.classifier(images, work_dir, pruner, epochs=epochs)
    config.train_dataloader.batch_size = 8
    config.custom_hooks = [*config.custom_hooks, {"type": "SaveEachRank"}, *([{"type": hook}] if hook else [])]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs", "rank_saboteurs"]
    return config


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def processes(count, config, folder, *words, **environment):
    """Run tools/train.py on so many ranks, and return how they ended."""
    path, port = tiny.write(config, folder / "train.py"), free_port()
    ranks = [
        tiny.Started(
            folder, "train.py", path, "--launcher", "pytorch", *words, PYTHONPATH=SABOTEURS, RANK=rank, LOCAL_RANK=rank,
            WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **environment,
        )
        for rank in range(count)
    ]  # fmt: skip
    return [rank.wait() for rank in ranks]


def two_processes(config, folder, *words):
    """The same on two ranks."""
    return processes(2, config, folder, *words)


def state(folder, rank, epoch):
    return torch.load(Path(folder) / f"rank{rank}_epoch{epoch}.pt")


def pruner_state(state):
    # Weights of both ranks are averaged and equal; running statistics are each rank's own, and so are their copies.
    return {k: v for k, v in state.items() if k.startswith("pruner.") and not v.dtype.is_floating_point}


def test_both_ranks_hold_the_same_masks(images, tmp_path):
    first, second = two_processes(config_of(images, tmp_path), tmp_path)
    assert (first.status, second.status) == (0, 0), first
    for epoch in range(3):
        a, b = state(tmp_path, 0, epoch), state(tmp_path, 1, epoch)
        assert tiny.same(pruner_state(a), pruner_state(b)) == []
        weights = [key for key in a if key.endswith("weight") and not key.startswith("pruner.")]
        assert tiny.same({k: a[k] for k in weights}, {k: b[k] for k in weights}) == []
    assert "CHEX update 2 at step 2" in first.out + first.err


def test_decisions_are_those_of_one_process(images, tmp_path):
    # The first decision and the update after one epoch with no learning rate: same weights, so the same masks. With
    # learning, batch statistics of 2 x 8 and 1 x 16 images differ, and so may later masks.
    for folder in ("one", "two"):
        config = config_of(images, tmp_path / folder, epochs=3)
        config.optim_wrapper.optimizer = {"type": "SGD", "lr": 0.0}
        if folder == "two":
            ends = two_processes(config, tmp_path / folder)
        else:
            config.train_dataloader.batch_size = 16
            path = tiny.write(config, tmp_path / folder / "train.py")
            ends = [tiny.tool(tmp_path / folder, "train.py", path, PYTHONPATH=SABOTEURS)]
        assert [end.status for end in ends] == [0] * len(ends), ends
    for epoch in range(3):
        one, two = state(tmp_path / "one", 0, epoch), state(tmp_path / "two", 0, epoch)
        assert tiny.same(pruner_state(one), pruner_state(two)) == []
    assert int(state(tmp_path / "two", 0, 2)["pruner.updates"]) == 2


def test_a_rank_that_differs_stops_the_run(images, tmp_path):
    ends = two_processes(config_of(images, tmp_path, "FlipMask"), tmp_path)
    for end in ends:
        assert end.status not in (0, None), end
        assert "ranks [1] hold other pruning decisions than rank 0 after the update at step 1" in end.err


def damaged(images, folder, hook, pruner=tiny.CHEX):
    config = config_of(images, folder, pruner=pruner)
    config.custom_hooks = [*config.custom_hooks, hook]
    if pruner["type"] == "Hinge":
        config.optim_wrapper.paramwise_cfg = {"custom_keys": {".pair.weight": {"lr_mult": 10.0}}}
    return config


def test_a_rank_with_other_weights_stops_the_run(images, tmp_path):
    change = {"type": "ChangeOnOneRank", "name": "backbone.layer1.0.conv1.weight", "factor": 1.01}
    for end in two_processes(damaged(images, tmp_path, change), tmp_path):
        assert end.status not in (0, None), end
        assert "ranks [1] train other weights in 'layer1.0.conv1.weight' than rank 0 after the update at" in end.err


HINGE = {"type": "Hinge", "target": {"macs": 0.6}, "threshold": 0.2, "min_share": 0.1}


def test_a_rank_with_another_ratio_stops_the_run(images, tmp_path):
    change = {"type": "ChangeOnOneRank", "name": "pruner.ratio", "factor": 1.5}
    for end in two_processes(damaged(images, tmp_path, change, HINGE), tmp_path):
        assert end.status not in (0, None), end
        assert "ranks [1] have another 'ratio' than rank 0 after the update at step 3 (" in end.err, end


def test_round_off_between_ranks_is_settled_by_rank_0(images, tmp_path):
    change = {"type": "ChangeOnOneRank", "name": "pruner.ratio", "factor": 1.0 + 1e-7}
    ends = two_processes(damaged(images, tmp_path, change, HINGE), tmp_path)
    assert [end.status for end in ends] == [0, 0], ends
    ratios = [state(tmp_path, rank, 2)["pruner.ratio"] for rank in (0, 1)]
    assert ratios[0] == ratios[1] != 0.0


def test_a_long_decision_is_reported_and_ends_no_run(images, tmp_path):
    """Rank 0 thinks for four seconds; the process group has a time-out of two."""
    first, second = two_processes(config_of(images, tmp_path, "SlowDecision"), tmp_path)
    assert (first.status, second.status) == (0, 0), second
    text = next(tmp_path.glob("*/*.log")).read_text()
    assert re.search(r"CHEX starts: decided in \d+\.\d\d s on rank 0, while 1 other waited", text)
    seconds = re.search(r"CHEX update 1 at step 1: .*; decided in (\d+\.\d\d) s on rank 0, while 1 other waited", text)
    assert float(seconds[1]) >= 4.0
    lines = [json.loads(line) for line in next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    assert max(line.get("decide_seconds", 0.0) for line in lines) >= 4.0


def test_a_rank_0_that_dies_while_it_decides_ends_the_others(images, tmp_path):
    first, second = two_processes(config_of(images, tmp_path, "KillInDecision"), tmp_path)
    assert first.status == -signal.SIGKILL, first
    assert second.status not in (0, None), second
    assert "rank 0 has ended, or has not decided what to prune within" in second.err, second


def test_a_decision_that_fails_reaches_every_rank(images, tmp_path):
    for end in two_processes(config_of(images, tmp_path, "BreakDecision"), tmp_path):
        assert end.status not in (0, None), end
        assert "the pruning decision failed on rank 0: _LinAlgError: no convergence" in end.err, end


def test_spatial_information_in_two_processes(images, tmp_path):
    """Each rank looks at half of the batches; rank 0 decides by the sum."""
    pruner = {**tiny.CHEX, "criterion": "si", "si_batches": 3, "end": 1}
    first, second = two_processes(config_of(images, tmp_path, "NoteFeatures", pruner, epochs=2), tmp_path)
    assert (first.status, second.status) == (0, 0), first
    assert tiny.same(pruner_state(state(tmp_path, 0, 1)), pruner_state(state(tmp_path, 1, 1))) == []
    a, b = (torch.load(tmp_path / f"features_{rank}.pt") for rank in (0, 1))
    assert (a["batches"], b["batches"]) == (2, 2)
    assert tiny.same(a["own"], b["own"]), "other images"
    used = torch.load(tmp_path / "features.pt")
    for name, scores in used.items():
        torch.testing.assert_close(scores, a["own"][name] + b["own"][name])


def test_resume_in_two_processes(images, tmp_path):
    config = config_of(images, tmp_path)
    assert [end.status for end in two_processes(config, tmp_path)] == [0, 0]
    before = [state(tmp_path, rank, 2) for rank in (0, 1)]
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_1.pth"))
    ends = two_processes(config, tmp_path, "--resume")
    assert [end.status for end in ends] == [0, 0], ends
    # MMEngine saves rank 0 only, so what each rank measures for itself (running statistics) restarts from rank 0.
    after = [state(tmp_path, rank, 2) for rank in (0, 1)]
    for old, new in zip(before, after):
        weights = [key for key in old if key.endswith(("conv1.weight", "conv2.weight", "fc.weight"))]
        assert tiny.same({k: old[k] for k in weights}, {k: new[k] for k in weights}) == []
        assert tiny.same(pruner_state(old), pruner_state(new)) == []


def test_the_launch_script(images, tmp_path):
    """``tools/dist_train.sh CONFIG 2``: a real torchrun with fresh interpreters."""
    path = tiny.write(config_of(images, tmp_path, epochs=3), tmp_path / "train.py")
    end = tiny.cold_script(
        tmp_path, "bash", tiny.TOOLS / "dist_train.sh", path, 2, PYTHON=sys.executable, PORT=free_port(),
        PYTHONPATH=SABOTEURS,
    )  # fmt: skip
    assert end.status == 0, end
    assert tiny.same(pruner_state(state(tmp_path, 0, 2)), pruner_state(state(tmp_path, 1, 2))) == []


def test_the_launch_script_says_how_it_is_used(tmp_path):
    end = tiny.cold_script(tmp_path, "bash", tiny.TOOLS / "dist_train.sh", "config.py")
    assert end.status == 2
    assert "CONFIG GPUS" in end.err
