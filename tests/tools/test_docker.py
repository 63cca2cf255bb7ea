"""What the container files promise, as far as it can be checked without docker."""

from __future__ import annotations

import re
import subprocess

import pytest
import tiny
import torch
import yaml

DOCKER = tiny.ROOT / "docker"


def dockerfile():
    return (DOCKER / "Dockerfile").read_text()


def pins(name):
    lines = (tiny.ROOT / f"requirements/{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_versions_agree_with_the_requirements():
    assert "pip install -r /tmp/requirements/runtime.txt" in dockerfile()
    assert f"ARG DALI=nvidia-dali-cuda130=={pins('tests')['nvidia-dali-cuda130']}\n" in dockerfile()
    readme = (DOCKER / "README.md").read_text()
    assert f"torch {pins('runtime')['torch']} is built for CUDA 13.2" in readme


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA")
def test_the_image_has_the_cuda_that_torch_is_built_for():
    if torch.__version__.split("+")[0] != pins("runtime")["torch"]:
        pytest.skip("another torch than the pinned one")
    image = re.search(r"^ARG CUDA=(\d+\.\d+)\.\d+$", dockerfile(), flags=re.M)[1]
    assert image == torch.version.cuda


def test_what_is_copied_exists_and_reaches_the_build():
    sent = [
        line.removeprefix("!") for line in (tiny.ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile(), flags=re.M)
    for name in " ".join(copied).split():
        assert (tiny.ROOT / name).exists(), name
        assert name.split("/")[0] in sent, name


def test_the_image_runs_as_nobody_in_particular():
    text = dockerfile()
    assert re.search(r"^USER 1000:1000$", text, flags=re.M)
    assert not re.search(r"(password|token|secret)\s*=", text, flags=re.I)


def test_services():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        script = next(word for word in service["command"] if word.startswith("tools/"))
        assert (tiny.ROOT / script).is_file(), name
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert "shm_size" in service or service["ipc"] == "host", name
    for word in ("configs/chex_resnet50.py", "configs/demo/chex_maskrcnn.py"):
        assert word in str(compose)
        assert (tiny.ROOT / word).is_file()


@pytest.mark.skipif(tiny.program("hadolint") is None, reason="hadolint is not installed")
def test_hadolint():
    found = subprocess.run([tiny.program("hadolint"), str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
