"""Real runs on a DALI loader: training with a pruner, resume, evaluation on 1 and 2 processes, MMPretrain's script."""

from __future__ import annotations

import copy
import importlib.util
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from photos import make_photos
from PIL import Image

from prune_mm.engine.launch import check_data

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali-cuda130, see requirements/tests.txt")
DALI = "prune_mm.DALIDataLoader"
NAMES = ("train_dataloader", "val_dataloader", "test_dataloader")


def config_of(images, work_dir, pruner=tiny.CHEX, epochs=4, **options):
    """The tiny classifier of all tests, on DALI."""
    config = tiny.classifier(images, work_dir, pruner, epochs, **options)
    for name in NAMES:
        config[name].update(type=DALI, device="cpu")
    config.train_cfg.val_interval = 2
    return config


def weights(path):
    return torch.load(path, map_location="cpu", weights_only=False)["state_dict"]


@pytest.mark.parametrize("name", ["chex_resnet50_dali", "strucspars_resnet50_recordio"])
def test_the_configs_read_imagenet(tmp_path, name):
    root = make_photos(tmp_path / "imagenet")
    config = Config.fromfile(tiny.ROOT / f"configs/{name}.py")
    init_default_scope("mmpretrain")
    for split in ("train", "val"):
        if name.endswith("recordio"):
            words = ("pack", root / split, root / split, "--pass-through")
            assert tiny.tool(tmp_path, "make_recordio.py", *words).status == 0
        else:
            # 3 classes instead of 1000: labels must come from a list.
            files = sorted((root / split).rglob("*.JPEG"))
            lines = [f"{file.relative_to(root / split)} {int(file.parent.name[1:])}" for file in files]
            (root / "meta" / f"{split}.txt").write_text("\n".join(lines))
        options = config[f"{split}_dataloader"]
        options.update(batch_size=4, num_workers=1, device="cpu")
        options.dataset.data_root = str(root)
        check_data(config, f"{split}_dataloader")
        batch = next(iter(Runner.build_dataloader(options, seed=0)))
        assert batch["inputs"].shape == (4, 3, 224, 224)
        data = MODELS.build({"type": "ClsDataPreprocessor", **config.data_preprocessor})(batch)
        assert data["inputs"].dtype == torch.float32
        assert {int(sample.gt_label) for sample in data["data_samples"]} <= {0, 1, 2}
        if split == "val":
            picture = Image.open(root / "val/n0000/2.JPEG")
            scaled = np.asarray(picture.resize((int(256 * 90 / 61), 256), Image.Resampling.BILINEAR), np.float32)
            left = round((scaled.shape[1] - 224) / 2)
            cropped = torch.from_numpy(scaled[16:240, left : left + 224].copy()).permute(2, 0, 1)
            mean, std = (torch.tensor(config.data_preprocessor[key])[:, None, None] for key in ("mean", "std"))
            # Red is red: what the network sees is what Pillow reads.
            assert (data["inputs"][2] * std + mean - cropped).abs().mean() < 1


def test_chex_trains_by_the_tool_and_looks_at_feature_maps(images, tmp_path):
    pruner = {**tiny.CHEX, "criterion": "si", "si_batches": 2}
    path = tiny.write(config_of(images, tmp_path / "run", pruner), tmp_path / "config.py")
    end = tiny.tool(tmp_path, "train.py", path)
    assert end.status == 0, end
    assert "CHEX update 2 at step 2" in end.out + end.err
    assert "accuracy/top1" in end.out + end.err
    evaluated = tiny.tool(tmp_path, "test.py", path, tmp_path / "run/epoch_4.pth", "--metrics-out", tmp_path / "m.json")
    assert evaluated.status == 0, evaluated
    assert 0 <= json.loads((tmp_path / "m.json").read_text())["accuracy/top1"] <= 100


@pytest.mark.parametrize("kind", ["epochs", "iterations", "infinite", "no seed"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(images, tmp_path, kind, monkeypatch):
    # MMEngine waits for worker processes between two passes over the data; there are none.
    monkeypatch.setattr("mmengine.runner.loops.time.sleep", lambda seconds: None)

    def config(folder):
        made = config_of(images, tmp_path / folder)
        if kind in ("iterations", "infinite"):
            made = tiny.by_iteration(made, 8, end=6, interval=2)
        if kind == "iterations":
            made.train_dataloader.sampler.type = "DefaultSampler"
        if kind == "no seed":
            made.randomness = {"seed": None}
        return made

    name, last = ("iter_{}.pth", 8) if kind in ("iterations", "infinite") else ("epoch_{}.pth", 4)
    tiny.train(config("whole"))
    rest = config("rest")
    rest.load_from, rest.resume = str(tmp_path / "whole" / name.format(2)), True
    tiny.train(rest)
    first, second = (weights(tmp_path / folder / name.format(last)) for folder in ("whole", "rest"))
    assert tiny.same(first, second) == []


def test_mixup_of_mmpretrain_trains(images, tmp_path):
    config = config_of(images, tmp_path, epochs=3)
    config.model.model.train_cfg = {"augments": {"type": "Mixup", "alpha": 0.2}}
    config.model.model.data_preprocessor = {**config.data_preprocessor, "num_classes": 6}
    runner = tiny.train(config)
    assert runner.iter == 9
    assert runner.model.data_preprocessor.batch_augments is not None


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def accuracy(config, checkpoint, folder, processes):
    """Of tools/test.py on so many gloo processes."""
    path, out, port = tiny.write(config, folder / "config.py"), folder / "metrics.json", free_port()
    words = ("test.py", path, checkpoint, "--metrics-out", out)
    if processes == 1:
        ends = [tiny.tool(folder, *words)]
    else:
        variables = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = [
            tiny.Started(folder, *words, "--launcher", "pytorch", RANK=rank, LOCAL_RANK=rank, **variables)
            for rank in range(processes)
        ]
        ends = [rank.wait() for rank in started]
    assert [end.status for end in ends] == [0] * processes, ends[0]
    return json.loads(out.read_text())


def test_two_processes_measure_the_accuracy_of_one_and_of_pytorch(images, trained, tmp_path):
    config, checkpoint = trained("classifier")
    config = copy.deepcopy(config)
    config.test_dataloader.batch_size = 5
    config.test_dataloader.dataset.indices = 23  # an odd number: the second rank pads
    expected = accuracy(config, checkpoint, tmp_path / "pytorch", 1)
    ours = copy.deepcopy(config)
    ours.test_dataloader.update(type=DALI, device="cpu")
    assert accuracy(ours, checkpoint, tmp_path / "one", 1) == expected
    assert accuracy(ours, checkpoint, tmp_path / "two", 2) == expected


def test_the_train_script_of_mmpretrain_takes_the_loader(images, tmp_path):
    script = Path(importlib.util.find_spec("mmpretrain").origin).parent / ".mim" / "tools" / "train.py"
    config = config_of(images, tmp_path / "run", pruner=None, epochs=1)
    for name in NAMES:
        config[name].pop("persistent_workers")
    end = tiny.cold_tool(
        tmp_path, script, tiny.write(config, tmp_path / "config.py"), "--no-persistent-workers", "--no-pin-memory"
    )
    assert end.status == 0, end
    assert "Saving checkpoint at 1 epochs" in end.out + end.err


def test_an_unreadable_image_stops_the_tool_with_one_line(images, tmp_path):
    train = tmp_path / "photos"
    for label in ("a", "b"):
        (train / label).mkdir(parents=True)
        for index in range(20):
            (train / label / f"{index}.png").write_bytes((images / "train/ring/00000.png").read_bytes())
    (train / "b" / "7.png").write_bytes(b"no image")
    config = config_of(images, tmp_path / "run", epochs=3)
    pipeline = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset = {"type": "CustomDataset", "data_root": str(train), "pipeline": pipeline}
    path = tiny.write(config, tmp_path / "config.py")
    assert f"'{train}/b/7.png' cannot be decoded" in tiny.tool(tmp_path, "train.py", path).one_line_error
    config.train_dataloader.dataset.data_root = str(tmp_path / "nowhere")
    tiny.write(config, path)
    assert f"'{tmp_path}/nowhere' is missing" in tiny.tool(tmp_path, "train.py", path).one_line_error
