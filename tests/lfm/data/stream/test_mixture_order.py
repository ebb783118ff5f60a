"""Shares of a mixture are exact at every sample, and its order is a function of (seed, sample number) alone."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.stream.mixture_order import MixtureOrder, Stage
from lfm.data.stream.sample_order import Order
from lfm.data.stream.shares import Shares
from lfm.world import World

SMALL = settings(max_examples=60, deadline=None)
SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)
WEIGHT = st.one_of(st.integers(1, 9).map(Fraction), st.builds(Fraction, st.integers(1, 1000), st.just(1000)))
SEEDS, WINDOWS = st.integers(0, 2**32), st.integers(1, 4)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[list[int]], list[Stage]]:
    """Shard sizes of one to four sources, and one to three stages."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=4))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 120), max_size=2)))]
    weight = st.one_of(WEIGHT, st.just(Fraction(0)))
    weights = st.lists(weight, min_size=len(sizes), max_size=len(sizes)).filter(any).map(tuple)
    return sizes, [Stage(start, draw(weights)) for start in starts]


def sequence(order: MixtureOrder, position: int, count: int) -> list[tuple[int, int]]:
    shards, rows = order.at(position, count)
    assert shards.dtype == rows.dtype == np.int64 and len(shards) == len(rows) == count
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


@SMALL
@given(weights=st.lists(WEIGHT, min_size=1, max_size=7), start=st.integers(0, 2**50))
def test_shares_are_exact_at_every_sample(weights: list[Fraction], start: int) -> None:
    total = sum(weights, Fraction(0))
    numbers = np.arange(start, start + 300)
    counts = Shares(weights).counts(numbers)
    assert (counts.sum(axis=0) == numbers).all()
    sources, before = Shares(weights).places(start, 299)
    assert (sources == np.argmax(np.diff(counts, axis=1), axis=0)).all()
    assert (before == counts[sources, np.arange(299)]).all()
    steps = np.diff(counts, axis=1)
    assert ((steps == 0) | (steps == 1)).all(), "every sample belongs to one source, for ever"
    bound = 1 if len(weights) <= 3 else Fraction(3, 2)
    for weight, of_source in zip(weights, counts.tolist(), strict=True):
        assert all(
            abs(count - n * weight / total) < bound for count, n in zip(of_source, numbers.tolist(), strict=True)
        )


@SMALL
@given(mixture=mixtures(), seed=SEEDS, window=WINDOWS)
def test_each_source_is_read_once_before_any_of_its_samples_comes_again(
    mixture: tuple[list[list[int]], list[Stage]], seed: int, window: int
) -> None:
    sizes, stages = mixture
    order = MixtureOrder(sizes, stages, seed, window)
    read = sequence(order, 0, 300)
    for source, of_source in enumerate(sizes):
        first, last = order.first_shards[source : source + 2].tolist()
        rows = [(shard, row) for shard, row in read if first <= shard < last]
        everything = sorted((first + shard, row) for shard, size in enumerate(of_source) for row in range(size))
        for start in range(0, len(rows) - len(everything) + 1, len(everything)):
            assert sorted(rows[start : start + len(everything)]) == everything
        rest = rows[len(rows) // len(everything) * len(everything) :]
        assert len(set(rest)) == len(rest)


@SMALL
@given(mixture=mixtures(), seed=SEEDS, window=WINDOWS, starts=st.integers(0, 300), count=st.integers(0, 60))
def test_resuming_at_any_sample_is_having_read_all_before(
    mixture: tuple[list[list[int]], list[Stage]], seed: int, window: int, starts: int, count: int
) -> None:
    sizes, stages = mixture
    replayed = sequence(MixtureOrder(sizes, stages, seed, window), 0, starts + count)
    order = MixtureOrder(sizes, stages, seed, window)
    assert sequence(order, starts, count) == replayed[starts:]
    assert [pair for n in range(starts, starts + count) for pair in sequence(order, n, 1)] == replayed[starts:]


@SMALL
@given(
    mixture=mixtures(),
    seed=SEEDS,
    phases=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_order_is_equal_for_every_world_and_batch(
    mixture: tuple[list[list[int]], list[Stage]], seed: int, phases: list[tuple[int, int, int]]
) -> None:
    """Each phase: a number of ranks, a global batch and a number of steps; then the run is resumed with others."""
    sizes, stages = mixture
    position, read = 0, []
    for world_size, batch, steps in phases:
        orders = [MixtureOrder(sizes, stages, seed, 2) for _ in range(world_size)]
        for _ in range(steps):
            for rank, order in enumerate(orders):
                part = World(rank, 0, world_size).slice_of(batch)
                read += sequence(order, position + part.start, part.stop - part.start)
            position += batch
    assert read == sequence(MixtureOrder(sizes, stages, seed, 2), 0, position)


@SMALL
@given(mixture=mixtures(), seed=SEEDS)
def test_stages_change_the_shares_where_they_say(mixture: tuple[list[list[int]], list[Stage]], seed: int) -> None:
    sizes, stages = mixture
    order = MixtureOrder(sizes, stages, seed, 2)
    ends = [*(stage.first_sample for stage in stages[1:]), 300]
    for stage, end in zip(stages, ends, strict=True):
        shards, _ = order.at(stage.first_sample, end - stage.first_sample)
        read = Counter((np.searchsorted(order.first_shards, shards, side="right") - 1).tolist())
        total = sum(stage.weights, Fraction(0))
        for source, weight in enumerate(stage.weights):
            assert abs(read[source] - (end - stage.first_sample) * weight / total) < Fraction(3, 2)
            assert weight or not read[source]


@SMALL
@given(sizes=SIZES, seed=SEEDS, window=WINDOWS, position=st.integers(0, 200), count=st.integers(0, 60))
def test_a_mixture_of_one_is_the_order_of_the_source(
    sizes: list[int], seed: int, window: int, position: int, count: int
) -> None:
    one, order = MixtureOrder([sizes], [Stage(0, (Fraction(1),))], seed, window), Order(sizes, seed, window)
    for ours, before in zip(one.at(position, count), order.at(position, count), strict=True):
        assert (ours == before).all()
    assert one.upcoming_shards(position) == order.upcoming_shards(position)
    assert one.upcoming_shards(position, 2) == order.upcoming_shards(position, 2 * window)
    assert one.window_at(position) == (order.window_at(position),)


@SMALL
@given(mixture=mixtures(), seed=SEEDS, window=WINDOWS, position=st.integers(0, 200))
def test_upcoming_shards_are_those_that_come(
    mixture: tuple[list[list[int]], list[Stage]], seed: int, window: int, position: int
) -> None:
    sizes, stages = mixture
    order = MixtureOrder(sizes, stages, seed, window)
    everything, soon = order.upcoming_shards(position), order.upcoming_shards(position, 1)
    assert len(everything) == len(set(everything)) == sum(size > 0 for of_source in sizes for size in of_source)
    assert {shard for shard, _ in sequence(order, position, 60)} <= set(everything)
    assert {shard for shard, _ in sequence(order, position, 1)} <= set(soon) <= set(everything)


def test_equal_sources_are_shuffled_by_numbers_of_their_own() -> None:
    order = MixtureOrder([[40], [40]], [Stage(0, (Fraction(1), Fraction(1)))], seed=0, window=1)
    shards, rows = order.at(0, 80)
    assert rows[shards == 0].tolist() != rows[shards == 1].tolist()


def test_weights_of_many_digits_keep_their_share() -> None:
    """Counts of samples as weights have no small common denominator."""
    weights = [Fraction(123_456_789), Fraction(987_654_321_987), Fraction(1, 7)]
    counts = Shares(weights).counts(np.array([10**9]))[:, 0]
    for weight, count in zip(weights[:2], counts[:2].tolist(), strict=True):
        assert abs(count / 10**9 - float(weight / sum(weights))) < 1e-8


def test_a_billion_samples_of_three_sources_need_little_memory() -> None:
    sizes = [np.full(100_000, 4096)] * 2 + [np.full(50_000, 4096)]
    tracemalloc.start()
    try:
        order = MixtureOrder(sizes, [Stage(0, (Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)))], seed=0, window=8)
        for position in (0, 123_456_789_012, 2**50):
            order.at(position, 256)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 20e6 and peak < 28e6
