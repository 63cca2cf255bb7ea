"""Every method decides the same on 1, 2 and 4 processes that share one global batch, and every rank holds the same.

Batch norm uses its running statistics here (``norm_eval``), so that a gradient is the mean over the images of the
global batch however they are spread; what is left is the order of float32 additions.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from test_distributed import SABOTEURS, processes, state

from prune_mm.engine.agreement import shares
from prune_mm.pruners import StrucSpars
from prune_mm.registry import MODELS

GLOBAL_BATCH, EPOCHS = 16, 3
#: Costly here, and shown with 2 processes in other files (without the comparison with 1).
SPARED = [("gconv", 2), ("onexn", 2), ("chex, gconv", 2), ("hinge, onexn", 2)]
EVEN = {"round_to": 2}
HINGE = {
    "type": "Hinge", "target": {"macs": 0.6}, "strength": 10.0, "threshold": 0.2, "min_share": 0.1,
    "layer_balancing": True, "annealing": {"factor": 2, "high": 10, "low": 5},
}  # fmt: skip
ONEXN = {
    "type": "OneByN", "n": 4, "kernels": "all", "rearrange": True, "schedule": "gradual", "begin": 1, "end": 2,
}  # fmt: skip
METHODS = {
    "chex": tiny.CHEX,
    "strucspars": {
        "type": "StrucSpars", "target": {"macs": 0.6}, "warmup": 1, "interval": 2, "delta": 0.01, "threshold": 0.3,
    },
    "gconv": {"type": "GConvPrune", "target": {"params": 0.6}, "max_groups": 8},
    "hinge": HINGE,
    "onexn": ONEXN,
    "chex, gconv": [{**tiny.CHEX, **EVEN}, {"type": "GConvPrune", "groups": 2, "indivisible": "skip"}],
    "hinge, onexn": [{**HINGE, "target": {"macs": 0.75}}, {**ONEXN, "tail": "pad"}],
}  # fmt: skip


def config_of(images, folder, pruner, ranks):
    config = tiny.classifier(images, folder, epochs=EPOCHS)
    config.model.pruner = pruner
    config.model.model.backbone.norm_eval = True
    config.train_dataloader.batch_size = GLOBAL_BATCH // ranks
    config.default_hooks.checkpoint.interval = 100
    config.custom_hooks = [*config.custom_hooks, {"type": "SaveEachRank"}]
    config.custom_imports.imports = [*config.custom_imports.imports, "saboteurs"]
    if "Hinge" in str(pruner):
        config.optim_wrapper.paramwise_cfg = {"custom_keys": {".pair.weight": {"lr_mult": 10.0}}}
        config.param_scheduler = []
    return config


def last_states(folder, ranks):
    """The state of every rank after its last epoch."""
    epochs = len(list(folder.glob("rank0_epoch*.pt")))
    assert epochs > 1
    return [state(folder, rank, epochs - 1) for rank in range(ranks)]


def split(states):
    """Decisions (masks, permutations, groups, counters), and everything with rounding (weights, strengths, ratios)."""
    decided = {key: tensor for key, tensor in states.items() if not tensor.is_floating_point()}
    return decided, {key: tensor.double() for key, tensor in states.items() if tensor.is_floating_point()}


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """``alone('chex')``: the end of the run of one process."""
    made = {}

    def run(method):
        if method not in made:
            folder = tmp_path_factory.mktemp("alone")
            path = tiny.write(config_of(images, folder, METHODS[method], 1), folder / "train.py")
            end = tiny.tool(folder, "train.py", path, PYTHONPATH=SABOTEURS)
            assert end.status == 0, end
            made[method] = last_states(folder, 1)[0]
        return made[method]

    return run


@pytest.mark.parametrize(
    ("method", "ranks"), [(method, ranks) for method in METHODS for ranks in (2, 4) if (method, ranks) not in SPARED]
)
def test_decisions_are_those_of_one_process(method, ranks, images, alone, tmp_path):
    ends = processes(ranks, config_of(images, tmp_path, METHODS[method], ranks), tmp_path)
    assert [end.status for end in ends] == [0] * ranks, ends
    first, *others = last_states(tmp_path, ranks)
    for other in others:
        assert tiny.same(first, other) == [], "every rank holds the same, bit by bit, weights and ratios too"
    decided, rounded = split(first)
    expected, about = split(alone(method))
    assert tiny.same(decided, expected) == []
    for name, tensor in about.items():
        torch.testing.assert_close(rounded[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    masks = [mask for name, mask in decided.items() if ".masks" in name or ".perms" in name]
    assert masks
    assert any("groups" in name or not bool(mask.all()) for name, mask in decided.items() if name.startswith("pruner."))


def test_shares_of_the_work():
    """The longest parts first, each to the rank that has the least."""
    assert shares({"a": 1.0, "b": 5.0, "c": 2.0, "d": 3.0}, 2) == [["b", "a"], ["d", "c"]]
    assert shares({"a": 1.0}, 3) == [["a"], [], []]


@pytest.mark.parametrize("kind", ["alone", "first of a list"])
def test_parts_make_the_decision(kind, images, tmp_path, monkeypatch):
    """What the ranks compute for each other is what one process would; nothing of it is computed twice."""
    config = config_of(images, tmp_path, METHODS["strucspars"], 1)
    if kind == "first of a list":
        config.model.pruner = [METHODS["strucspars"], {"type": "GConvPrune", "groups": 2, "indivisible": "skip"}]
    model = MODELS.build(config.model)
    pruner, module = model.pruner, model.backbone
    pruner.set_schedule(EPOCHS, 3 * EPOCHS)
    expected = pruner.start(module)
    names = pruner.parts(None)
    assert len(names) == 19
    pruner.give_parts({name: pruner.part(module, None, name) for name in names})
    monkeypatch.setattr(StrucSpars, "_sorted_layer", None)
    assert tiny.same(pruner.start(module), expected) == []
    pruner.give_parts({})
    with pytest.raises(TypeError):
        pruner.start(module)
