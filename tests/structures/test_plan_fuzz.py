"""Whatever is done to a plan: a ValueError in one line, or a network that runs and whose plan round-trips."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_mm.structures import (
    BlockSparse,
    ChannelOrder,
    ChannelSlice,
    ConvPair,
    GroupedConv,
    GroupSlice,
    LowRank,
    Plan,
    ShortcutSlice,
    Slot,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()


def grouped_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 3)).eval()


def slots(end: str, *channels: int, **own: str) -> tuple[Slot, ...]:
    """Everywhere the channels lie between layer 0 and the layer that reads them."""
    names = {"0.weight": "out", "0.bias": "bias", "1.weight": "scale", "1.bias": "shift", "1.running_mean": "mean"}
    found = [Slot(name, 0, channels, role) for name, role in (names | {"1.running_var": "var"}).items()]
    return (*found, *(Slot(name, 0, channels, role) for name, role in own.items()), Slot(end, 1, channels, "in"))


EVERY = (0, 1, 2, 3)
ROWS = (Slot("3.weight", 0, (0, 1), "out"), Slot("3.bias", 0, (0, 1), "bias"))
KEPT = torch.tensor([[True, False, True, True]])
CASES = {
    "slices": (
        network,
        Plan("", ((ChannelSlice("0", (0, 2), 4, slots("3.weight", *EVERY)), ShortcutSlice("3", (1,), 2, ROWS, "3")),)),
    ),
    "groups": (
        network,
        Plan(
            "",
            (
                (
                    ChannelOrder("0", (2, 0, 3, 1), slots("3.weight", *EVERY)),
                    GroupedConv.from_perms("3", 2, (1, 0), (2, 0, 1, 3)),
                ),
                (GroupedConv.from_perms("0", 1, (3, 2, 1, 0), (2, 0, 1)),),
            ),
        ),
    ),
    "pairs": (
        network,
        Plan(
            "",
            (
                (ConvPair("0", 4, 4), ConvPair("3", 2, 2)),
                (LowRank("0", (0, 3), 4), LowRank("3", (1,), 2, merge=True)),
            ),
        ),
    ),
    "blocks": (
        network,
        Plan(
            "",
            (
                (
                    ChannelOrder("0", (2, 0, 3, 1), slots("3.weight", *EVERY)),
                    BlockSparse.from_kept("3", 2, 2, KEPT, (1, 0)),
                    BlockSparse.from_kept("0", 3, 4, torch.tensor([[True, False, True], [False, True, True]])),
                ),
            ),
        ),
    ),
    "cardinality": (
        grouped_network,
        Plan(
            "",
            (
                (
                    GroupSlice(
                        "2",
                        (1,),
                        2,
                        (
                            *slots("3.weight", 0, 0, 1, 1),
                            Slot("2.weight", 0, (0, 0, 1, 1), "out"),
                            Slot("2.bias", 0, (0, 0, 1, 1), "bias"),
                        ),
                        ("2",),
                    ),
                ),
            ),
        ),
    ),
}
KINDS = sorted({type(structure).__name__ for _, plan in CASES.values() for stage in plan.stages for structure in stage})
NAMES = ("", "0", "1", "3", "nowhere", "0.weight", "3.weight", "3.pair.weight", "0.pair", "weight", "0.forward")
WORDS = (*KINDS, *NAMES, "a\nb\x1b[2J", "\ud800", "__class__", "forward", "1.num_batches_tracked", "x" * 3000)
NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 4, 5, 8, 2**16, 2**22, 2**24, 2**31, 2**63, 10**30, 0.0, 1.0, 1.5, 1e300)


def tables(children):
    keys = st.sampled_from(["type", "name", "keep", "slots", "channels", "tensor", "axis", "role", "order", "x"])
    return st.dictionaries(keys, children, max_size=3)


JUNK = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | st.integers() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=5) | tables(children),
    max_leaves=8,
)


def paths(node, path=()):
    yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from paths(value, (*path, key))


def mutate(draw, data):
    """One change anywhere in the plan."""
    *way, last = draw(st.sampled_from([path for path in paths(data) if path]))
    parent = data
    for key in way:
        parent = parent[key]
    action = draw(st.sampled_from(["replace", "delete", "repeat", "swap", "number", "word"]))
    if action == "replace":
        parent[last] = draw(JUNK)
    elif action == "delete":
        del parent[last]
    elif action == "number" and isinstance(parent[last], int):
        parent[last] = draw(st.sampled_from(NUMBERS))
    elif action == "word" and isinstance(parent[last], str):
        parent[last] = draw(st.sampled_from(WORDS))
    elif isinstance(parent, list) and action == "repeat":
        parent.insert(draw(st.integers(0, len(parent))), copy.deepcopy(parent[last]))
    elif isinstance(parent, list) and action == "swap":
        other = draw(st.integers(0, len(parent) - 1))
        parent[last], parent[other] = parent[other], parent[last]


@st.composite
def mutated(draw):
    name = draw(st.sampled_from(sorted(CASES)))
    data = json.loads(CASES[name][1].to_json())
    for _ in range(draw(st.integers(1, 3))):
        mutate(draw, data)
        if not isinstance(data, dict) or len(list(paths(data))) < 2:
            break
    return name, json.dumps(data)


@pytest.mark.parametrize("name", CASES)
def test_the_plans_themselves_work(name):
    build, plan = CASES[name]
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.compact(build())(torch.randn(1, 3, 8, 8)).shape == (1, 2, *((4, 4)))


@given(mutated())
def test_any_change(case):
    name, text = case
    try:
        plan = Plan.from_json(text)
    except ValueError as error:
        check_message(error)
        return
    assert Plan.from_json(plan.to_json()) == plan
    build = CASES[name][0]
    dense, net = build(), build()
    shapes = {key: tuple(tensor.shape) for key, tensor in dense.named_parameters()}
    expected = masked_form(plan, dense)
    before = [(key, tensor.clone()) for key, tensor in net.state_dict().items()]
    try:
        plan.compact(net)
    except ValueError as error:
        check_message(error)
        if len(plan.stages) == 1:  # refused before anything is changed
            after = net.state_dict()
            assert all(torch.equal(tensor, after[key]) for key, tensor in before)
        return
    macs = plan.shapes(shapes)
    assert all(size >= 0 for shape in macs.values() for size in shape)
    check_function(net, expected)


def masked_form(plan, net):
    """What the masked form computes, where there is one."""
    try:
        plan.apply_masks(net)
    except ValueError as error:
        check_message(error)
        return None
    return net(IMAGE)


def check_message(error):
    assert type(error) is ValueError, repr(error)
    assert str(error)


def check_function(net, expected):
    """The compact network computes what the masked one does, or does not fit together, which loading tries out."""
    try:
        found = net(IMAGE)
    except (RuntimeError, ValueError, IndexError):
        return
    assert found.isfinite().all()


IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


BOMBS = {
    "deep": "[" * 10**6,
    "deep in a structure": '{"format":"prune_mm.plan","version":1,"scope":"","stages":' + "[" * 900 + "]" * 900 + "}",
    "twice": '{"format":"prune_mm.plan","version":1,"version":1,"scope":"","stages":[]}',
    "nan": '{"format":"prune_mm.plan","version":NaN}',
    "infinite": '{"format":"prune_mm.plan","version":1e999}',
    "digits": '{"format":"prune_mm.plan","version":' + "1" * 10**6 + "}",
    "long": '"' + "a" * (1 << 25) + '"',
    "no text": b"{}",
    "nothing": None,
    "surrogate": '{"format":"\\ud800"}',
    "behind the end": '{"format":"prune_mm.plan","version":1,"scope":"","stages":[]} x',
}


@pytest.mark.parametrize("name", BOMBS)
def test_json_that_is_made_to_hurt(name):
    with pytest.raises(ValueError, match="plan") as caught:
        Plan.from_json(BOMBS[name])
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("key", ["channels", "outputs", "rank"])
def test_few_bytes_cannot_stand_for_millions_of_channels(key):
    kinds = {
        "channels": {"type": "ChannelSlice", "name": "0", "keep": [0], "slots": []},
        "outputs": {"type": "BlockSparse", "name": "0", "n": 1 << 24, "inputs": 1, "out_perm": None, "kept": "gA=="},
        "rank": {"type": "LowRank", "name": "0", "keep": [0], "merge": False},
    }
    stage = [kinds[key] | {key: 1 << 24}] * 1000
    text = json.dumps({"format": "prune_mm.plan", "version": 1, "scope": "", "stages": [stage]})
    with pytest.raises(ValueError, match="its layers would have 16777216000 channels, more than"):
        Plan.from_json(text)
    slot = {"tensor": "0.weight", "axis": 0, "role": "out"}
    kinds["channels"]["slots"] = [slot] * 1000
    stage = [kinds["channels"] | {"channels": 1 << 16}]
    text = json.dumps({"format": "prune_mm.plan", "version": 1, "scope": "", "stages": [stage]})
    with pytest.raises(ValueError, match="its layers would have"):
        Plan.from_json(text)
