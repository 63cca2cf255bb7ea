"""PartSampler: every sample once a pass, the same ones whatever the number of processes, and from any epoch on."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import DATA_SAMPLERS, DefaultScope

from prune_mm.datasets import sampling
from prune_mm.datasets.sampling import PartSampler


def epochs(count: int, size: int, number: int, **options: int) -> list[list[int]]:
    sampler = PartSampler(range(count), size, **{"seed": 0, **options})
    found = []
    for epoch in range(number):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


@given(count=st.integers(1, 40), size=st.integers(1, 60), number=st.integers(1, 6), start=st.integers(0, 90))
def test_no_sample_comes_twice_before_all_came_once(count, size, number, start):
    drawn = [index for epoch in epochs(count, size, number, start=start) for index in epoch]
    assert len(drawn) == size * number
    cut = -start % count
    assert len(set(drawn[:cut])) == min(cut, len(drawn))
    rest = drawn[cut:]
    for begin in range(0, len(rest), count):
        assert max(Counter(rest[begin : begin + count]).values()) == 1


def test_a_later_epoch_does_not_need_the_earlier_ones_and_start_shifts_them():
    found = epochs(50, 20, 5)
    sampler = PartSampler(range(50), 20, seed=0)
    sampler.set_epoch(4)
    assert list(sampler) == found[4]
    assert epochs(50, 20, 3, start=40) == found[2:]


def test_seeds_and_passes_differ():
    assert epochs(50, 50, 1) != epochs(50, 50, 1, seed=1)
    first, second = epochs(50, 50, 2)
    assert first != second
    assert second not in epochs(50, 50, 1, seed=1)


@given(world=st.integers(1, 5), size=st.integers(1, 30))
def test_processes_share_the_samples_of_an_epoch(world, size):
    (alone,) = epochs(100, size, 1)
    with pytest.MonkeyPatch.context() as patch:
        parts = []
        for rank in range(world):
            patch.setattr(sampling, "get_dist_info", lambda rank=rank: (rank, world))
            parts.append(epochs(100, size, 1)[0])
    together = [index for step in zip(*parts) for index in step]
    assert len({len(part) for part in parts}) == 1
    # In the order of one process; the first come again where the number does not divide.
    assert together[:size] == alone
    assert len(together) - size < world
    assert set(together) == set(alone)


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [(0, {"size": 3}, "empty"), (5, {"size": 0}, "size=0"), (5, {"size": 3, "start": -1}, "start=-1")],
)
def test_what_cannot_be_is_refused(count, options, words):
    with pytest.raises(ValueError, match=words):
        PartSampler(range(count), **options)


def test_configs_find_it_by_name():
    with DefaultScope.overwrite_default_scope("mmdet"):
        config = {"type": "prune_mm.PartSampler", "size": 3}
        sampler = DATA_SAMPLERS.build(config, default_args={"dataset": range(9), "seed": 1})
    assert isinstance(sampler, PartSampler)
    assert len(sampler) == 3
