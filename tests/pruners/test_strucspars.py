"""StrucSpars as a whole: what it adds to gradients, when it decides, what it ends with."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
import torchvision
from torch import nn

from prune_mm.graph import count_gathers, trace
from prune_mm.pruners import StrucSpars
from prune_mm.pruners.strucspars_math import cost_matrix
from prune_mm.structures import GroupedConv, Plan

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Four convolutions: a stem, two that can be halved to different depths, and one that cannot."""

    def __init__(self, base=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 16, 3, padding=1, groups=base, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 6, 1)
        self.c = nn.Conv2d(6, 9, 1)

    def forward(self, x):
        return self.c(self.b(self.norm(self.a(self.stem(x).relu())).relu()).relu())


def prepared(module, pruner, positions=None):
    graph = trace(module, IMAGE, grouping=True)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    pruner.prepare(module, graph, shapes, positions or dict.fromkeys(graph.weights, 1))
    return pruner


def begun(base=1, epochs=4, iterations=20, **options):
    torch.manual_seed(0)
    module = Small(base)
    options = {"target": {"weights": 0.6}, "warmup": 1, "interval": 3, "delta": 0.1, **options}
    pruner = prepared(module, StrucSpars(**options))
    pruner.set_schedule(epochs, iterations)
    pruner.commit(module, pruner.start(module), 0)
    pruner.started.fill_(True)
    return module, pruner


def run(module, pruner, until, start=0):
    """Decide whenever it is due; the weights do not change."""
    seen = []
    for step in range(start, until + 1):
        if pruner.due(step):
            pruner.commit(module, pruner.decide(module, step), step)
            seen.append(step)
    return seen


def test_it_decides_about_every_convolution_but_the_stem():
    _, pruner = begun()
    assert [layer.name for layer in pruner.layers] == ["a", "b", "c"]
    assert pruner.left_dense["stem"] == "8 outputs and 3 inputs have no common divisor"
    assert pruner.left_dense["c"] == "9 outputs and 6 inputs cannot both be halved"
    resnet = prepared(torchvision.models.resnet50(), StrucSpars({"weights": 0.65}))
    assert len(resnet.layers) == 52
    assert resnet.cost.dense("weights") == 23_445_504


@pytest.mark.parametrize("base", [1, 2])
def test_the_first_decision_sorts_every_layer_and_divides_none(base):
    module, pruner = begun(base)
    assert pruner.groups.tolist() == [1, 1, 1]
    assert pruner.structures() == []
    norms = module.a.weight.detach().double().abs().sum((2, 3))
    rows, columns = pruner.perms["out:a"], pruner.perms["in:a"]
    width = 8 // base
    for index in range(base):
        block = norms[rows[index * 16 // base : (index + 1) * 16 // base]][
            :, columns[index * width :][:width] - index * width
        ]
        cost = cost_matrix(16 // base, width)
        plain = (cost * norms[index * 16 // base : (index + 1) * 16 // base]).sum()
        assert (cost * block).sum() < plain


def test_gradients_get_the_term_after_the_warmup_and_only_then():
    module, pruner = begun()
    weights = {name: module.get_submodule(name).weight for name in ("stem", "a", "b", "c")}
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    pruner.before_step(module)
    assert all(float(w.grad.abs().max()) == 0.0 for w in weights.values())
    run(module, pruner, until=5)
    assert int(pruner.epochs_done) == 1
    pruner.before_step(module)
    assert float(weights["stem"].grad.abs().max()) == float(weights["c"].grad.abs().max()) == 0.0
    for name in ("a", "b"):
        weight, layer = weights[name], next(layer for layer in pruner.layers if layer.name == name)
        rows, columns = (pruner.perms[f"{side}:{name}"] for side in ("out", "in"))
        level = int(pruner.levels[pruner.layers.index(layer)])
        ordered = cost_matrix(layer.outputs, layer.inputs, level).float()
        expected = torch.zeros(layer.outputs, layer.inputs)
        expected[rows[:, None], columns] = ordered
        torch.testing.assert_close(weight.grad, 0.1 * weight.sign() * expected[:, :, None, None])


def test_golden_controller_through_the_class(monkeypatch):
    """Spec 12.11: the coefficient of each epoch when sparsity goes as given."""
    given = [0, 0, 0, 0.02, 0.10, 0.20, 0.30, 0.36, 0.40, 0.34]
    module, pruner = begun(epochs=10, iterations=10, warmup=2, delta=2e-6, target={"weights": 0.65}, interval=None)
    queue = iter(given)
    original = pruner._sparsity
    monkeypatch.setattr(pruner, "_sparsity", lambda levels: next(queue, None) or 0.0)
    used = []
    for step in range(1, 10):
        used.append(pruner.strength())
        run(module, pruner, step, start=step)
    used.append(pruner.strength())
    assert [round(value * 1e6, 6) for value in used] == [0, 0, 2, 4, 6, 6, 6, 6, 4, 2]
    monkeypatch.setattr(pruner, "_sparsity", original)


def test_moments_of_decision():
    module, pruner = begun(epochs=4, iterations=20, interval=3)
    assert run(module, pruner, 20) == [3, 5, 6, 9, 10, 12, 15, 18, 20]
    assert int(pruner.epochs_done) == 4
    assert bool(pruner.masked)
    assert not any(pruner.due(step) for step in range(30))
    module, pruner = begun(epochs=None, iterations=10, interval=None, epoch_iters=4)
    assert run(module, pruner, 10) == [4, 10]


@pytest.mark.parametrize("base", [1, 2])
@pytest.mark.parametrize("kind", ["weights", "params", "macs"])
def test_the_end_meets_the_target_and_obeys_the_law(kind, base):
    module, pruner = begun(base, target={kind: 0.7})
    run(module, pruner, 20)
    groups = pruner.groups.tolist()
    assert pruner.cost.of(kind, groups) <= 0.7 * pruner.cost.dense(kind)
    assert float(pruner.final_threshold) >= 0.0
    masked = copy.deepcopy(module).eval()
    module.a.weight.data.add_(1.0)
    pruner.after_step(module)
    for conv in pruner.convs():
        weight = module.get_submodule(conv.name).weight
        assert not weight.detach()[~conv.mask()].any()
        assert int((weight != 0).sum()) == weight.numel() // (conv.groups // conv.base)
    plan = Plan("", (tuple(pruner.structures()),))
    small = plan.compact(copy.deepcopy(masked))
    assert sum(p.numel() for p in small.parameters()) == pruner.cost.of("params", groups)
    torch.testing.assert_close(small(IMAGE), masked(IMAGE), rtol=1e-4, atol=1e-5)
    assert pruner.strength() == 0.0


def test_a_planted_network_is_found_again():
    """Convolutions that are grouped in secret, behind shuffled channels, get their groups back without any loss."""
    torch.manual_seed(1)
    module = Small().eval()
    with torch.no_grad():
        for conv in (module.a, module.b):
            groups = 2
            perms = torch.randperm(conv.out_channels), torch.randperm(conv.in_channels)
            mask = GroupedConv.from_perms("", groups, *perms).mask()
            conv.weight.mul_(mask[:, :, None, None])
    before = module(IMAGE)
    pruner = prepared(module, StrucSpars({"weights": 0.62}, warmup=0, threshold=0.01))
    pruner.set_schedule(2, 8)
    pruner.commit(module, pruner.start(module), 0)
    run(module, pruner, 8)
    assert pruner.groups.tolist()[:2] == [2, 2]
    torch.testing.assert_close(module(IMAGE), before)


def test_a_search_that_moved_nothing_says_so():
    module, pruner = begun()
    run(module, pruner, 19)
    with pytest.warns(UserWarning, match=r"ended with 0% of the weights saved, of 40% .* Raise delta=0\.1, or search"):
        pruner.decide(module, 20)


def test_a_search_that_found_its_groups_says_nothing():
    module, pruner = begun()
    with torch.no_grad():
        for name in ("a", "b"):
            layer = next(each for each in pruner.layers if each.name == name)
            weight = pruner.weight(module, layer)
            perms = (pruner.perms[f"{side}:{name}"] for side in ("out", "in"))
            weight.mul_(GroupedConv.from_perms("", 2, *perms).mask()[:, :, None, None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(module, pruner, 20)
    assert pruner.groups.tolist()[:2] == [2, 2]


def test_an_unfinished_search_can_be_concluded():
    module, pruner = begun()
    run(module, pruner, 10)
    assert pruner.conclude(module) is True
    assert pruner.cost.of("weights", pruner.groups.tolist()) <= 0.6 * pruner.cost.dense("weights")
    assert pruner.conclude(module) is False


def test_limits():
    _, pruner = begun(max_groups=2, target={"weights": 0.6})
    assert pruner.deepest == [2, 2, 1]
    _, faithful = begun(faithful=True, target={"weights": 0.6})
    assert faithful.deepest == [3, 1, 1]
    torch.manual_seed(0)
    module = Small()
    module.a.weight.requires_grad_(False)
    assert [layer.name for layer in prepared(module, StrucSpars({"weights": 0.8})).layers] == ["b", "c"]
    assert len(prepared(module, StrucSpars({"weights": 0.8}, include_frozen=True)).layers) == 3


def test_pictures():
    module, pruner = begun()
    run(module, pruner, 20)
    pictures = dict(pruner.images(module))
    assert list(pictures) == ["a", "b", "c"]
    for picture in pictures.values():
        assert picture.dtype.name == "uint8"
        assert picture.shape[2] == 3
        assert picture.shape[1] > 2 * picture.shape[0] * 6 // 16
    halves = pictures["a"][1:-1, 1:129, 0], pictures["a"][1:-1, -129:-1, 0]  # without their frames
    # After the end the kernels between groups are white, as the regulariser is dark there.
    assert halves[0][halves[1] == 0].min() == 255


def test_state_travels_in_the_state_dict():
    module, pruner = begun()
    run(module, pruner, 10)
    _, other = begun()
    other.load_state_dict(pruner.state_dict())
    rest = [run(copy.deepcopy(module), p, 20, start=11) for p in (pruner, other)]
    assert rest[0] == rest[1]
    for name, value in pruner.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"channels": 0.5}}, "keys macs, params, weights, got {'channels': 0.5}"),
        ({"target": {"weights": 1.5}}, "must be a share"),
        ({"warmup": -1}, "warmup=-1"),
        ({"delta": 0}, "delta=0 must be a positive number"),
        ({"threshold": 1.0}, "threshold=1.0 must be a share in [0, 1)"),
        ({"power": 1.5}, "power=1.5 must be in (0, 1]"),
        ({"interval": 0}, "interval=0"),
        ({"max_groups": 0}, "max_groups=0"),
        ({"ignore": "a"}, "ignore='a' must be a list"),
        ({"faithful": 1}, "faithful=1 must be True or False"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StrucSpars(**{"target": {"weights": 0.5}, **options})


@pytest.mark.parametrize(
    ("options", "schedule", "message"),
    [
        ({"target": {"weights": 0.1}}, (4, 20), "out of reach: with as many groups as its channels allow, the scope"),
        ({"target": {"weights": 0.5}, "max_groups": 1}, (4, 20), "and max_groups=1 allow"),
        ({"ignore": ["nothing"]}, (4, 20), "ignore pattern 'nothing' matches no convolution"),
        ({"ignore": ["."]}, (4, 20), "no convolution can be divided into groups"),
        ({"warmup": 4}, (4, 20), "warmup=4 must end before the training, which has 4 epochs"),
        ({"epoch_iters": 5}, (4, 20), "epoch_iters=5 is for a training that counts iterations"),
        ({"interval": None}, (None, 20), "needs epoch_iters"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options, schedule, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        begun(epochs=schedule[0], iterations=schedule[1], **options)


def test_shared_orders_survive_every_level():
    """Layers in a chain share one order: whatever levels they end at, no gather is left between them."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1),
    )  # fmt: skip
    pruner = prepared(module, StrucSpars({"weights": 0.45}, warmup=0, interval=3, share_orders=True))
    pruner.set_schedule(2, 8)
    pruner.commit(module, pruner.start(module), 0)
    run(module, pruner, 8)
    pruner.groups.copy_(torch.tensor([2, 8, 4]))
    pruner._forget()
    pruner.mask(module)
    assert torch.equal(pruner.perms["out:2"], pruner.perms["in:5"])
    stage = pruner.structures()
    # The stem's outputs are free; the end of the network is not.
    assert count_gathers(stage) <= 1
    masked = copy.deepcopy(module).eval()
    small = Plan("", (tuple(stage),)).compact(copy.deepcopy(module)).eval()
    torch.testing.assert_close(small(IMAGE), masked(IMAGE), rtol=1e-4, atol=1e-5)
