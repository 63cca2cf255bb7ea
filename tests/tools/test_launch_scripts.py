"""The launch scripts: torchrun on two "machines", and Slurm as far as it can be shown without one.

``srun`` and ``scontrol`` are stand-ins here: they note how they were called, and srun starts the processes with the
variables that Slurm sets. MMEngine's Slurm launcher then really runs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from mmengine.config import Config, DictAction

ENGINE = Path(__file__).parents[1] / "engine"
SRUN = """#!/usr/bin/env bash
echo "$@" >>"$CALLS/srun"
while [[ $1 == -* ]]; do
    [[ $1 == --ntasks=* ]] && TASKS=${1#--ntasks=}
    shift
done
[ -n "${ONLY_NOTE:-}" ] && exec sleep "$ONLY_NOTE"
export SLURM_NTASKS=$TASKS SLURM_NODELIST=localhost
for ((task = 0; task < TASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    PIDS+=($!)
done
for pid in "${PIDS[@]}"; do
    wait "$pid" || exit 1
done
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$CALLS/scontrol"
[ "$1" = show ] && echo 127.0.0.1 || true
"""


@pytest.fixture
def slurm(tmp_path):
    """Environment in which stand-ins of Slurm's commands are found first; they note their calls in ``tmp_path``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "CALLS": tmp_path, "PYTHON": sys.executable, "PYTHONPATH": ENGINE}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def config_of(images, folder):
    config = tiny.classifier(images, folder, epochs=2, pruner={**tiny.CHEX, "end": 1})
    config.train_dataloader.batch_size = 8
    config.custom_hooks = [*config.custom_hooks, {"type": "SaveEachRank"}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    return tiny.write(config, folder / "train.py")


def assert_same_on_both_ranks(folder):
    states = [torch.load(folder / f"rank{rank}_epoch1.pt") for rank in (0, 1)]
    shared = [{key: tensor for key, tensor in state.items() if "running" not in key} for state in states]
    decided = [{k: v for k, v in state.items() if ".recent." not in k} for state in shared]
    assert tiny.same(*decided) == []
    assert int(states[0]["pruner.updates"]) == 1


def test_two_machines(images, tmp_path):
    """Two torchruns, each with one process, as on two machines."""
    path, port = config_of(images, tmp_path), free_port()
    started = []
    for rank in (1, 0):
        names = {"NNODES": 2, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "PORT": port, "PYTHON": sys.executable}
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ENGINE)}
        command = ["bash", str(tiny.TOOLS / "dist_train.sh"), str(path), "1"]
        with (tmp_path / f"node{rank}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    command, cwd=tmp_path, env=variables | {k: str(v) for k, v in names.items()}, stdout=log, stderr=log
                )
            )
    ends = [process.wait(180) for process in started]
    assert ends == [0, 0], (tmp_path / "node0.log").read_text()[-3000:]
    assert_same_on_both_ranks(tmp_path)


def test_slurm_launcher(images, slurm, tmp_path):
    path = config_of(images, tmp_path / "run")
    script = tiny.TOOLS / "slurm_train.sh"
    end = tiny.cold_script(
        tmp_path, "bash", script, "gpu", "a_name", path, "--cfg-options", "train_cfg.max_epochs=2", GPUS=2,
        CPUS_PER_TASK=3, SRUN_ARGS="--time=10 --qos=high", **slurm,
    )  # fmt: skip
    assert end.status == 0, end
    assert_same_on_both_ranks(tmp_path / "run")
    called = (tmp_path / "srun").read_text()
    wanted = (
        "--partition=gpu --job-name=a_name --nodes=1 --ntasks=2 --ntasks-per-node=2 --gres=gpu:2 --cpus-per-task=3 "
        f"--kill-on-bad-exit=1 --time=10 --qos=high {sys.executable} -u {tiny.TOOLS}/train.py {path} --launcher slurm "
        "--cfg-options train_cfg.max_epochs=2\n"
    )
    assert called == wanted
    assert "show hostname localhost" in (tmp_path / "scontrol").read_text()


def test_slurm_on_several_machines_with_a_work_dir(slurm, tmp_path):
    script = tiny.TOOLS / "slurm_train.sh"
    end = tiny.cold_script(
        tmp_path, "bash", script, "gpu", "name", "c.py", "work dir", "--resume", GPUS=16, ONLY_NOTE=0, **slurm
    )
    assert end.status == 0, end
    called = (tmp_path / "srun").read_text()
    assert "--nodes=2 --ntasks=16 --ntasks-per-node=8 --gres=gpu:8" in called
    assert called.endswith("train.py c.py --work-dir work dir --launcher slurm --resume\n")


def test_the_batch_job_resumes_and_goes_back_into_the_queue(slurm, tmp_path):
    script = shutil.copy(tiny.TOOLS / "slurm_train.sbatch", tmp_path / "job")
    variables = {**os.environ, **slurm, "SLURM_JOB_ID": "1234", "SLURM_SUBMIT_DIR": "/repository", "ONLY_NOTE": "20"}
    job = subprocess.Popen(["bash", script, "c.py", "work"], env={k: str(v) for k, v in variables.items()})
    noted = tmp_path / "srun"
    for _ in range(200):
        if noted.exists() and noted.read_text().endswith("\n"):
            break
        time.sleep(0.05)
    called = noted.read_text()
    assert called.endswith("/repository/tools/train.py c.py --work-dir work --launcher slurm --resume\n")
    job.send_signal(signal.SIGUSR1)
    job.wait(20)
    assert (tmp_path / "scontrol").read_text() == "requeue 1234\n"


@pytest.mark.parametrize(
    ("script", "words", "variables", "message"),
    [
        ("dist_train.sh", ["c.py"], {}, "usage: "),
        ("dist_train.sh", ["c.py", "eight"], {}, "error: GPUS='eight' must be a number of processes"),
        ("dist_train.sh", ["c.py", "8"], {"NNODES": "2"}, "error: NNODES=2 needs MASTER_ADDR"),
        ("dist_train.sh", ["c.py", "8"], {"NNODES": "2", "MASTER_ADDR": "a"}, "and NODE_RANK (this machine"),
        ("dist_train.sh", ["c.py", "8"], {"NNODES": "2", "MAX_RESTARTS": "3"}, "error: MAX_RESTARTS=3 is for one mach"),
        ("slurm_train.sh", ["gpu", "name"], {}, "usage: "),
        ("slurm_train.sh", ["gpu", "name", "c.py"], {"GPUS": "x"}, "error: GPUS='x' must be a number of processes"),
        ("slurm_train.sh", ["gpu", "name", "c.py"], {"GPUS": "12"}, "error: GPUS=12 must be a multiple of GPUS_PER"),
        ("slurm_train.sbatch", ["c.py"], {}, "usage: sbatch"),
    ],
)
def test_scripts_say_how_they_are_used(script, words, variables, message, tmp_path):
    end = tiny.cold_script(tmp_path, "bash", tiny.TOOLS / script, *words, **variables)
    assert end.status == 2
    assert message in end.err


@pytest.mark.skipif(tiny.program("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    scripts = [*map(str, tiny.TOOLS.glob("*.sh")), *map(str, tiny.TOOLS.glob("*.sbatch"))]
    found = subprocess.run([tiny.program("shellcheck"), *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_options_for_64_gpus_in_the_document():
    """Everything that counts iterations is divided by eight; the options exist and fit together."""
    text = (tiny.ROOT / "docs/cluster.md").read_text()
    command = next(block for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S) if "--cfg-options" in block)
    words = command.replace("\\\n", " ").split()
    pairs = dict(word.split("=", 1) for word in words[words.index("--cfg-options") + 1 :])
    path = tiny.ROOT / words[words.index("chex") + 1]
    config, before = Config.fromfile(path), Config.fromfile(path)
    for name in pairs:
        assert config.get(name.split(".")[0]) is not None, name
    config.merge_from_dict({name: DictAction._parse_iterable(value) for name, value in pairs.items()})
    assert config.train_cfg.max_iters * 8 == before.train_cfg.max_iters
    assert config.model.pruner.interval * 8 == before.model.pruner.interval
    assert config.model.pruner.end == before.model.pruner.end // 8
    assert config.param_scheduler[1].end == config.train_cfg.max_iters
    assert [8 * step for step in config.param_scheduler[1].milestones] == before.param_scheduler[1].milestones
    assert 64 * config.train_dataloader.batch_size == 8 * config.auto_scale_lr.base_batch_size
