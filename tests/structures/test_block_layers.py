"""Block-sparse layers: the kernel against its reference, where it must not run, and what is stored."""

import copy
import io
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_mm.structures import block_kernels
from prune_mm.structures.block_code import Machine, kernel_text, row_chunks, tiles
from prune_mm.structures.block_kernels import block_kernel, split_work
from prune_mm.structures.block_sparse import BlockSparseConv2d, BlockSparseLinear

# Few heights, so that few kernels are compiled.
HEIGHTS = (1, 3, 4, 16)
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings("ignore:Sparse BSR", "ignore::torch.jit.TracerWarning")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_kernels():
    block_kernel.cache_clear()
    yield
    block_kernel.cache_clear()


def has_kernel():
    return block_kernel(1, True) is not None


def random_kept(outputs, inputs, n, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(-(-outputs // n), inputs, generator=generator) < density


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -- the kernel against its reference ----------------------------------------------------------------------------


@st.composite
def convolutions(draw):
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    kernel = pick((1, 1), (1, 1), (3, 3), (2, 5))
    mode = pick("zeros", "zeros", "reflect", "replicate", "circular")
    conv = {
        "kernel_size": kernel,
        "stride": (pick(1, 1, 2), pick(1, 1, 3)),
        "padding": pick(0, 1, (0, 1)),
        "dilation": pick(1, 1, 2),
        "padding_mode": mode,
        "bias": pick(True, False),
    }
    outputs, inputs, n = draw(st.integers(1, 35)), draw(st.integers(1, 9)), pick(*HEIGHTS)
    # Heights whose remainders are heights as well.
    outputs -= outputs % n if outputs % n not in HEIGHTS else 0
    size = (draw(st.integers(9, 20)), draw(st.integers(9, 20)))
    return conv, max(outputs, 1), inputs, n, size, pick(0.0, 0.3, 0.6, 1.0), pick(1, 1, 3), pick(True, False)


@SETTINGS
@given(convolutions(), st.integers(0, 999))
def test_kernel_and_reference_compute_the_dense_convolution(case, seed):
    options, outputs, inputs, n, size, density, images, permuted = case
    torch.manual_seed(seed)
    conv = nn.Conv2d(inputs, outputs, **options)
    kept, rows = random_kept(outputs, inputs, n, density, seed), torch.randperm(outputs) if permuted else None
    sparse = BlockSparseConv2d.from_conv(conv, n, kept, rows)
    mask = kept.repeat_interleave(n, 0)[:outputs]
    mask = mask if rows is None else mask[rows.argsort()]
    conv.weight.data *= mask[:, :, None, None]
    assert torch.equal(sparse.dense_weight(), conv.weight)
    assert torch.equal(sparse.to_conv().weight, conv.weight)
    x = torch.randn(images, inputs, *size)
    with torch.no_grad():
        expected = conv(x)
        assert sparse._is_fast(x) or not has_kernel() or n > outputs
        close(sparse(x), expected)
        close(sparse.reference(x), expected)
        close(sparse(x.to(memory_format=torch.channels_last)), expected)
        close(sparse(x[0]), expected[0])


@pytest.mark.parametrize("pixels", [1, 2, 4, 5, 15, 16, 17, 47, 48, 49, 52, 53, 64, 97])
def test_every_number_of_pixels(pixels):
    conv = nn.Conv2d(7, 20, 1)
    x = torch.randn(2, 7, 1, pixels)
    for n in (4, 16, 1):
        sparse = BlockSparseConv2d.from_conv(conv, n, random_kept(20, 7, n))
        with torch.no_grad():
            close(sparse(x), sparse.reference(x))


@SETTINGS
@given(st.integers(1, 35), st.integers(1, 9), st.sampled_from(HEIGHTS), st.sampled_from([(), (1,), (5,), (2, 3, 4)]))
def test_linear_layers(outputs, inputs, n, batch):
    outputs -= outputs % n if outputs % n not in HEIGHTS else 0
    linear = nn.Linear(inputs, max(1, outputs), bias=outputs % 2 == 0)
    sparse = BlockSparseLinear.from_linear(linear, n, random_kept(linear.out_features, inputs, n))
    x = torch.randn(*batch, inputs)
    with torch.no_grad():
        result = sparse(x)
        close(result, sparse.to_linear()(x))
        assert result.is_contiguous()


def test_results_do_not_depend_on_threads(two_threads):
    conv = nn.Conv2d(64, 128, 1)
    kept = random_kept(128, 64, 16)
    kept[0], kept[1:4] = True, False  # rows are uneven
    sparse = BlockSparseConv2d.from_conv(conv, 16, kept)
    x = torch.randn(2, 64, 40, 41)
    results = []
    with torch.no_grad():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sparse(x))
        close(results[0], sparse.reference(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_threads_of_our_own(two_threads, monkeypatch):
    monkeypatch.setattr(block_kernels, "_torch_threads", lambda: None)
    sparse = BlockSparseConv2d.from_conv(nn.Conv2d(64, 128, 1), 16, random_kept(128, 64, 16))
    x = torch.randn(1, 64, 40, 41)
    with torch.no_grad():
        close(sparse(x), sparse.reference(x))


@pytest.mark.parametrize("machine", [Machine(8, 16), Machine(4, 16), Machine(4, 32), Machine(16, 32)])
def test_code_for_other_processors(machine, fresh_kernels, monkeypatch):
    pytest.importorskip("llvmlite")
    monkeypatch.setattr(block_kernels, "host_machine", lambda: machine)
    for n, kernel in ((4, 3), (16, 1)):
        sparse = BlockSparseConv2d.from_conv(nn.Conv2d(5, 20, kernel), n, random_kept(20, 5, n))
        for width in (3, 19):
            x = torch.randn(1, 5, 3, width)
            with torch.no_grad():
                assert sparse._is_fast(x)
                close(sparse(x), sparse.reference(x))


def test_sums_stay_in_registers():
    for machine in (Machine(8, 16), Machine(16, 32)):
        for n in range(1, 65):
            rows, width = row_chunks(n, machine)
            assert sum(rows) == n
            assert max(rows) - min(rows) <= 1
            assert max(rows) * width + width + 1 <= machine.registers
            assert len(set(tiles(n, machine))) == len(tiles(n, machine))
    assert "load" in kernel_text(6, False, Machine(8, 16))


@SETTINGS
@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 4), st.integers(1, 400), st.integers(1, 5))
def test_work_is_divided_without_gaps(counts, images, pixels, threads):
    pointers = [7 + sum(counts[:b]) for b in range(len(counts) + 1)]
    done = torch.zeros(images, len(counts), pixels, dtype=torch.int)
    for image, low, high, start, end in split_work(pointers, images, pixels, 48, threads):
        done[image, low:high, start:end] += 1
    assert bool((done == 1).all())


def test_uneven_rows_are_balanced_by_work():
    pointers = [0, 1000, 1001, 1002, 1003, 2003]
    tasks = split_work(pointers, 1, 49, 48, 2)
    assert max(pointers[high] - pointers[low] for _, low, high, _, _ in tasks) <= 1003


# -- where the kernel must not run -------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    return BlockSparseConv2d.from_conv(nn.Conv2d(6, 20, 3, padding=1), 4, random_kept(20, 6, 4)), torch.randn(
        2, 6, 9, 9
    )


def test_gradients_are_those_of_the_dense_layer():
    sparse, x = small()
    dense = sparse.to_conv()
    x.requires_grad_()
    sparse(x).square().sum().backward()
    found = x.grad.clone()
    x.grad = None
    dense(x).square().sum().backward()
    close(found, x.grad)
    close(sparse.bias.grad, dense.bias.grad)
    expected = BlockSparseConv2d.from_conv(dense, 4, sparse.dense_weight().ne(0).any(3).any(2)[::4])
    expected.set_weight(dense.weight.grad)
    close(sparse.values.grad, expected.values)
    with torch.no_grad():
        sparse.values -= 0.1 * sparse.values.grad
        close(sparse(x), sparse.reference(x))  # the kernel sees the step


def test_other_kinds_of_numbers_and_watched_runs_use_the_reference():
    sparse, x = small()
    close(copy.deepcopy(sparse).double()(x.double()), sparse.reference(x).double())
    assert sparse.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    sparse, x = small()
    assert not sparse._is_fast(x)  # gradients
    with torch.no_grad():
        assert sparse._is_fast(x) == has_kernel()
        with torch.autocast("cpu", torch.bfloat16):
            assert sparse(x).dtype == torch.bfloat16
        expected = sparse(x)
        close(torch.func.vmap(sparse)(x), expected)
        tangent = torch.func.jvp(sparse, (x,), (x,))[1]
        close(tangent, expected - sparse.bias.view(-1, 1, 1))
        close(torch.jit.trace(sparse, x)(x + 1), sparse(x + 1))
        close(torch.export.export(sparse, (x,)).module()(x), expected)


def test_scratch_memory_survives_inference_mode_and_other_sizes():
    sparse, x = small()
    with torch.inference_mode():
        first = sparse(torch.cat([x, x]))
    with torch.no_grad():
        close(sparse(x), first[:2])
        close(sparse(x[:1]), first[:1])
        close(first[:2], sparse.reference(x))


def test_the_reference_is_what_counters_of_operators_see():
    from torch.utils.flop_counter import FlopCounterMode

    sparse, x = small()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        sparse(x)
    assert counter.get_total_flops() > 0


def test_without_llvmlite_layers_still_work(fresh_kernels, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "llvmlite"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    sparse, x = small()
    with torch.no_grad():
        assert not sparse._is_fast(x)
        close(sparse(x), sparse.to_conv()(x))


def test_a_kernel_that_does_not_compile_is_reported_once(fresh_kernels, monkeypatch):
    pytest.importorskip("llvmlite")
    monkeypatch.setattr(block_kernels, "kernel_text", lambda *args: "nonsense")
    sparse, x = small()
    with torch.no_grad(), pytest.warns(UserWarning, match="no kernel for N=4"):
        first = sparse(x)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        close(sparse(x), first)


def test_kernels_can_be_switched_off_and_end_at_64_rows(fresh_kernels, monkeypatch):
    assert block_kernel(65, True) is None
    monkeypatch.setenv("PRUNE_MM_KERNELS", "0")
    assert block_kernel(4, True) is None


# -- what is stored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [16, 19])
@pytest.mark.parametrize("kernel", [1, 3])
def test_there_and_back_through_bsr(outputs, kernel):
    conv = nn.Conv2d(6, outputs, kernel, stride=2, padding=1)
    sparse = BlockSparseConv2d.from_conv(conv, 4, random_kept(outputs, 6, 4))
    matrix = sparse.to_bsr()
    assert matrix.values().shape[1:] == (4, kernel * kernel)
    assert torch.equal(matrix.to_dense()[:outputs].reshape_as(conv.weight), sparse.dense_weight())
    back = BlockSparseConv2d.from_bsr(matrix, kernel, outputs, conv.bias, stride=2, padding=1)
    for name, tensor in sparse.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
    x = torch.randn(1, 6, 9, 9)
    with torch.no_grad():
        assert torch.equal(back(x), sparse(x))


def test_bsr_of_pytorch_itself():
    masked = torch.randn(16, 6) * random_kept(16, 6, 4).repeat_interleave(4, 0)
    layer = BlockSparseLinear.from_bsr(masked.to_sparse_bsr((4, 1)))
    assert torch.equal(layer.dense_weight(), masked)
    assert torch.equal(layer.to_bsr().to_dense(), masked)
    for wrong, message in (
        (masked.to_sparse_bsr((4, 2)), r"blocks are 2 wide, a kernel of 1 positions needs blocks of \(N, 1\)"),
        (masked.to_sparse_csr(), "need a matrix of layout torch.sparse_bsr"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockSparseLinear.from_bsr(wrong)
    with pytest.raises(ValueError, match="16 rows in blocks of 4 are 13 to 16 outputs, not 12"):
        BlockSparseLinear.from_bsr(masked.to_sparse_bsr((4, 1)), 12)


def test_blocks_are_found_in_a_masked_weight():
    conv = nn.Conv2d(6, 19, 3)
    kept = random_kept(19, 6, 4)
    conv.weight.data *= kept.repeat_interleave(4, 0)[:19, :, None, None]
    sparse = BlockSparseConv2d.from_conv(conv, 4)
    assert sparse.columns.numel() == int(kept.sum())
    assert torch.equal(sparse.dense_weight(), conv.weight)


def test_state_dict_copies_and_pickles():
    sparse, x = small()
    with torch.no_grad():
        expected = sparse(x)
        fresh = BlockSparseConv2d(6, 20, 3, 4, sparse.values.shape[0], padding=1)
        fresh(x)  # what it remembers now must not survive loading
        fresh.load_state_dict(sparse.state_dict())
        assert torch.equal(fresh(x), expected)
        assert torch.equal(copy.deepcopy(sparse)(x), expected)
        buffer = io.BytesIO()
        torch.save(sparse, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    assert set(sparse.state_dict()) == {"values", "bias", "columns", "row_pointers"}
    assert "n=4" in repr(sparse)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("columns", lambda t: t.fill_(6), r"columns must be in 0..5"),
        ("columns", lambda t: t.neg_().sub_(1), r"columns must be in 0..5"),
        ("columns", lambda t: t.fill_(0), "columns must ascend in each row block"),
        ("row_pointers", lambda t: t.fill_(0), "row_pointers must rise from 0 to"),
        ("row_pointers", lambda t: t[1].fill_(99), "row_pointers must rise from 0 to"),
        ("rows", lambda t: t.fill_(0), "rows must hold every output below 20 once"),
    ],
)
def test_an_index_that_leads_out_of_the_weight_is_refused(name, change, message):
    conv = nn.Conv2d(6, 20, 1)
    sparse = BlockSparseConv2d.from_conv(conv, 4, random_kept(20, 6, 4), torch.randperm(20))
    state = copy.deepcopy(sparse.state_dict())
    change(state[name])
    with pytest.raises(RuntimeError, match=message):
        sparse.load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockSparseConv2d(6, 8, 1, 0, 1), "sizes must be at least 1, got .*n=0"),
        (lambda: BlockSparseConv2d(6, 8, 1, 4, 13), "at most 12 blocks of 4 rows and 0 of 0, got 13 and 0"),
        (lambda: BlockSparseConv2d.from_conv(nn.Conv2d(4, 4, 1, groups=2), 2), "one group, this one has 2"),
        (lambda: BlockSparseConv2d.from_conv(nn.Conv2d(4, 4, 1), 0), "n must be at least 1, got 0"),
        (
            lambda: BlockSparseLinear.from_linear(nn.Linear(4, 4), 2, torch.ones(2, 3)),
            r"kept must have shape \(2, 4\), got \(2, 3\)",
        ),
    ],
)
def test_sizes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
