"""What cannot be exported is refused in one line, and nothing is written or overwritten."""

from __future__ import annotations

import os
import shutil

import pytest
import tiny
import torch
from mmengine.registry import MODELS, init_default_scope

from prune_mm.engine.exporter import ARTIFACT_FILES, export


def tree(folder):
    """Paths, sizes and times of everything below a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def edited(trained, tmp_path, change, kind="classifier"):
    """A copy of a trained checkpoint that ``change`` edited."""
    config, checkpoint = trained(kind)
    data = torch.load(checkpoint, weights_only=False)
    change(data)
    path = tmp_path / "edited.pth"
    torch.save(data, path)
    return config, path


def refused(config, checkpoint, out, words, error=ValueError, **options):
    folder = out.parent
    before = tree(folder)
    with pytest.raises(error, match=words) as caught:
        export(config, checkpoint, out, **options)
    assert "\n" not in str(caught.value)
    assert tree(folder) == before


def test_a_folder_that_is_no_artifact(trained, tmp_path):
    config, checkpoint = trained("classifier")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_bytes(b"cat")
    for overwrite in (False, True):
        refused(
            config, checkpoint, tmp_path / "photos", "exists and is not an artifact", FileExistsError,
            overwrite=overwrite,
        )  # fmt: skip
    (tmp_path / "file").write_text("text")
    refused(config, checkpoint, tmp_path / "file", "exists and is not an artifact", FileExistsError, overwrite=True)


def test_an_artifact_is_not_replaced_unasked(trained, tmp_path):
    config, checkpoint = trained("classifier")
    export(config, checkpoint, tmp_path / "a")
    refused(config, checkpoint, tmp_path / "a", "--overwrite", FileExistsError)


def test_an_artifact_with_the_users_own_files_is_not_replaced(trained, tmp_path):
    config, checkpoint = trained("classifier")
    export(config, checkpoint, tmp_path / "a")
    (tmp_path / "a/notes.txt").write_text("mine")
    refused(config, checkpoint, tmp_path / "a", "notes.txt", FileExistsError, overwrite=True)


def test_a_failed_export_keeps_the_old_artifact(trained, tmp_path):
    config, checkpoint = trained("classifier")
    export(config, checkpoint, tmp_path / "a")
    spoilt = edited(trained, tmp_path, lambda d: d["state_dict"]["backbone.layer1.0.conv2.weight"].fill_(float("nan")))
    refused(*spoilt, tmp_path / "a", "does not compute", overwrite=True)


def test_no_checkpoint(trained, tmp_path):
    config, _ = trained("classifier")
    refused(config, tmp_path / "none.pth", tmp_path / "out", "no checkpoint at", FileNotFoundError)
    refused(config, tmp_path, tmp_path / "out", "no checkpoint at", FileNotFoundError)


@pytest.mark.parametrize("length", [0, 10, 5000, -1, -30])
def test_a_truncated_checkpoint(length, trained, tmp_path):
    config, checkpoint = trained("classifier")
    path = tmp_path / "cut.pth"
    path.write_bytes(checkpoint.read_bytes()[:length])
    refused(config, path, tmp_path / "out", "damaged or not a checkpoint")


def test_a_dense_checkpoint(trained, tmp_path):
    def drop(data):
        for key in [key for key in data["state_dict"] if key.startswith("pruner.")]:
            del data["state_dict"][key]

    refused(*edited(trained, tmp_path, drop), tmp_path / "out", "a checkpoint of the dense model")


def test_a_checkpoint_from_before_pruning(trained, tmp_path):
    config, path = edited(trained, tmp_path, lambda d: d["state_dict"]["pruner.started"].fill_(False))
    refused(config, path, tmp_path / "out", "saved before pruning started")


def test_another_architecture(trained, images, tmp_path):
    _, checkpoint = trained("classifier")
    wide = tiny.classifier(images, "unused")
    wide.model.model.backbone.update(base_channels=16, stem_channels=16)
    refused(wide, checkpoint, tmp_path / "out", "is not a checkpoint of this ImageClassifier: .* has shape")
    deep = tiny.classifier(images, "unused")
    deep.model.model.backbone.depth = 34
    refused(deep, checkpoint, tmp_path / "out", "is not a checkpoint of this ImageClassifier: it lacks")
    refused(trained("maskrcnn")[0], checkpoint, tmp_path / "out", "is not a checkpoint of this MaskRCNN: it lacks")


def test_another_pruner(trained, images, tmp_path):
    _, checkpoint = trained("classifier")
    config = tiny.classifier(images, "unused", tiny.UNIFORM)
    refused(config, checkpoint, tmp_path / "out", "decisions of another pruner, or of other settings")


def test_a_config_without_a_pruner(trained, images, tmp_path):
    dense = tiny.classifier(images, "unused", pruner=None)
    refused(dense, trained("classifier")[1], tmp_path / "out", "not 'prune_mm.PrunableModel'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["backbone.layer1.0.conv1.weight"].fill_(float("nan")), "does not compute"),
        (lambda s: s["backbone.layer2.0.conv2.weight"].fill_(float("inf")), "does not compute"),
        (lambda s: s["pruner.masks.layer1/0/conv1"].fill_(False), "at least one channel must stay"),
        (lambda s: s.update({"pruner.masks.layer1/0/conv1": torch.ones(3, dtype=torch.bool)}), "do not fit"),
        (lambda s: s.pop("pruner.masks.layer1/0/conv1"), "do not fit"),
        (lambda s: s.pop("head.fc.weight"), "it lacks 'head.fc.weight'"),
    ],
    ids=["nan", "inf", "all-dead", "mask-shape", "no-mask", "no-head"],
)
def test_a_corrupted_checkpoint(change, words, trained, tmp_path):
    config, path = edited(trained, tmp_path, lambda data: change(data["state_dict"]))
    refused(config, path, tmp_path / "out", words)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": 3}, "text", {"state_dict": {}}])
def test_files_that_hold_something_else(content, trained, tmp_path):
    config, _ = trained("classifier")
    torch.save(content, tmp_path / "odd.pth")
    refused(config, tmp_path / "odd.pth", tmp_path / "out", r"odd\.pth")


def test_a_law_that_does_not_hold_is_noticed(trained, tmp_path, monkeypatch):
    # Should a rewrite ever cut the wrong channels, the export must see it.
    from prune_mm.structures import Plan

    original = Plan.compact

    def wrong(plan, model):
        small = original(plan, model)
        with torch.no_grad():
            small.backbone.layer1[0].conv1.weight.copy_(small.backbone.layer1[0].conv1.weight.flip(0))
        return small

    monkeypatch.setattr(Plan, "compact", wrong)
    refused(*trained("classifier"), tmp_path / "out", "does not compute what the masked one does")


def test_a_disk_that_fills_up_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    import prune_mm.engine.exporter as exporter

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "save_file", full)
    refused(*trained("classifier"), tmp_path / "out", "No space left", OSError)


def test_a_full_disk_is_said_in_one_line(trained, tmp_path):
    """The kernel refuses to let files grow, as on a full disk."""
    config, checkpoint = trained("classifier")
    (tmp_path / "full.py").write_text(
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"sys.argv[0] = {str(tiny.TOOLS / 'export.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    path = tiny.write(config, tmp_path / "train.py")
    end = tiny.tool(tmp_path, tmp_path / "full.py", path, checkpoint, tmp_path / "small")
    assert "no room" in end.one_line_error
    assert "File too large" in end.one_line_error
    assert not (tmp_path / "small").exists()
    assert not list(tmp_path.glob(".small*"))


def test_the_tool_says_it_in_one_line(trained, tmp_path):
    _, checkpoint = trained("classifier")
    train = checkpoint.parent / "train.py"
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:3000])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_bytes(b"cat")
    for words, message in [
        ([train, tmp_path / "none.pth", tmp_path / "out"], "no checkpoint at"),
        ([train, tmp_path / "cut.pth", tmp_path / "out"], "damaged or not a checkpoint"),
        ([train, checkpoint, tmp_path / "photos"], "exists and is not an artifact"),
        ([tmp_path / "none.py", checkpoint, tmp_path / "out"], "no config at"),
    ]:
        end = tiny.tool(tmp_path, "export.py", *words)
        assert message in end.one_line_error
    assert not (tmp_path / "out").exists()


def test_a_finetuned_artifact_needs_a_checkpoint_that_fits(trained, tmp_path):
    from mmengine.config import Config

    config, checkpoint = trained("classifier")
    export(config, checkpoint, tmp_path / "a")
    compact = Config.fromfile(tmp_path / "a/config.py")
    refused(compact, checkpoint, tmp_path / "out", r"has shape|another pruner")
    os.remove(tmp_path / "a/report.json")
    tuned = {"state_dict": torch.load(tmp_path / "a/compact.pth", weights_only=True)["state_dict"]}
    torch.save(tuned, tmp_path / "tuned.pth")
    refused(compact, tmp_path / "tuned.pth", tmp_path / "out", "report.json", FileNotFoundError)
    shutil.rmtree(tmp_path / "a")
    refused(compact, tmp_path / "tuned.pth", tmp_path / "out", "no compact artifact at", FileNotFoundError)


def test_what_an_artifact_is_made_of():
    assert set(ARTIFACT_FILES) == {"compact.pth", "model.safetensors", "config.py", "plan.json", "report.json"}
    init_default_scope("mmpretrain")
    assert MODELS.get("prune_mm.CompactModel") is not None
