"""BlockSparse as a structure: the law, orders of the stage, masks, and plans that do not fit."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_mm.structures import ChannelOrder, Plan, Slot, structure_from_dict
from prune_mm.structures.block_sparse import BlockSparse, BlockSparseConv2d
from prune_mm.structures.plan import count_macs

# Few heights, so that few kernels are compiled.
HEIGHTS = (1, 3, 4, 16)
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings("ignore:Sparse BSR", "ignore::torch.jit.TracerWarning")


def random_kept(outputs, inputs, n, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(-(-outputs // n), inputs, generator=generator) < density


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 10, 1, bias=False)
        self.head = nn.Linear(10, 7)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.normal_()

    def forward(self, x):
        return self.head(self.second(F.relu(self.norm(self.first(x)))).mean((2, 3)))


def order_of(name, order, tensors):
    every = tuple(range(len(order)))
    return ChannelOrder(name, tuple(order), tuple(Slot(t, axis, every, role) for t, axis, role in tensors))


FIRST = (
    ("first.weight", 0, "out"), ("first.bias", 0, "bias"), ("norm.weight", 0, "scale"), ("norm.bias", 0, "shift"),
    ("norm.running_mean", 0, "mean"), ("norm.running_var", 0, "var"), ("second.weight", 1, "in"),
)  # fmt: skip
SECOND = (("second.weight", 0, "out"), ("head.weight", 1, "in"))


@st.composite
def stages(draw):
    """Some layers block-sparse, some groups re-arranged, perhaps as the blocks want it."""
    stage, orders = [], {}
    for name, outputs, inputs in (("first", 12, 3), ("second", 10, 12), ("head", 7, 10)):
        if not draw(st.booleans()):
            continue
        n = draw(st.sampled_from(HEIGHTS))
        perm = draw(st.permutations(range(outputs)))
        kept = random_kept(outputs, inputs, n, draw(st.sampled_from([0.0, 0.5, 1.0])), draw(st.integers(0, 99)))
        stage.append(BlockSparse.from_kept(name, n, outputs, kept, perm))
        orders[name] = perm
    for name, width, slots in (("first", 12, FIRST), ("second", 10, SECOND)):
        how = draw(st.sampled_from(["not", "as the blocks", "at random"]))
        if how != "not":
            order = orders.get(name, range(width)) if how == "as the blocks" else draw(st.permutations(range(width)))
            stage.append(order_of(name, order, slots))
    return draw(st.permutations(stage))


@SETTINGS
@given(stages(), st.integers(0, 99))
def test_masked_equals_compact(stage, seed):
    torch.manual_seed(seed)
    plan = Plan.from_json(Plan("", (tuple(stage),)).to_json())
    assert plan == Plan("", (tuple(stage),))
    masked = Network().eval()
    compact = plan.compact(copy.deepcopy(masked))
    plan.apply_masks(masked)
    x = torch.randn(2, 3, 6, 7)
    close(compact(x), masked(x))
    with torch.no_grad():
        close(compact(x), masked(x))
    # Exact sizes without building anything.
    dense = {name: tuple(p.shape) for name, p in Network().named_parameters()}
    shapes = plan.shapes(dense)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == sum(p.numel() for p in compact.parameters())
    positions = {"first.weight": 42, "second.weight": 42, "head.weight": 1}
    sizes = {f"{name}.weight": sum(p.numel() for key, p in compact.get_submodule(name).named_parameters()
                                   if key != "bias") for name in ("first", "second", "head")}  # fmt: skip
    assert count_macs(shapes, positions) == sum(sizes[name] * count for name, count in positions.items())


@pytest.mark.parametrize("n", [2, 4, 5])
def test_the_order_of_the_stage_makes_the_weight_physically_1xn(n):
    network = Network().eval()
    perm = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    structure = BlockSparse.from_kept("first", n, 12, random_kept(12, 3, n), perm)
    scattered = Plan("", ((structure,),)).compact(copy.deepcopy(network))
    assert scattered.first.rows is not None
    ordered = Plan("", ((structure, order_of("first", perm, FIRST)),)).compact(copy.deepcopy(network))
    assert ordered.first.rows is None
    alive = F.pad(ordered.first.dense_weight().ne(0).any(3).any(2), (0, 0, 0, -12 % n)).reshape(-1, n, 3)
    assert int(alive.any(1).sum()) == int(random_kept(12, 3, n).sum())
    x = torch.randn(2, 3, 6, 7)
    with torch.no_grad():
        close(ordered(x), scattered(x))


def test_masks_become_structures():
    perm = [3, 1, 0, 2, 4]
    kept = torch.tensor([[1, 0], [0, 1], [1, 1]]).bool()
    structure = BlockSparse.from_kept("a", 2, 5, kept, perm)
    mask = structure.mask()
    assert mask[perm].int().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1], [1, 1]]
    assert BlockSparse.from_mask("a", 2, mask[:, :, None, None].expand(5, 2, 3, 3), torch.tensor(perm)) == structure
    with pytest.raises(ValueError, match="'a': the mask is not made of whole blocks of 2 filters"):
        BlockSparse.from_mask("a", 2, mask)


def test_what_hangs_on_a_layer_stays():
    network = Network().eval()
    seen = []
    network.second.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    network.alias = network.second
    network.second.weight.requires_grad_(False)
    structure = BlockSparse.from_kept("second", 4, 10, random_kept(10, 12, 4))
    Plan("", ((structure,),)).compact(network)
    network(torch.randn(1, 3, 5, 5))
    assert seen == [BlockSparseConv2d]
    assert network.alias is network.second
    assert not network.second.values.requires_grad
    assert not network.second.training
    names = set(network.state_dict())
    assert {"second.values", "second.tail_values", "second.columns", "second.row_pointers"} <= names
    assert "second.weight" not in names


def test_a_network_the_structure_was_not_made_for_is_left_alone():
    other = Network()
    other.first = nn.Conv2d(3, 12, 3, groups=3)
    other.second = nn.ConvTranspose2d(12, 10, 1)
    network = nn.ModuleDict({"network": other, "conv": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(3)})
    before = copy.deepcopy(network.state_dict())
    for name, message in (
        ("missing", "no module 'missing'"),
        ("norm", "'norm' is a BatchNorm2d, the plan expects an nn.Conv2d or nn.Linear"),
        ("network.second", "is a ConvTranspose2d"),
        ("conv", r"\(outputs, inputs, groups\) \(8, 3, 1\), the plan expects \(12, 3, 1\)"),
        ("network.first", r"\(12, 1, 3\), the plan expects \(12, 3, 1\)"),
        ("", "the network itself cannot be replaced"),
    ):
        structure = BlockSparse.from_kept(name, 4, 12, random_kept(12, 3, 4))
        for act in (Plan("", ((structure,),)).compact, structure.apply_mask):
            with pytest.raises(ValueError, match=message):
                act(network)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())


def test_a_layer_that_does_something_else_with_its_weight_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    class Conv2d(nn.Conv2d):  # mmcv's
        def forward(self, x):
            return super().forward(x)

    structure = BlockSparse.from_kept("0", 4, 8, random_kept(8, 3, 4))
    with pytest.raises(ValueError, match="'0' is a Standardised"):
        structure.check(nn.Sequential(Standardised(3, 8, 1)))
    structure.check(nn.Sequential(Conv2d(3, 8, 1)))


def damaged(**changes):
    data = BlockSparse.from_kept("a", 2, 5, torch.ones(3, 3, dtype=torch.bool), [3, 1, 0, 2, 4]).to_dict()
    data.update(changes)
    return {key: value for key, value in data.items() if value is not KeyError}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "name must be text"),
        ({"n": 0}, "'a': n must be an integer in 1"),
        ({"n": KeyError}, "'a': the key 'n' is missing"),
        ({"n": 1, "inputs": 4}, "one bit for each of 20 blocks"),
        ({"outputs": 6}, "out_perm has 5 filters of 6"),
        ({"outputs": 10**12}, "outputs must be an integer"),
        ({"inputs": "3"}, "inputs must be an integer"),
        ({"inputs": 30}, "one bit for each of 90 blocks"),
        ({"out_perm": [0, 1, 2, 3, 3]}, "out_perm must hold every index"),
        ({"out_perm": 5}, "out_perm must be a list"),
        ({"kept": None}, "kept must be text"),
        ({"kept": "!"}, "kept must be base64 text"),
        ({"kept": ""}, "one bit for each of 9 blocks"),
        ({"kept": "//8="}, "zeros behind them"),
        ({"kept": "/4A=x"}, "kept must be base64 text"),
    ],
)
def test_damaged_data_is_named(changes, message):
    structure_from_dict(json.loads(json.dumps(damaged())))
    with pytest.raises(ValueError, match=message):
        structure_from_dict(damaged(**changes))


def test_cut_and_block_sparse_in_one_stage_is_refused():
    from prune_mm.structures import ChannelSlice

    cut = ChannelSlice("first", (0, 1), 12, (Slot("first.weight", 0, tuple(range(12)), "out"),))
    structure = BlockSparse.from_kept("first", 4, 12, random_kept(12, 3, 4))
    with pytest.raises(ValueError, match="'first"):
        Plan("", ((cut, structure),)).compact(Network())
