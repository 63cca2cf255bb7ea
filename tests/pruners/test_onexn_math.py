"""The masks of 1xN pruning: published numbers, exact counts, and what the published code gets wrong."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_mm.pruners.onexn_math import (
    MASK_CRITERIA,
    block_counts,
    block_mask,
    block_scores,
    block_share,
    cubic_rate,
    filter_mask,
    filter_order,
    kernel_mask,
    random_block_mask,
    unstructured_mask,
)

W = torch.tensor(
    [[1, -20, 3], [2, 7, -1], [-6, 1, 2], [5, 0, 4], [1, 13, 9], [0, 2, -1], [3, -3, 31], [2, 2.5, 0]],
    dtype=torch.float32,
)
HALF_N1 = [[0, 1, 1], [0, 1, 0], [1, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)

# (n, rate, rearranged): rows of the mask, from the original functions run on CPU.
GOLDEN = {
    (1, 0.5, False): HALF_N1,
    (1, 0.5, True): HALF_N1,
    (2, 0.5, False): [[0, 1, 0]] * 2 + [[1, 0, 1]] * 2 + [[0, 1, 1]] * 2 + [[0, 0, 1]] * 2,
    (2, 0.5, True): [[0, 1, 1]] * 2 + [[1, 0, 1]] * 2 + [[0, 1, 1], [0, 0, 0], [0, 1, 1], [0, 0, 0]],
    (4, 0.5, False): [[0, 1, 0]] * 4 + [[0, 1, 1]] * 4,
    (4, 0.5, True): [[[1, 0, 0], [0, 1, 1]][f in (0, 1, 4, 6)] for f in range(8)],
    (8, 0.5, False): [[0, 1, 1]] * 8,
    (8, 0.5, True): [[0, 1, 1]] * 8,
    (4, 0.25, False): [[1, 1, 1]] * 4 + [[0, 1, 1]] * 4,
    (4, 0.25, True): [[[1, 1, 1], [1, 0, 1]][f in (2, 3, 5, 7)] for f in range(8)],
    (4, 0.4, False): [[1, 1, 0]] * 4 + [[0, 1, 1]] * 4,
    (4, 0.1, False): [[1, 1, 1]] * 8,
    (4, 0.1, True): [[1, 1, 1]] * 8,
    (2, 0.9, False): [[0, 1, 0]] * 2 + [[0, 0, 0]] * 4 + [[0, 0, 1]] * 2,
    (2, 0.9, True): [[[0, 0, 0], [0, 1, 1]][f in (0, 6)] for f in range(8)],
}


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 1, 1)])
@pytest.mark.parametrize("case", GOLDEN)
def test_published_masks(case, shape):
    n, rate, rearrange = case
    found = block_mask(W.reshape(shape), n, rate, rearrange)
    assert found.mask.dtype == torch.bool
    assert found.mask.shape == shape
    assert found.mask.reshape(8, 3).int().tolist() == GOLDEN[case]


def test_the_numbers_above_are_those_of_the_golden_file():
    golden = json.loads((Path(__file__).parents[1] / "data/onexn_small.json").read_text())
    assert golden["W"] == W.tolist()
    for (n, rate, rearrange), rows in GOLDEN.items():
        assert golden[f"N{n}_p{rate}"]["rearr" if rearrange else "plain"] == rows
        assert block_counts(8, 3, n, rate)[1] == golden[f"N{n}_p{rate}"]["n_prune"]
    assert golden["unstructured_p0.5"] == HALF_N1


@pytest.mark.parametrize(
    ("case", "kept"),
    [((2, 0.5, False), 100.0), ((2, 0.5, True), 104.0), ((4, 0.5, False), 89.5), ((4, 0.5, True), 100.0),
     ((4, 0.25, False), 113.5), ((4, 0.25, True), 114.0), ((2, 0.9, False), 58.0), ((2, 0.9, True), 57.0)],
)  # fmt: skip
def test_published_magnitude_that_stays(case, kept):
    assert float((W.abs() * block_mask(W, *case).mask).sum()) == kept


def test_filters_are_ordered_by_norm_and_ties_by_index():
    assert filter_order(W).tolist() == [5, 7, 2, 3, 1, 4, 0, 6]
    assert block_mask(W, 2, 0.5, rearrange=True).out_perm.tolist() == [5, 7, 2, 3, 1, 4, 0, 6]
    assert block_mask(W, 2, 0.5).out_perm.tolist() == list(range(8))


def test_of_equal_blocks_the_first_in_published_order_go():
    mask = block_mask(torch.ones(4, 3), 2, 0.5).mask
    # Six equal blocks; counted along the filters first: (column 0, rows 0-1), (0, 2-3), (1, 0-1) go.
    assert mask.int().tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1]]


def test_baselines_of_the_golden_matrix():
    assert unstructured_mask(W, 0.5).mask.int().tolist() == HALF_N1
    assert kernel_mask(W, 0.5).mask.int().tolist() == HALF_N1
    assert filter_mask(W, 0.5).mask.int().tolist() == [[int(f in (0, 1, 4, 6))] * 3 for f in range(8)]
    found = {name: make(W, 2, 0.5, False, "dense", 7).mask for name, make in MASK_CRITERIA.items()}
    assert torch.equal(found["l1"], block_mask(W, 2, 0.5).mask)
    assert torch.equal(found["random"], random_block_mask(W, 2, 0.5, 7).mask)
    assert all(int(mask.sum()) == 12 for mask in found.values())


def test_random_blocks_reach_the_rate_where_the_published_draw_does_not():
    drawn = torch.randint(0, 12, (6,), generator=torch.Generator().manual_seed(7))
    assert sorted(drawn.tolist()) == [1, 2, 3, 3, 4, 7]  # as published: five blocks go instead of six
    for n, rate in ((2, 0.5), (2, 0.9), (4, 0.5)):
        mask = random_block_mask(W, n, rate, 7).mask
        assert int((~mask).sum()) == n * int(24 / n * rate)
        assert torch.equal(mask, random_block_mask(W, n, rate, torch.Generator().manual_seed(7)).mask)
    weight = torch.empty(64, 64).fill_(1.0)
    assert not torch.equal(random_block_mask(weight, 4, 0.5, 0).mask, random_block_mask(weight, 4, 0.5, 1).mask)


def test_blocks_never_run_into_the_next_input_channel():
    weight = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]).float()
    dense, padded = (block_mask(weight, 4, 0.67, tail=tail).mask.int().tolist() for tail in ("dense", "pad"))
    # Published: [[0,0],[0,0],[0,1],[0,1],[0,1],[0,1]], which is no 1xN pattern.
    assert dense == [[0, 1]] * 4 + [[1, 1]] * 2  # int(2 * .67) of the two whole blocks
    assert padded == [[0, 1]] * 6  # int(4 * .67) of four blocks: 16 and the first of two 20s go, 20 and 22 stay
    with pytest.raises(ValueError, match="n=4 does not divide the 6 filters; tail='dense' keeps the last 2 whole"):
        block_mask(weight, 4, 0.67, tail="error")


def test_rearranging_lets_the_strongest_filters_be_the_tail():
    weight = torch.tensor([[9.0, 9], [1, 2], [3, 1], [5, 5], [2, 2]])
    found = block_mask(weight, 2, 0.5, rearrange=True)
    assert found.out_perm.tolist() == [1, 2, 4, 3, 0]
    assert found.mask.int().tolist() == [[1, 1], [0, 0], [0, 0], [1, 1], [1, 1]]


def test_share_of_blocks_scatters_without_the_permutation():
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    for n, published in ((2, 0.751), (4, 0.937), (8, 0.994), (16, 0.999)):
        found = block_mask(weight, n, 0.5, rearrange=True)
        assert block_share(found.mask, n, found.out_perm) == 0.5
        assert block_share(found.mask, n) == pytest.approx(published, abs=0.015)


def test_published_zeros_of_whole_networks():
    v1 = [(32, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), *[(512, 512)] * 5, (512, 1024),
          (1024, 1024)]  # fmt: skip
    for n in (1, 2, 4, 8, 16, 32):
        assert sum(block_counts(o, i, n, 0.5)[1] * n for i, o in v1) == 1_569_792
    names = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "resnet50")
    with torch.device("meta"):
        models = {name: getattr(torchvision.models, name)() for name in names}

    def zeros(name, n):
        layers = [m.weight.shape for m in models[name].modules() if hasattr(m, "weight") and m.weight.ndim > 1]
        shapes = [s for s in layers if s[1] > 1 and s[1:] != (3, 3, 3) and s[1:] != (3, 7, 7)]
        left_out = {"mobilenet_v2": 1, "resnet50": 0}.get(name, 2)
        return sum(block_counts(s[0], s[1], n, 0.5)[1] * n * s[2:].numel() for s in shapes[: len(shapes) - left_out])

    for n in (1, 2, 4, 8):
        assert zeros("mobilenet_v2", n) == 1_062_336
        assert zeros("mobilenet_v3_small", n) == 426_496
        assert zeros("mobilenet_v3_large", n) == 1_425_216
        assert zeros("resnet50", n) == 12_746_752


shapes = st.tuples(st.integers(1, 13), st.integers(1, 6)).flatmap(
    lambda size: st.sampled_from([size, (*size, 1, 1), (*size, 3, 3), (*size, 2)])
)


@SETTINGS
@given(
    shapes, st.integers(1, 15), st.floats(0, 1), st.booleans(), st.sampled_from(["dense", "pad"]), st.integers(0, 99)
)
def test_counts_are_exact_and_the_pattern_is_1xn(shape, n, rate, rearrange, tail, seed):
    # Small integers make many ties.
    weight = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()
    found = block_mask(weight, n, rate, rearrange, tail)
    outputs, inputs = shape[:2]
    blocks, count = block_counts(outputs, inputs, n, rate, tail)
    assert found.mask.shape == weight.shape
    assert sorted(found.out_perm.tolist()) == list(range(outputs))
    kernels = found.mask.reshape(outputs, inputs, -1)
    assert torch.equal(kernels, kernels[:, :, :1].expand_as(kernels))
    rows = kernels[found.out_perm, :, 0]
    gone, best_gone, worst_kept = 0, -1.0, float("inf")
    scores = block_scores(weight[found.out_perm], n)
    for j in range(-(-outputs // n)):
        block = rows[j * n : (j + 1) * n]
        assert torch.equal(block, block[:1].expand_as(block))
        if len(block) < n and tail == "dense":
            assert block.all()
            continue
        gone += int((~block[0]).sum())
        best_gone = max([best_gone, *scores[j][~block[0]].tolist()])
        worst_kept = min([worst_kept, *scores[j][block[0]].tolist()])
    assert gone == count == int(blocks * rate)
    assert best_gone <= worst_kept


@SETTINGS
@given(st.integers(0, 30), st.integers(0, 20), st.integers(0, 20), st.floats(0, 1))
def test_cubic_rate_rises_from_zero_to_its_end(step, begin, length, final):
    rate = cubic_rate(step, begin, begin + length, final)
    assert 0.0 <= rate <= final
    assert rate <= cubic_rate(step + 1, begin, begin + length, final)
    assert cubic_rate(begin + length, begin, begin + length, final) == final
    assert step >= begin or rate == 0.0


def test_cubic_rate_in_the_middle():
    assert cubic_rate(5, 0, 10, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: block_mask(W, 0, 0.5), "n must be an integer of at least 1, got 0"),
        (lambda: block_mask(W, 2.0, 0.5), "n must be an integer of at least 1, got 2.0"),
        (lambda: block_mask(W, 2, 1.5), r"rate must be in \[0, 1\], got 1.5"),
        (lambda: block_mask(W, 2, float("nan")), r"rate must be in \[0, 1\], got nan"),
        (lambda: block_mask(W, 2, 0.5, tail="wrap"), "tail must be one of dense, pad, error, got 'wrap'"),
        (lambda: block_mask(W[0], 2, 0.5), r"weight must have shape \(O, I, ...\) and not be empty, got \(3,\)"),
        (lambda: block_mask(W[:0], 2, 0.5), r"not be empty, got \(0, 3\)"),
        (lambda: block_mask(W * float("inf"), 2, 0.5), "weight holds NaN or infinite values"),
        (lambda: random_block_mask(W, 0, 0.5), "n must be"),
        (lambda: unstructured_mask(W, -0.1), "rate must be"),
        (lambda: filter_mask(W, 2), "rate must be"),
        (lambda: block_share(W, 0), "n must be"),
        (lambda: block_share(W[0], 1), "mask must have shape"),
        (lambda: cubic_rate(0, 5, 4, 0.5), "end=4 must not be before begin=5"),
        (lambda: cubic_rate(0, 0, 4, 1.1), r"final must be in \[0, 1\], got 1.1"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
