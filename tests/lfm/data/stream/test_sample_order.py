"""Every sample once an epoch, whoever reads, wherever it resumes, and without a list of samples in memory."""

from __future__ import annotations

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.stream.sample_order import Order
from lfm.world import World

SMALL = settings(max_examples=40, deadline=None)
SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any)
SEEDS = st.integers(0, 2**32)
WINDOWS = st.integers(1, 11)


def sequence(order: Order, position: int, count: int) -> list[tuple[int, int]]:
    shards, rows = order.at(position, count)
    assert shards.dtype == rows.dtype == np.int64 and len(shards) == len(rows) == count
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


def everything(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]


@SMALL
@given(sizes=SIZES, seed=SEEDS, window=WINDOWS)
def test_every_epoch_is_a_permutation(sizes: list[int], seed: int, window: int) -> None:
    order, total = Order(sizes, seed, window), sum(sizes)
    for epoch in range(3):
        assert sorted(sequence(order, epoch * total, total)) == everything(sizes)


@SMALL
@given(sizes=SIZES, seed=SEEDS, window=WINDOWS, start=st.integers(0, 300), count=st.integers(0, 60))
def test_to_seek_is_to_have_read_all_before(sizes: list[int], seed: int, window: int, start: int, count: int) -> None:
    replayed = sequence(Order(sizes, seed, window), 0, start + count)
    assert sequence(Order(sizes, seed, window), start, count) == replayed[start:]
    order = Order(sizes, seed, window)
    one_by_one = [pair for position in range(start, start + count) for pair in sequence(order, position, 1)]
    assert one_by_one == replayed[start:]


@SMALL
@given(
    sizes=SIZES,
    seed=SEEDS,
    window=WINDOWS,
    phases=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_exactly_once_whatever_the_world_the_batch_and_the_restarts(
    sizes: list[int], seed: int, window: int, phases: list[tuple[int, int, int]]
) -> None:
    """Each phase: so many ranks, a global batch, so many steps; then the run is resumed with others."""
    position, read = 0, []
    for world_size, batch, steps in phases:
        orders = [Order(sizes, seed, window) for _ in range(world_size)]
        for _ in range(steps):
            for rank, order in enumerate(orders):
                part = World(rank, 0, world_size).slice_of(batch)
                read += sequence(order, position + part.start, part.stop - part.start)
            position += batch
    total = sum(sizes)
    assert read == sequence(Order(sizes, seed, window), 0, position)
    for epoch in range(position // total):
        assert sorted(read[epoch * total : (epoch + 1) * total]) == everything(sizes)


@SMALL
@given(size=st.integers(20, 40), count=st.integers(1, 12), seed=SEEDS, window=WINDOWS)
def test_a_window_is_whole_before_the_next_begins(size: int, count: int, seed: int, window: int) -> None:
    order = Order([size] * count, seed, window)
    for epoch in range(2):
        shards = order.at(epoch * size * count, size * count)[0]
        for start in range(0, count, window):
            part = shards[start * size : (start + window) * size]
            assert len(set(part.tolist())) == min(window, count - start)
            assert len(part) == size * len(set(part.tolist()))


def test_samples_of_a_window_are_mixed() -> None:
    order = Order([100] * 8, seed=0, window=4)
    shards, rows = order.at(0, 400)
    assert (np.diff(shards) != 0).mean() > 0.6, "neighbours come mostly from different shards: 3/4 expected"
    assert abs(np.corrcoef(np.arange(400), rows)[0, 1]) < 0.15


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(sequence(Order([7, 9, 8], seed, 2), epoch * 24, 24)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def chi_squared(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def test_every_place_is_equally_likely() -> None:
    """Of four shards of three, each sample comes first in about a twelfth of the epochs."""
    order = Order([3, 3, 3, 3], seed=1, window=2)
    first = [sequence(order, epoch * 12, 1)[0] for epoch in range(1200)]
    assert chi_squared([first.count(sample) for sample in everything([3] * 4)]) < 31.3, "0.1 %, 11 degrees of freedom"


def test_the_first_window_is_shuffled_by_numbers_of_its_own() -> None:
    """Three shards of one sample in one window: both permutations are of three, and must not be the same one.

    numpy's SeedSequence pads with zeros: (seed, epoch) and (seed, epoch, 0) are one and the same.
    """
    order = Order([1, 1, 1], seed=0, window=3)
    seen = [tuple(order.at(3 * epoch, 3)[0].tolist()) for epoch in range(600)]
    counts = [seen.count(permutation) for permutation in permutations(range(3))]
    assert chi_squared(counts) < 20.5, f"{counts}: 0.1 %, 5 degrees of freedom"


@pytest.mark.parametrize("seed", [0, 3, 2**32])
def test_epochs_and_windows_share_no_permutation(seed: int) -> None:
    """Shards of one sample, windows of one size: each permutation is seen as it is."""
    order, length = Order([1] * 64, seed, 8), 8
    seen = [tuple(order._window(epoch, window)[0].argsort().tolist()) for epoch in range(4) for window in range(8)]
    assert len(seen[0]) == length and len(set(seen)) == len(seen)


@SMALL
@given(sizes=SIZES, seed=SEEDS, window=WINDOWS, position=st.integers(0, 200), count=st.integers(0, 30))
def test_upcoming_shards_are_those_that_come(
    sizes: list[int], seed: int, window: int, position: int, count: int
) -> None:
    order, total = Order(sizes, seed, window), sum(sizes)
    upcoming = order.upcoming_shards(position, count)
    assert len(upcoming) == len(set(upcoming)) == min(count, sum(size > 0 for size in sizes))
    assert all(sizes[shard] for shard in upcoming)
    # the sequence of the whole is that of any beginning of it
    assert order.upcoming_shards(position, len(sizes))[: len(upcoming)] == upcoming
    # whatever is read before the end of the window is among the first `window` of them
    epoch, within = divmod(position, total)
    end = next(end for end in order._epoch(epoch)[1] if end > within)
    read = {shard for shard, _ in sequence(order, position, int(end) - within)}
    assert read <= set(order.upcoming_shards(position, window))
    # and all that come in an epoch from here are among them
    assert {shard for shard, _ in sequence(order, position, total)} <= set(order.upcoming_shards(position, len(sizes)))


@SMALL
@given(count=st.integers(1, 9), seed=SEEDS, window=WINDOWS, start=st.integers(0, 8))
def test_upcoming_shards_follow_the_windows(count: int, seed: int, window: int, start: int) -> None:
    order = Order([5] * count, seed, window)
    start = min(start, (count - 1) // window) * window  # the first shard of a window
    upcoming = order.upcoming_shards(5 * start, count - start)
    for begin in range(start, count, window):
        taken = slice(begin - start, begin - start + window)
        shards = order.at(5 * begin, 5 * min(window, count - begin))[0]
        assert set(upcoming[taken]) == set(shards.tolist())


def test_a_billion_samples_need_little_memory() -> None:
    sizes = np.full(250_000, 4096)
    tracemalloc.start()
    try:
        order = Order(sizes, seed=0, window=8)
        for position in (0, 123_456_789_012, 2**50):
            order.at(position, 256)
        assert order.num_samples == 1_024_000_000
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 16e6 and peak < 24e6


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Order([0, 0], seed=0, window=1)
