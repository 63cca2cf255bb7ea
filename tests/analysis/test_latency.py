"""Two models timed in turns."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from prune_mm.analysis import latency
from prune_mm.analysis.latency import Latency, compare_latency


def test_quartiles_in_milliseconds():
    found = Latency.of([0.1, 0.001, 0.002, 0.004, 0.003])
    assert (found.median_ms, found.low_ms, found.high_ms) == pytest.approx((3.0, 2.0, 4.0))


def test_turns_warmup_and_arguments():
    calls: list[str] = []

    def model(name):
        def run(left, right):
            assert (left, right) == (1, 2)
            calls.append(name)

        return run

    compare_latency(model("A"), model("B"), (1, 2), repeats=3, warmup=2)
    assert calls == ["A", "B"] * 5


def test_the_slower_one_is_slower_and_warmup_is_not_measured():
    naps = iter([0.2, 0.02, 0.02])
    first, second = compare_latency(lambda x: time.sleep(next(naps)), lambda x: time.sleep(0.005), 0, 2, 1)
    assert 15 < first.low_ms <= first.median_ms <= first.high_ms < 100
    assert 4 < second.median_ms < first.median_ms


def test_modules_run_in_eval_mode_without_gradients_and_get_everything_back():
    seen = []

    class Probe(nn.Dropout):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            seen.append(torch.get_num_threads())
            return super().forward(x)

    probe, threads = Probe(), torch.get_num_threads()
    compare_latency(probe, nn.Identity(), torch.rand(3), repeats=1, warmup=0, threads=threads + 1)
    assert seen == [(False, False, False), threads + 1]
    assert probe.training
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads


def test_everything_comes_back_after_an_error():
    net, threads = nn.Linear(3, 3), torch.get_num_threads()
    with pytest.raises(RuntimeError):
        compare_latency(net, net, torch.rand(4), threads=threads + 1)
    assert net.training
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads


def test_cuda_is_synchronised_before_and_after_every_call(monkeypatch: pytest.MonkeyPatch):
    class OnCuda:
        is_cuda, device = True, torch.device("cuda:0")

    order = []
    monkeypatch.setattr(latency, "tensors_in", lambda tree: [OnCuda()])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(str(device)))
    compare_latency(lambda x: order.append("A"), lambda x: order.append("B"), 0, repeats=1, warmup=0)
    assert order == ["cuda:0", "A", "cuda:0", "cuda:0", "B", "cuda:0"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_asynchronous_kernels_are_waited_for():
    x = torch.rand(4096, 4096, device="cuda")

    def heavy(x):
        for _ in range(50):
            x = x @ x
        return x

    first, second = compare_latency(heavy, nn.Identity(), x, repeats=5)
    assert first.median_ms > 5
    assert second.median_ms < first.median_ms / 5


@pytest.mark.parametrize("arguments", [{"repeats": 0}, {"warmup": -1}, {"threads": 0}])
def test_errors(arguments: dict[str, int]):
    with pytest.raises(ValueError, match="at least"):
        compare_latency(nn.Identity(), nn.Identity(), torch.rand(1), **arguments)
