"""A damaged plan, or a plan for another network, is a ValueError that names what is wrong. Never anything else."""

import copy
import json
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from prune_mm.structures import ChannelOrder, ChannelSlice, GroupedConv, Plan, ShortcutSlice, Slot, structure_from_dict
from prune_mm.structures.plan import merge_cuts


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))


EVERY = (0, 1, 2, 3)
SLOTS = (
    Slot("0.weight", 0, EVERY, "out"),
    Slot("0.bias", 0, EVERY, "bias"),
    Slot("1.weight", 0, EVERY, "scale"),
    Slot("1.bias", 0, EVERY, "shift"),
    Slot("1.running_mean", 0, EVERY, "mean"),
    Slot("1.running_var", 0, EVERY, "var"),
    Slot("3.weight", 1, EVERY, "in"),
)
PLAN = Plan(
    "",
    (
        (
            ChannelSlice("0", (0, 2), 4, SLOTS),
            ShortcutSlice("3", (1,), 2, (Slot("3.weight", 0, (0, 1), "out"), Slot("3.bias", 0, (0, 1), "bias")), "3"),
        ),
    ),
)
GROUPED = Plan(
    "",
    (
        (
            ChannelOrder("0", (2, 0, 3, 1), SLOTS),
            GroupedConv.from_perms("3", 2, (1, 0), (2, 0, 1, 3)),
        ),
        (GroupedConv.from_perms("0", 1, (3, 2, 1, 0), (2, 0, 1)),),
    ),
)


def damaged(plan=PLAN, **changes):
    """The plan's data with some places changed, each named by its path."""
    data = json.loads(plan.to_json())
    for path, value in changes.items():
        *way, last = [int(k) if k.isdigit() else k for k in path.split("__")]
        place = data
        for key in way:
            place = place[key]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
    return json.dumps(data)


def test_the_undamaged_plan_is_read_and_works():
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert PLAN.compact(network())(torch.randn(1, 3, 8, 8)).shape == (1, 2, 4, 4)
    assert Plan.from_json(GROUPED.to_json()) == GROUPED
    assert GROUPED.compact(network())(torch.randn(1, 3, 8, 8)).shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "'format' must be 'prune_mm.plan'"),
        ({"format": KeyError}, "'format'"),
        ({"version": 2}, "has version 2, this prune_mm reads version 1"),
        ({"version": True}, "has version True"),
        ({"version": "1"}, "has version '1'"),
        ({"version": KeyError}, "has version None"),
        ({"scope": 3}, "'scope' must be text"),
        ({"stages": {}}, "'stages' must be a list of lists"),
        ({"stages": [3]}, "'stages' must be a list of lists"),
        ({"stages__0__0": 7}, "a structure must be a table, got int"),
        ({"stages__0__0": None}, "a structure must be a table, got NoneType"),
        ({"stages__0__0__type": "Magic"}, "unknown structure type 'Magic'; known: .*ChannelSlice"),
        ({"stages__0__0__type": ["a"]}, "unknown structure type"),
        ({"stages__0__0__type": KeyError}, "unknown structure type None"),
        ({"stages__0__0__name": 5}, "ChannelSlice: name must be text, got 5"),
        ({"stages__0__0__name": KeyError}, "damaged ChannelSlice 'None': the key 'name' is missing"),
        ({"stages__0__0__channels": "4"}, "'0': channels must be an integer in 1..16777216, got '4'"),
        ({"stages__0__0__channels": 4.0}, "channels must be an integer"),
        ({"stages__0__0__channels": True}, "channels must be an integer"),
        ({"stages__0__0__channels": 0}, "channels must be an integer"),
        ({"stages__0__0__channels": 10**12}, "channels must be an integer"),
        ({"stages__0__0__channels": float("inf")}, "Infinity is not a number"),
        ({"stages__0__0__keep": []}, "'0': keep is empty, at least one channel must stay"),
        ({"stages__0__0__keep": [-1, 2]}, "'0': keep must be ascending indices below 4"),
        ({"stages__0__0__keep": [2, 1]}, "keep must be ascending"),
        ({"stages__0__0__keep": [1, 1]}, "keep must be ascending"),
        ({"stages__0__0__keep": [4]}, "keep must be ascending indices below 4"),
        ({"stages__0__0__keep": [10**30]}, "keep must be ascending"),
        ({"stages__0__0__keep": [1.0]}, "keep must be a list of integers"),
        ({"stages__0__0__keep": [True]}, "keep must be a list of integers"),
        ({"stages__0__0__keep": "01"}, "keep must be a list of integers"),
        ({"stages__0__0__keep": KeyError}, "the key 'keep' is missing"),
        ({"stages__0__0__slots": {}}, "'0': slots must be a list"),
        ({"stages__0__0__slots__0": 1}, "a slot must be a table"),
        ({"stages__0__0__slots__0__tensor": None}, "tensor of a slot must be text"),
        ({"stages__0__0__slots__0__axis": -1}, "slot of '0.weight': axis must be an integer in 0..7, got -1"),
        ({"stages__0__0__slots__0__axis": "0"}, "slot of '0.weight': axis"),
        ({"stages__0__0__slots__0__axis": KeyError}, "the key 'axis' is missing"),
        ({"stages__0__0__slots__0__role": "king"}, "slot of '0.weight': unknown role 'king'"),
        ({"stages__0__0__slots__0__role": []}, "unknown role"),
        ({"stages__0__0__slots__0__channels": [0, 1, 2, 4]}, "channels must be an integer in -1..3, got 4"),
        ({"stages__0__0__slots__0__channels": [0, 1, 2, -2]}, "got -2"),
        ({"stages__0__0__slots__0__channels": 3}, "slot of '0.weight': channels must be a list"),
        ({"stages__0__0__slots__0__channels": []}, "channels must be a list"),
        ({"stages__0__1__end": None}, "ShortcutSlice '3': end must be text"),
        ({"stages__0__1__slots": []}, "ShortcutSlice '3': slots is empty"),
    ],
)
def test_damage_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(damaged(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages__0__0__name": []}, r"ChannelOrder: name must be text, got \[\]"),
        ({"stages__0__0__order": KeyError}, "damaged ChannelOrder '0': the key 'order' is missing"),
        ({"stages__0__0__order": "0123"}, "ChannelOrder '0': order and slots must be lists"),
        ({"stages__0__0__order": []}, "ChannelOrder '0': length of order must be an integer in 1"),
        ({"stages__0__0__order": [0, 1, 2, 2]}, "'0': order must hold every index below its length, 4, once"),
        ({"stages__0__0__order": [0, 1, 2, -1]}, "'0': order must hold every index"),
        ({"stages__0__0__order": [0, 1, 2, True]}, "'0': order must be a list of integers"),
        ({"stages__0__0__order": [2, 0, 1]}, "has shape .* the plan expects 3 along axis"),
        ({"stages__0__0__slots": None}, "ChannelOrder '0': order and slots must be lists"),
        ({"stages__0__0__slots__0": 3}, "ChannelOrder '0': a slot must be a table, got int"),
        ({"stages__0__0__slots__0__role": "king"}, "ChannelOrder '0': slot of '0.weight': unknown role 'king'"),
        (
            {"stages__0__0__slots__0__channels": [0, 1, 2]},
            "'0': '0.weight' does not hold all channels of the group alike",
        ),
        ({"stages__0__0__slots__0__channels": [0, 0, 1, 2, 3]}, "does not hold all channels of the group alike"),
        ({"stages__0__1__name": 3}, "GroupedConv: name must be text, got 3"),
        ({"stages__0__1__name": KeyError}, "damaged GroupedConv 'None': the key 'name' is missing"),
        ({"stages__0__1__groups": KeyError}, "damaged GroupedConv '3': the key 'groups' is missing"),
        ({"stages__0__1__groups": 0}, "GroupedConv '3': groups must be an integer in 1..16777216, got 0"),
        ({"stages__0__1__groups": "2"}, "'3': groups must be an integer"),
        ({"stages__0__1__groups": True}, "'3': groups must be an integer"),
        ({"stages__0__1__groups": 10**30}, "'3': groups must be an integer"),
        ({"stages__0__1__groups": 4}, "'3': 2 channels of out_perm are not divisible by groups=4"),
        ({"stages__0__1__base": -1}, "'3': base must be an integer in 1..16777216, got -1"),
        ({"stages__0__1__base": None}, "'3': base must be an integer"),
        ({"stages__0__1__base": 3}, "'3': groups=2 must be a multiple of the 3 groups it has"),
        ({"stages__0__1__base": 2}, "'3': out_perm moves channels between the 2 groups the layer has"),
        ({"stages__0__1__out_perm": {}}, "'3': out_perm must be a list of integers"),
        ({"stages__0__1__out_perm": [0.0, 1.0]}, "'3': out_perm must be a list of integers"),
        ({"stages__0__1__out_perm": [1, 1]}, "'3': out_perm must hold every index below its length, 2, once"),
        ({"stages__0__1__in_perm": []}, "'3': in_perm must hold every index below its length, 0, once"),
        ({"stages__0__1__in_perm": [[2], 0, 1, 3]}, "'3': in_perm must be a list of integers"),
        ({"stages__0__1__in_perm": [10**30, 0, 1, 3]}, "'3': in_perm must hold every index"),
    ],
)
def test_damage_to_groups_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(damaged(GROUPED, **changes)).compact(network())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"plan"', "[" * 100_000, '{"a":' * 50_000, "NaN", "9" * 5000, "\ud800", None, b"\xff"],
)
def test_what_is_not_a_plan(text):
    with pytest.raises(ValueError, match=r"not valid JSON|not a plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages__0__0__slots__0__tensor": "9.weight"}, "no tensor '9.weight'"),
        ({"stages__0__0__slots__0__tensor": "0.forward"}, "'0.forward' is not a tensor"),
        ({"stages__0__0__slots__0__tensor": "0"}, "no tensor '0'|'0' is not a tensor"),
        ({"stages__0__0__slots__0__tensor": ""}, "no tensor ''|'' is not a tensor"),
        ({"stages__0__0__slots__0__axis": 5}, "'0.weight' has shape \\(4, 3, 3, 3\\), the plan expects 4 along axis 5"),
        ({"stages__0__0__slots__0__axis": 1}, "'0.weight' has shape"),
        ({"stages__0__0__slots__0__channels": [0, 1, 2]}, "'0.weight' has shape .* expects 3 along axis 0"),
        ({"stages__0__1__end": "8"}, "no module '8' \\(end of shortcut '3'\\)"),
        ({"stages__0__1__end": "2"}, "'2' \\(end of shortcut '3'\\) has no parameters"),
        ({"scope": "head"}, "no module 'head' that the plan is about"),
    ],
)
def test_another_network_is_left_as_it_was(changes, message):
    plan = Plan.from_json(damaged(**changes))
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        plan.compact(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model[3]._forward_hooks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages__0__0__slots__0__tensor": "9.weight"}, "no tensor '9.weight'"),
        ({"stages__0__0__slots__0__tensor": "0.forward"}, "'0.forward' is not a tensor"),
        ({"stages__0__0__slots__0__axis": 1}, r"'0.weight' has shape \(4, 3, 3, 3\), the plan expects 4 along axis 1"),
        ({"stages__0__0__slots__6__channels": [-1, 0, 1, 2, 3]}, "'3.weight' has shape .* expects 5 along axis 1"),
        ({"stages__0__1__name": "9"}, "no module '9'"),
        ({"stages__0__1__name": "1"}, "'1' is a BatchNorm2d, the plan expects a convolution"),
        ({"stages__0__1__name": "0"}, r"'0' has \(outputs, inputs, groups\) \(4, 3, 1\), the plan expects \(2, 4, 1\)"),
        ({"stages__0__1__in_perm": [0, 1]}, r"'3' has .* \(2, 4, 1\), the plan expects \(2, 2, 1\)"),
    ],
)
def test_another_network_is_not_divided(changes, message):
    plan = Plan.from_json(damaged(GROUPED, **changes))
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        plan.compact(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model[3]._forward_pre_hooks
    assert model[3].groups == 1


def test_structures_that_disagree_about_an_order():
    longer = ChannelOrder("x", (4, 3, 2, 1, 0), (Slot("0.weight", 0, (0, 1, 2, 3, 4), "out"),))
    with pytest.raises(ValueError, match=r"'0.weight' has 4 and 5 along axis 0"):
        Plan("", ((*GROUPED.stages[0], longer),)).compact(network())
    with pytest.raises(ValueError, match=r"'0.bias' is cut and re-arranged along axis 0 in one stage"):
        Plan("", ((GROUPED.stages[0][0], PLAN.stages[0][0]),)).compact(network())


def test_masks_on_another_network():
    with pytest.raises(ValueError, match=r"no tensor '3.weight'"):
        PLAN.apply_masks(network()[:3])
    other = network()
    other[1] = nn.BatchNorm2d(5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"'1.weight' has shape \(5,\), the plan expects 4"):
        PLAN.apply_masks(other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_shapes_of_another_network():
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(5, 3, 3, 3\), the plan expects 4 along axis 0"):
        PLAN.shapes({"0.weight": (5, 3, 3, 3)})
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(\)"):
        PLAN.shapes({"0.weight": ()})
    assert PLAN.shapes({"elsewhere": (2, 3)}) == {"elsewhere": (2, 3)}


def test_structures_that_disagree():
    other = ChannelSlice("x", (0,), 5, (Slot("0.weight", 0, (0, 1, 2, 3, 4), "out"),))
    with pytest.raises(ValueError, match=r"'0.weight' has 4 and 5 along axis 0"):
        merge_cuts([*PLAN.stages[0], other])


def test_structures_that_leave_nothing():
    others = [ChannelSlice(name, keep, 4, SLOTS[:1]) for name, keep in (("x", (0,)), ("y", (1, 2)))]
    with pytest.raises(ValueError, match=r"nothing of '0.weight' would stay along axis 0"):
        Plan("", (tuple(others),)).compact(network())


def test_scattering_twice():
    model = PLAN.compact(network())
    again = Plan("", ((ShortcutSlice("3", (0,), 1, (Slot("3.bias", 0, (0,), "bias"),), "3"),),))
    model[3].bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"the output of '3' is already scattered"):
        again.compact(model)


def test_masks_of_several_stages_and_of_none():
    with pytest.raises(ValueError, match=r"only a plan of one stage has a masked form, this one has 2"):
        Plan("", (PLAN.stages[0], PLAN.stages[0])).apply_masks(network())
    model = network()
    Plan("", ()).apply_masks(model)
    assert Plan("", ()).compact(model) is model
    assert Plan.from_json(Plan("", ()).to_json()) == Plan("", ())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=6), children, max_size=3),
    max_leaves=6,
)


def places(data, path=()):
    """Every path into a nest of lists and tables."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


PATHS = [(plan, path) for plan in (PLAN, GROUPED) for path in places(json.loads(plan.to_json())) if path]


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(PATHS), JSON, st.booleans())
def test_any_damage_is_a_value_error_or_a_plan_that_works(plan_and_path, value, delete):
    plan, path = plan_and_path
    data = json.loads(plan.to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    if delete:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with suppress(ValueError):
        plan = Plan.from_json(json.dumps(data))
        plan.compact(network())
        plan.shapes({name: tuple(p.shape) for name, p in network().named_parameters()})
        plan.apply_masks(network())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON)
def test_any_structure_data_is_a_value_error(value):
    with pytest.raises(ValueError, match=r"structure"):
        structure_from_dict(value)
