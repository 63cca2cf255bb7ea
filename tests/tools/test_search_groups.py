"""tools/search_groups.py writes group counts that fit the budget, in a file the pruner reads."""

from __future__ import annotations

import pytest
import tiny
import torch
from mmengine.config import Config

from prune_mm.engine.exporter import build_prunable
from prune_mm.pruners.group_config import match_groups_to_layers, read_groups


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return tiny.write(tiny.classifier(folder / "images", folder / "run"), folder / "tiny.py")


@pytest.fixture(scope="module")
def backbone(config):
    return build_prunable(Config.fromfile(config)).backbone


@pytest.fixture(scope="module")
def checkpoint(backbone, tmp_path_factory):
    """Weights of the scope alone, in which a few kernels of one layer weigh everything: two planted groups."""
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    weight = state["layer4.1.conv2.weight"]
    weight.mul_(1e-6)
    weight[::2, ::2] += 1
    weight[1::2, 1::2] += 1
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(state, path)
    return path


def searched(end, out, backbone) -> dict[str, int]:
    assert end.status == 0, end
    layers = {
        name: (layer.out_channels, layer.in_channels)
        for name, layer in backbone.named_modules()
        if isinstance(layer, torch.nn.Conv2d) and name != "conv1"
    }
    entries = read_groups(out)
    assert list(entries) == list(layers)
    assert all((entry.out_channels, entry.in_channels) == layers[name] for name, entry in entries.items())
    return match_groups_to_layers(entries, layers)


def params_of(backbone, groups: dict[str, int]) -> int:
    modules = dict(backbone.named_modules())
    saved = sum(modules[name].weight.numel() * (count - 1) // count for name, count in groups.items())
    return sum(parameter.numel() for parameter in backbone.parameters()) - saved


def test_search_with_a_checkpoint(config, backbone, checkpoint, tmp_path):
    out, plot = tmp_path / "deep" / "groups.json", tmp_path / "groups.png"
    words = ["--checkpoint", checkpoint, "--max-params", "0.9", "--min-channels", 4, "--out", out, "--plot", plot]
    end = tiny.tool(tmp_path, "search_groups.py", config, *words)
    groups = searched(end, out, backbone)
    assert groups["layer4.1.conv2"] == 2
    assert set(groups.values()) == {1, 2}
    assert params_of(backbone, groups) <= 0.9 * params_of(backbone, {})
    assert "random weights" not in end.out
    for text in ("parameters", "multiply-adds", "kernel norm kept", "layers with 2 groups", str(out)):
        assert text in end.out
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_search_by_multiply_adds_without_a_checkpoint(config, backbone, tmp_path):
    out = tmp_path / "groups.json"
    words = [config, "--max-macs", "0.5", "--min-channels", 2, "--max-groups", 8, "--out", out]
    end = tiny.tool(tmp_path, "search_groups.py", *words)
    groups = searched(end, out, backbone)
    assert 1 < max(groups.values()) <= 8
    assert "warning: without --checkpoint the search sees random weights" in end.out
    again = tiny.tool(tmp_path, "search_groups.py", *words)
    assert again.one_line_error == f"'{out}' exists; choose another file or pass --overwrite"
    published = tiny.tool(tmp_path, "search_groups.py", *words, "--published", "--overwrite")
    assert searched(published, out, backbone) != groups


def test_search_of_a_dense_config(backbone, tmp_path):
    path = tiny.write(tiny.classifier(tmp_path / "images", tmp_path / "run", pruner=None), tmp_path / "dense.py")
    out = tmp_path / "groups.json"
    words = [path, "--max-params", "60k", "--input-size", "32", "--strategy", "MAX_COST", "--absolute", "--out", out]
    groups = searched(tiny.tool(tmp_path, "search_groups.py", *words), out, backbone)
    assert params_of(backbone, groups) <= 60_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a budget is needed: max_params, max_macs or both"),
        (["--max-params", "0.01"], "is too restrictive: with every layer at its largest group count"),
        (["--max-params", "5X"], "max_params='5X' is not a number"),
        (["--max-params", "0.5", "--checkpoint", "none.pth"], "no checkpoint at 'none.pth'"),
        (["--max-params", "0.5", "--min-channels", "-3"], "min_channels=-3"),
        (["--max-params", "0.5", "--plot", "groups.xyz"], "must end in a format of images"),
    ],
)
def test_errors_in_one_line(words, message, config, tmp_path):
    end = tiny.tool(tmp_path, "search_groups.py", config, "--out", tmp_path / "groups.json", *words)
    assert message in end.one_line_error
    assert not (tmp_path / "groups.json").exists()


def test_a_checkpoint_of_another_network(config, tmp_path):
    torch.save({"state_dict": {"backbone.layer1.0.conv1.weight": torch.ones(4, 4, 3, 3)}}, tmp_path / "other.pth")
    words = [config, "--out", tmp_path / "g.json", "--max-params", "0.5", "--checkpoint", tmp_path / "other.pth"]
    message = tiny.tool(tmp_path, "search_groups.py", *words).one_line_error
    assert "'backbone.layer1.0.conv1.weight' has shape (4, 4, 3, 3), not (8, 8, 3, 3)" in message
    assert not (tmp_path / "g.json").exists()
