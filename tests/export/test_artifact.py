"""What tools/export.py writes: small, whole, movable, and the same network as the masked checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from safetensors.torch import load_file

from prune_mm.engine.compact import compact_model
from prune_mm.engine.exporter import ARTIFACT_FILES, export

KINDS = ("classifier", "maskrcnn", "ssd")
SITE = Path(np.__file__).parents[1]


@pytest.fixture(scope="module")
def artifact(trained, tmp_path_factory):
    """Export a trained tiny model once: its folder and its report."""
    made = {}

    def make(kind):
        if kind not in made:
            config, checkpoint = trained(kind)
            folder = tmp_path_factory.mktemp(kind) / "artifact"
            made[kind] = folder, export(config, checkpoint, folder)
        return made[kind]

    return make


def metrics(folder, name, *words):
    out = folder / f"{name}.json"
    end = tiny.tool(folder, "test.py", *words, "--work-dir", folder / name, "--metrics-out", out)
    assert end.status == 0, end
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_sizes(kind, artifact, trained):
    folder, report = artifact(kind)
    assert sorted(path.name for path in folder.iterdir()) == sorted(ARTIFACT_FILES)
    data = torch.load(folder / "compact.pth", weights_only=True)
    masked = torch.load(trained(kind)[1], weights_only=False)["state_dict"]
    state = data["state_dict"]
    assert set(state) == {key for key in masked if not key.startswith("pruner.")}
    assert all(a <= b for key in state for a, b in zip(state[key].shape, masked[key].shape))
    elements = sum(tensor.numel() for tensor in state.values())
    assert elements < sum(masked[key].numel() for key in state)
    # 1.02 as for a real network; a tiny one has as many names, records of 64-byte alignment, and a plan.
    assert (folder / "compact.pth").stat().st_size <= 1.02 * 4 * elements + 400 * len(state) + 16_000
    assert tiny.same(load_file(folder / "model.safetensors"), state) == []
    assert data["plan"] == (folder / "plan.json").read_text().strip()
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["macs"]["compact"] <= 0.5 * report["macs"]["dense"]
    assert report["law_relative_difference"] < 1e-5
    assert report["params"]["compact"] < report["params"]["dense"]
    assert data["meta"]["dataset_meta"]["classes"]


def test_the_file_of_a_large_network_is_as_small_as_its_weights(images, tmp_path):
    config = tiny.classifier(images, tmp_path, tiny.UNIFORM, epochs=1)
    config.model.model.backbone.update(base_channels=32, stem_channels=32)
    config.model.model.head.in_channels = 256
    tiny.train(config)
    export(config, tmp_path / "epoch_1.pth", tmp_path / "artifact")
    path = tmp_path / "artifact/compact.pth"
    elements = sum(t.numel() for t in torch.load(path, weights_only=True)["state_dict"].values())
    assert path.stat().st_size <= 1.02 * 4 * elements
    assert path.stat().st_size < 0.7 * sum(p.numel() for p in copy_of_dense(config).parameters()) * 4


def copy_of_dense(config):
    return MODELS.build(config.model.model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_compact_model_is_of_the_dense_class_with_the_masked_metrics(kind, artifact, trained, tmp_path):
    folder, _ = artifact(kind)
    _, checkpoint = trained(kind)
    init_default_scope(trained(kind)[0].default_scope)
    small = compact_model(Config.fromfile(folder / "config.py").model.model, str(folder / "compact.pth"))
    assert type(small) is type(copy_of_dense(trained(kind)[0]))
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(folder, moved)
    masked = metrics(tmp_path, "masked", checkpoint.parent / "train.py", checkpoint)
    compact = metrics(tmp_path, "compact", moved / "config.py")
    assert masked.keys() == compact.keys()
    assert compact == pytest.approx(masked, abs=0.02, nan_ok=True)


def test_fine_tuning_keeps_the_shapes_and_exports_again(artifact, tmp_path):
    folder, report = artifact("classifier")
    words = ["--work-dir", tmp_path / "tuned", "--cfg-options", "train_cfg.max_epochs=1"]
    tuned = tiny.tool(tmp_path, "train.py", folder / "config.py", *words)
    assert tuned.status == 0, tuned
    path = tmp_path / "tuned/epoch_1.pth"
    before = torch.load(folder / "compact.pth", weights_only=True)["state_dict"]
    after = torch.load(path, weights_only=False)["state_dict"]
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert tiny.same(before, after)
    again = tiny.tool(tmp_path, "export.py", folder / "config.py", path, tmp_path / "again")
    assert again.status == 0, again
    written = torch.load(tmp_path / "again/compact.pth", weights_only=True)
    assert tiny.same(written["state_dict"], after) == []
    second = json.loads((tmp_path / "again/report.json").read_text())
    assert second["macs"] == report["macs"]
    assert second["params"] == report["params"]
    # The second artifact stands alone: the first may go.
    assert metrics(tmp_path, "again_test", tmp_path / "again/config.py")


def test_overwrite_replaces_the_whole_folder(artifact, trained, tmp_path):
    config, checkpoint = trained("classifier")
    shutil.copytree(artifact("classifier")[0], tmp_path / "a")
    (tmp_path / "a/compact.pth").write_bytes(b"old")
    export(config, checkpoint, tmp_path / "a", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(ARTIFACT_FILES)
    assert torch.load(tmp_path / "a/compact.pth", weights_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_empty_folder_is_filled(trained, tmp_path):
    (tmp_path / "out").mkdir()
    export(*trained("classifier"), tmp_path / "out")
    assert (tmp_path / "out/compact.pth").is_file()


def test_the_export_does_not_touch_config_or_checkpoint(trained, tmp_path):
    config, checkpoint = trained("classifier")
    before = copy.deepcopy(config.to_dict()), checkpoint.read_bytes()
    export(config, checkpoint, tmp_path / "out")
    assert (config.to_dict(), checkpoint.read_bytes()) == before


# -- the stock tools of OpenMMLab -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["maskrcnn", "ssd"])
def test_mmdet_inferencers(kind, artifact, coco):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    folder, _ = artifact(kind)
    image = str(next((coco / "val2017").glob("*.jpg")))
    files = str(folder / "config.py"), str(folder / "compact.pth")
    inferencer = DetInferencer(*files, device="cpu", show_progress=False)
    found = inferencer(image, no_save_pred=True)["predictions"][0]
    model = init_detector(*files, device="cpu")
    assert tuple(model.dataset_meta["classes"]) == ("circle", "square", "triangle")
    result = inference_detector(model, image).pred_instances
    assert found["scores"] == pytest.approx(result.scores.tolist(), abs=1e-5)
    assert len(found["bboxes"]) > 0


def test_mmpretrain_inferencer(artifact, images):
    from mmpretrain import ImageClassificationInferencer, get_model

    folder, _ = artifact("classifier")
    init_default_scope("mmpretrain")  # the inferencer looks its transforms up there, as it does for any model
    image = str(next((images / "val").glob("*/*.png")))
    inferencer = ImageClassificationInferencer(str(folder / "config.py"), str(folder / "compact.pth"), device="cpu")
    result = inferencer(image)[0]
    assert result["pred_class"] in sorted(path.name for path in (images / "val").iterdir())
    model = get_model(str(folder / "config.py"), device="cpu")
    assert type(model).__name__ == "ImageClassifier"
    small = torch.load(folder / "compact.pth", weights_only=True)["state_dict"]
    assert tiny.same(dict(model.state_dict()), small) == []


@pytest.mark.parametrize(("package", "kind"), [("mmdet", "maskrcnn"), ("mmpretrain", "classifier")])
def test_the_stock_tools_run_pruning_and_artifact(package, kind, images, coco, artifact, tmp_path):
    tools = SITE / package / ".mim/tools"
    config = getattr(tiny, kind)(coco if kind == "maskrcnn" else images, tmp_path / "run", epochs=3)
    path = tiny.write(config, tmp_path / "train.py")
    train = tiny.tool(tmp_path, tools / "train.py", path)
    assert train.status == 0, train
    export(config, tmp_path / "run/epoch_3.pth", tmp_path / "artifact")
    folder = tmp_path / "artifact"
    test = tiny.tool(tmp_path, tools / "test.py", folder / "config.py", folder / "compact.pth")
    assert test.status == 0, test
    tuned = tiny.tool(
        tmp_path, tools / "train.py", folder / "config.py", "--work-dir", tmp_path / "tuned", "--cfg-options",
        "train_cfg.max_epochs=1",
    )  # fmt: skip
    assert tuned.status == 0, tuned
