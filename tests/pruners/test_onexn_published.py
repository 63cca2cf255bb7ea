"""OneByN on the published networks: which layers, how many zeros, in which order; and its configs."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope
from onexn_nets import (
    IMAGE,
    NETWORKS,
    build,
    prepared,
    rearranged,
    started,
    zeros,
)
from torch import nn

from prune_mm.engine.compact import without_pretrained
from prune_mm.pruners import OneByN
from prune_mm.pruners.onexn_math import block_share
from prune_mm.registry import PRUNERS
from prune_mm.structures import Plan
from prune_mm.structures.block_layer import BlockSparseLayer

#: Zeros at a rate of 0.5 as published, for every N.
PUBLISHED = {"v1": 1_569_792, "v2": 1_062_336, "v3_small": 426_496, "v3_large": 1_425_216, "r50": 11_722_752}

#: Layers whose filters N does not divide, and ours with tail='dense' then. The published code lets blocks run into the
#: next input channel there (one more layer each: the classifier), which reaches the count but is no 1xN pattern.
TAILS = {
    ("v2", 16): (2, 1_061_376),
    ("v2", 32): (5, 1_058_816),
    ("v3_small", 16): (13, 420_928),
    ("v3_small", 32): (25, 404_224),
    ("v3_large", 16): (19, 1_414_016),
    ("v3_large", 32): (29, 1_374_592),
}


@pytest.fixture(scope="module")
def published():
    """``published('v2')``: a network and a pruner with N=4 and rearranged filters, prepared once."""
    made = {}

    def make(name):
        if name not in made:
            module = build(NETWORKS[name])
            kernels = "all" if name == "r50" else "pointwise"
            made[name] = module, prepared(module, OneByN(n=4, kernels=kernels, rearrange=True))
        return made[name]

    return make


def masked_at(published, name, n, tail="dense", rearrange=False):
    """Masked network and pruner for another N: which layers are pruned does not depend on it."""
    module, pruner = published(name)
    pruner = copy.deepcopy(pruner)
    pruner.n, pruner.tail = n, tail
    if not rearrange:
        pruner._orders = {}
    module = copy.deepcopy(module)
    return module, started(module, pruner)


@pytest.mark.parametrize("name", NETWORKS)
def test_published_numbers_of_zeros(name, published):
    _, pruner = published(name)
    layers = {"v1": 13, "v2": 34, "v3_small": 40, "v3_large": 46, "r50": 52}
    assert len(pruner.layers) == layers[name]
    assert sum(math.prod(layer.shape) for layer in pruner.layers) == 2 * PUBLISHED[name]
    for n in (4, 32) if name == "r50" else (1, 2, 4, 8, 16, 32):
        uneven, expected = TAILS.get((name, n), (0, PUBLISHED[name]))
        assert sum(layer.shape[0] % n > 0 for layer in pruner.layers) == uneven
        assert zeros(masked_at(published, name, n)[1]) == expected, n
        if uneven:
            # Smaller blocks at the end count like others: the rate is reached in blocks, not in weights.
            masks = masked_at(published, name, n, tail="pad")[1].masks
            for layer in pruner.layers:
                blocks = masks[layer.name].flatten(1)[::n]
                assert int((~blocks).sum()) == int(blocks.numel() * 0.5), layer.name


def test_layers_that_stay_dense(published):
    for name in NETWORKS:
        module, pruner = published(name)
        taken = {layer.name for layer in pruner.layers}
        for layer, child in module.named_modules():
            if isinstance(child, nn.Conv2d):
                assert (layer in taken) != (layer in pruner.left_dense), layer
                assert layer in taken or child.groups > 1 or child.in_channels == 3
        reasons = set(pruner.left_dense.values())
        assert "reads the input of the scope" in reasons


# -- filter rearrangement ---------------------------------------------------------------------------------------------


def test_layers_that_are_rearranged(published):
    """The published rule, as far as it can be physical, and what else is exact.

    Published: V1 all; V2 and V3 expansions and the last convolution; ResNet all but the last of each block. Not ours:
    the last convolution of the scope, whose outputs are seen; expansions in front of a gate; the projections of
    ResNet's shortcuts. Ours besides: projections that meet no add, and the squeezing halves of gates.
    """
    found = {name: rearranged(published(name)[1]) for name in NETWORKS}
    every = {name: {layer.name for layer in published(name)[1].layers} for name in NETWORKS}
    assert every["v1"] - found["v1"] == {"layer5.1.conv2"}
    # Blocks 2 to 17 of V2 have an expansion.
    expansions = {name for name in every["v2"] if name.endswith("conv.0.conv")}
    assert len(expansions) == 16
    assert found["v2"] == expansions | {"layer1.0.conv.1.conv", "layer7.0.conv.2.conv"}
    for name in ("v3_small", "v3_large"):
        module = published(name)[0]
        gated = {block for block, child in module.named_children() if getattr(child, "with_se", False)}
        blocks = {layer.split(".")[0] for layer in every[name] if "expand_conv" in layer}
        squeezes = {f"{block}.se.conv1.conv" for block in gated}
        assert found[name] - {"layer1.linear_conv.conv"} == squeezes | {
            f"{block}.expand_conv.conv" for block in blocks - gated
        }
    assert len(found["r50"]) == 32
    assert every["r50"] - found["r50"] == {
        name for name in every["r50"] if name.endswith(("conv3", "downsample.0"))
    }  # fmt: skip


@pytest.mark.parametrize(("name", "n"), [("v1", 16), ("v2", 4), ("v3_small", 8), ("r50", 4)])
def test_the_pattern_is_1xn_in_memory(name, n, published):
    """The share of blocks that are not empty in the compact weight is 1 - rate, though it is not in the masked one."""
    masked, pruner = masked_at(published, name, n, rearrange=True)
    small = Plan("", (tuple(pruner.structures()),)).compact(copy.deepcopy(masked))
    image = IMAGE[:1]
    with torch.no_grad():
        for expected, found in zip(masked(image), small(image), strict=True):
            assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
    scattered = []
    for layer in pruner.layers:
        compact = small.get_submodule(layer.name)
        assert isinstance(compact, BlockSparseLayer)
        assert compact.rows is None, layer.name
        assert block_share(compact.dense_weight(), n) == pytest.approx(0.5, abs=n / layer.shape[0]), layer.name
        if layer.shape[0] % n == 0:
            assert block_share(compact.dense_weight(), n) == 0.5
        if layer.name in pruner._orders and layer.shape[0] >= 8 * n:
            scattered.append(block_share(pruner.masks[layer.name], n))
        if layer.name not in pruner._orders:
            assert pruner.perms[layer.name].tolist() == list(range(layer.shape[0]))
    assert min(scattered) > 0.75
    status = pruner.status()
    assert status["blocks"] == pytest.approx(0.5, abs=0.03 if name.startswith("v3") else 1e-9)


# -- configs ----------------------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("onexn_*.py")), ids=lambda path: path.stem)
def test_configs_build(path):
    config = Config.fromfile(path)
    pruner = PRUNERS.build({**config.model.pruner, "type": "OneByN"})
    assert pruner.rearrange
    assert pruner.rate == 0.5
    assert any(hook.type == "prune_mm.PruningHook" for hook in config.custom_hooks)
    pruner.set_schedule(config.train_cfg.get("max_epochs"), config.train_cfg.get("max_iters") or 10**6)
    name = path.stem.removeprefix("onexn_").replace("mobilenet_", "").replace("resnet50", "r50")
    if name in NETWORKS:
        backbone = config.model.model.backbone
        assert {key: backbone.get(key) for key in NETWORKS[name]} == NETWORKS[name]
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(without_pretrained(config.model)) if name in ("ssd300", "maskrcnn") else None
    if model is not None:
        layers = {layer.name for layer in model.pruner.layers}
        assert len(layers) == 14 if name == "ssd300" else len(layers) > 15


def test_published_learning_rates():
    """Spec 3: SGD at 0.01, 180 epochs of 5005 iterations."""
    config = Config.fromfile(CONFIGS / "onexn_mobilenet_v2.py")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr)
    published = {(0, 0): 3.98796e-7, (2, 0): 0.0039975, (4, 5004): 0.009999194, (5, 0): 0.01, (90, 0): 0.005224324,
                 (179, 0): 8.0566e-7}  # fmt: skip
    schedulers = [
        PARAM_SCHEDULERS.build(dict(each), default_args={"optimizer": optimizer, "epoch_length": 5005})
        for each in config.param_scheduler
    ]
    found = {}
    for epoch in range(180):
        for step in range(5005 if epoch < 5 else 1):
            found[epoch, step] = optimizer.param_groups[0]["lr"]
            if not schedulers[0].by_epoch:
                optimizer.step()
                schedulers[0].step()
        schedulers[1].step()
    for moment, rate in published.items():
        assert found[moment] == pytest.approx(rate, rel=3e-3 if moment[0] < 5 else 1e-4), moment
