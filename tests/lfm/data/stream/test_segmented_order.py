"""The order of a data set that grows and loses samples: exactly once in a pass, resumable anywhere, and old orders kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.columns.selection import Selection
from lfm.data.stream.sample_order import Order
from lfm.data.stream.segmented_order import MixedSamples, Pool, SegmentedOrder, Selected

Place = tuple[int, int]


def selection_of(masks: list[np.ndarray]) -> Selection:
    """Return the selection of the rows whose mask is true, by shard."""
    rows = [np.flatnonzero(mask) for mask in masks]
    return Selection(np.concatenate(rows).astype(np.uint16), np.array([len(row) for row in rows]))


def places(order: SegmentedOrder | Order, position: int, count: int) -> list[Place]:
    return list(zip(*(part.tolist() for part in order.at(position, count)), strict=True))


@dataclass
class History:
    """Segments of a data set: starts, pools and the samples of each pool."""

    starts: list[int]
    pools: list[Pool]
    samples: list[set[Place]]


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Draw up to four segments; each adds shards, drops samples, does both or nothing, and joins in either way."""
    history = History([], [], [])
    sizes: list[int] = []
    dropped: set[Place] = set()
    for number in range(draw(st.integers(1, 4))):
        before = history.starts[-1] if number else 0
        history.starts.append(before + draw(st.integers(0, 30)) if number else 0)
        sizes = sizes + draw(st.lists(st.integers(0, 7), min_size=0 if number else 1, max_size=4))
        sizes[0] = max(1, sizes[0])
        everything = {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
        if draw(st.booleans()):
            dropped = dropped | {
                place for place in draw(st.sets(st.sampled_from(sorted(everything)))) if place != (0, 0)
            }
        selection = None
        if dropped:
            selection = selection_of(
                [
                    np.array([(shard, row) not in dropped for row in range(size)], bool)
                    for shard, size in enumerate(sizes)
                ]
            )
        counts = sizes if selection is None else selection.counts
        history.pools.append(Pool(counts, selection, at_once=draw(st.booleans())))
        history.samples.append(everything - dropped)
    return history


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.integers(0, 99), st.integers(1, 4))
def test_one_segment_is_the_order_as_it_always_was(sizes: list[int], seed: int, window: int) -> None:
    """Samples, windows of use and upcoming shards, also of a source of a mixture."""
    for stream in ((), (2,)):
        one = SegmentedOrder([0], [Pool(sizes)], seed, window, stream=stream)
        order = Order(sizes, seed, window, stream=stream)
        total = sum(sizes)
        assert places(one, 0, 3 * total) == places(order, 0, 3 * total)
        for position in (0, total // 2, total, 2 * total - 1):
            assert set(one.upcoming_shards(position, 2 * window)) <= set(order.upcoming_shards(position))
            assert one.upcoming_shards(position) == order.upcoming_shards(position)


@settings(deadline=None)
@given(histories(), st.integers(0, 99), st.integers(1, 3), st.integers(0, 60), st.integers(1, 60))
def test_any_part_is_a_slice_of_the_whole(history: History, seed: int, window: int, position: int, count: int) -> None:
    """So a run resumes at any sample, on any number of ranks; and what a later segment is does not change the past."""
    order = SegmentedOrder(history.starts, history.pools, seed, window)
    whole = places(order, 0, position + count)
    fresh = SegmentedOrder(history.starts, history.pools, seed, window)
    assert places(fresh, position, count) == whole[position:]
    assert [place for n in range(position, position + count) for place in places(order, n, 1)] == whole[position:]
    for num in range(1, len(history.starts)):
        before = SegmentedOrder(history.starts[:num], history.pools[:num], seed, window)
        assert places(before, 0, history.starts[num]) == places(order, 0, history.starts[num])


@settings(deadline=None)
@given(histories(), st.integers(0, 99), st.integers(1, 3))
def test_each_sample_once_in_a_pass(history: History, seed: int, window: int) -> None:
    """Whatever was added or dropped when: no pass repeats a sample, none that was dropped is read, and none is left out.

    The passes are counted as a reader would: a pass ends when every sample that it is to have was read.
    """
    order = SegmentedOrder(history.starts, history.pools, seed, window)
    unread: set[Place] = set()  # of the present pass
    members: set[Place] = set()  # that the present pass has or had
    position = 0
    ends = [*history.starts[1:], history.starts[-1] + 3 * len(history.samples[-1]) + 40]
    for end, pool, samples in zip(ends, history.pools, history.samples, strict=True):
        unread &= samples
        if pool.at_once and unread:
            unread |= {place for place in samples if place[0] > max(shard for shard, _ in members)}
            members |= unread
        for place in places(order, position, end - position) if end > position else []:
            if not unread:
                unread, members = set(samples), {(len(pool.shard_sizes) - 1, -1), *samples}
            assert place in unread
            unread.remove(place)
        position = end


@settings(deadline=None)
@given(histories(), st.integers(0, 99), st.integers(1, 3), st.integers(0, 80))
def test_the_shards_of_the_next_samples_are_announced(history: History, seed: int, window: int, position: int) -> None:
    """While the window is one and the same, its shards are among the requested ones: two windows, of each part."""
    order = SegmentedOrder(history.starts, history.pools, seed, window)
    requested = order.upcoming_shards(position, 2 * window)
    assert len(requested) <= 4 * window * len(history.starts)
    now = order.window_at(position)
    for later in range(position, position + 10):
        if order.window_at(later) != now:
            break
        assert places(order, later, 1)[0][0] in requested
    announced = order.upcoming_shards(position)
    assert len(set(announced)) == len(announced)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_new_samples_are_spread_over_the_rest_of_the_pass(rest: int, new: int, seed: int) -> None:
    """Joining at once: of any first n samples, the share of the new ones is exact up to rounding."""
    old = 50
    order = SegmentedOrder([0, old - rest], [Pool([old]), Pool([old, new], at_once=True)], seed, 2)
    shards = order.at(old - rest, rest + new)[0]
    expected = np.arange(1, rest + new + 1) * new / (rest + new)
    assert (abs(np.cumsum(shards == 1) - expected) <= 0.5).all()
    assert Counter(order.at(old + new, old + new)[0].tolist()) == {0: old, 1: new}


def test_by_default_new_samples_join_at_the_next_multiple_of_the_pass() -> None:
    """A pass that has begun has none of them; at its very border, they join there."""
    for start, join in ((0, 0), (1, 10), (10, 10), (11, 20)):
        order = SegmentedOrder([0, start], [Pool([6, 4]), Pool([6, 4, 5])], 3, 2)
        before = Order([6, 4], 3, 2)
        assert places(order, 0, join) == (places(before, 0, join) if join else [])
        assert Counter(order.at(join, 15)[0].tolist()) == {0: 6, 1: 4, 2: 5}


def test_both_parts_end_exactly_where_they_end_beyond_rounded_shares() -> None:
    """Sums of more than 2^30 samples are mixed by rounded shares, and still each sample comes once."""

    def of(num_samples: int) -> Selected:
        return Selected(Order([num_samples], 0, 1), None)

    mixed = MixedSamples(of(3 * 2**30 + 7), of(2**29 + 3))
    for position in (0, mixed.num_samples // 2, mixed.num_samples - 50):
        counts = mixed._counts(position, 51)
        assert (counts.sum(axis=0) == np.arange(position, position + 51)).all() and (np.diff(counts) >= 0).all()
    assert counts[:, -1].tolist() == [3 * 2**30 + 7, 2**29 + 3]


@pytest.mark.parametrize("at_once", [False, True])
def test_the_permutations_of_segments_are_independent(at_once: bool) -> None:
    """The passes of a pool of equal shape do not repeat the permutation that an earlier segment had."""
    sizes = [50] * 4
    order = SegmentedOrder([0, 200, 400], [Pool(sizes, at_once=at_once)] * 3, 1, 4)
    passes = [places(order, start, 200) for start in (0, 200, 400, 600)]
    assert all(passes[one] != passes[two] for one in range(4) for two in range(one))
