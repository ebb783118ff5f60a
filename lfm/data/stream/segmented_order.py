"""The order of samples of a data set that grows, or loses samples, while it is trained on.

A training is divided into segments. Each begins at a position of the order, and has a pool: the samples that are read from then
on. The positions before it stay as they were, so that the samples that a run has seen stay a function of its record. From its
start on, a pass that has begun is finished, without the samples that its pool has lost. The samples that the pool has gained

    join at the next pass    the pass that has begun has none of them, and every later one has all
    join at once             the rest of the pass, a samples, and the new ones, b samples, are mixed:
                             of the next n samples floor(n a / (a + b) + 1/2) are of the rest, each once

After that, every pass has each sample of the pool once. An order of one segment is that of `Order`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from lfm.data.columns.selection import Selection
from lfm.data.stream.balanced_order import BalancedOrder
from lfm.data.stream.sample_order import Order
from lfm.data.stream.shares import Shares

SEGMENTS = 2**32 - 1  # in place of an epoch: distinguishes the permutations of later segments
_SCANNED = 2**20  # positions that are compared with a pool at a time


@dataclass(frozen=True)
class Pool:
    """The samples that are read from the start of a segment on.

    Attributes:
        shard_sizes: samples that are read of each shard; later pools may have more shards.
        selection: which these are; None for the first ones of each shard.
        at_once: whether new samples join the pass that has begun.
    """

    shard_sizes: Sequence[int] | np.ndarray
    selection: Selection | None = None
    at_once: bool = False


class OrderedSamples(Protocol):
    """Samples in an order: endless, or `num_samples`."""

    num_samples: int

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows, int64 (count,) each."""

    def window_at(self, position: int) -> Hashable:
        """Return what changes when other shards are needed."""

    def shards_of_pass(self, position: int, count: int | None = None) -> list[int]:
        """Return the shards of the rest of the pass, those of the next use first; of each part the first `count`."""


class Selected:
    """The passes over a pool, without end; one pass has `num_samples`."""

    def __init__(self, order: Order, selection: Selection | None) -> None:
        self.order, self.selection, self.num_samples = order, selection, order.num_samples
        self.window_at, self.shards_of_pass = order.window_at, order.shards_of_pass

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows."""
        shards, rows = self.order.at(position, count)
        return shards, rows if self.selection is None else self.selection.rows_at(shards, rows)


class Remainder:
    """The samples of a pass from a position on, without those that a pool does not hold.

    Args:
        samples: the pass.
        first: position at which the remainder begins.
        end: position at which the pass ends.
        pool: what is read of it; None if that is all.
    """

    def __init__(self, samples: OrderedSamples, first: int, end: int, pool: Selection | None) -> None:
        self.samples, self.first = samples, first
        lost: list[np.ndarray] = []
        if pool is not None:
            for position in range(first, end, _SCANNED):
                is_kept = pool.contains(*samples.at(position, min(_SCANNED, end - position)))
                lost.append(np.flatnonzero(~is_kept) + position - first)
        places = np.concatenate([np.zeros(0, np.int64), *lost])
        self.num_samples = end - first - len(places)
        self._kept_before = places - np.arange(len(places))  # number of kept samples before each lost one

    def _positions(self, position: int, count: int) -> np.ndarray:
        """Return the positions in the pass of `count` samples of the remainder."""
        numbers = np.arange(position, position + count)
        return self.first + numbers + np.searchsorted(self._kept_before, numbers, side="right")

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows."""
        positions = self._positions(position, count)
        start = int(positions[0])
        shards, rows = self.samples.at(start, int(positions[-1]) + 1 - start)
        return shards[positions - start], rows[positions - start]

    def window_at(self, position: int) -> Hashable:
        """Return the window of the pass."""
        return self.samples.window_at(int(self._positions(position, 1)[0]))

    def shards_of_pass(self, position: int, count: int | None = None) -> list[int]:
        """Return the shards of the rest."""
        return self.samples.shards_of_pass(int(self._positions(position, 1)[0]), count)


class MixedSamples:
    """Two parts of a pass, mixed in the proportion of their numbers of samples."""

    def __init__(self, one: OrderedSamples, other: OrderedSamples) -> None:
        self.parts, self.num_samples = (one, other), one.num_samples + other.num_samples
        self._shares = Shares([Fraction(one.num_samples), Fraction(other.num_samples)])

    def _counts(self, position: int, count: int) -> np.ndarray:
        """Return the samples of each part among the first n, int64 (2, count), for n from `position` on."""
        numbers = np.arange(position, position + count)
        one, other = (part.num_samples for part in self.parts)
        # The shares of more than 2^30 samples are rounded; both parts still end where they end.
        of_one = self._shares.counts(numbers)[0].clip(numbers - other, one)
        return np.stack([of_one, numbers - of_one])

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows."""
        shards, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        counts = self._counts(position, count + 1)
        for part, of_part in zip(self.parts, counts, strict=True):
            first, end = int(of_part[0]), int(of_part[-1])
            if end > first:
                places = np.diff(of_part) > 0
                shards[places], rows[places] = part.at(first, end - first)
        return shards, rows

    def _unfinished(self, position: int) -> list[tuple[OrderedSamples, int]]:
        """Return the parts that are not finished at a position, each with its own position."""
        counts = self._counts(position, 1)[:, 0].tolist()
        return [(part, own) for part, own in zip(self.parts, counts, strict=True) if own < part.num_samples]

    def window_at(self, position: int) -> Hashable:
        """Return the windows of the parts."""
        return tuple(part.window_at(own) for part, own in self._unfinished(position))

    def shards_of_pass(self, position: int, count: int | None = None) -> list[int]:
        """Return the shards of both parts, those that are needed after the same share of their part together."""
        lists = [part.shards_of_pass(own, count) for part, own in self._unfinished(position)]
        keyed = [(place / len(shards), shard) for shards in lists for place, shard in enumerate(shards)]
        return [shard for _, shard in sorted(keyed, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class _Piece:
    """Samples from a position on: passes without end, or the rest of one."""

    start: int
    samples: OrderedSamples
    num_shards: int  # the first ones, of which it may have samples


class SegmentedOrder:
    """The shard and row of each position of an endless stream in which pools follow one another.

    It has the methods of `Order`; rows are those of the shards, also where samples are selected.

    Args:
        starts: position at which each segment begins, not descending; the first is 0.
        pools: of the segments.
        seed, window, stream: as of `Order`.
    """

    def __init__(
        self, starts: Sequence[int], pools: Sequence[Pool], seed: int, window: int, *, stream: tuple[int, ...] = ()
    ) -> None:
        assert starts[0] == 0, "the first segment begins at the first position"
        self.seed, self.window, self.stream = seed, window, stream
        self.shard_sizes = np.asarray(pools[-1].shard_sizes, np.int64)
        self.num_samples = int(self.shard_sizes.sum())  # of a pass, in the end
        self._pieces: list[_Piece] = []
        for number, start in enumerate(starts):
            self._begin(number, start, pools[: number + 1])

    def _begin(self, number: int, start: int, pools: Sequence[Pool]) -> None:
        """Replace the pieces from the start of a segment on."""
        pool, own = pools[-1], (*self.stream, SEGMENTS, number) if number else self.stream
        num_shards = len(pool.shard_sizes)
        rest = self._rest(start, pools) if number else None
        self._pieces = [piece for piece in self._pieces if piece.start < start]
        if rest and rest.samples.num_samples:
            if pool.at_once:
                rest = self._with_new_samples(rest, pool, (*own, SEGMENTS))
            self._pieces.append(rest)
            start += rest.samples.num_samples
        order = Order(pool.shard_sizes, self.seed, self.window, stream=own)
        self._pieces.append(_Piece(start, Selected(order, pool.selection), num_shards))

    def _rest(self, start: int, pools: Sequence[Pool]) -> _Piece | None:
        """Return what the newest pool holds of the rest of the pass that has begun at the start of its segment."""
        before, pool = pools[-2:]
        sizes = np.asarray(before.shard_sizes)
        has_lost = bool((np.asarray(pool.shard_sizes)[: len(sizes)] < sizes).any())
        piece = next(piece for piece in reversed(self._pieces) if piece.start <= start)
        first, samples = start - piece.start, piece.samples
        end = samples.num_samples
        if isinstance(samples, Selected):
            end *= -(-first // samples.num_samples)
        if first == end:
            return None
        return _Piece(start, Remainder(samples, first, end, pool.selection if has_lost else None), piece.num_shards)

    def _with_new_samples(self, rest: _Piece, pool: Pool, stream: tuple[int, ...]) -> _Piece:
        """Mix the rest of a pass with the samples of the shards that it has not."""
        sizes = np.array(pool.shard_sizes, np.int64)
        sizes[: rest.num_shards] = 0
        if not sizes.any():
            return rest
        new = Selected(Order(sizes, self.seed, self.window, stream=stream), pool.selection)
        return _Piece(rest.start, MixedSamples(rest.samples, new), len(sizes))

    def _piece_at(self, position: int) -> int:
        return bisect_right(self._pieces, position, key=lambda piece: piece.start) - 1

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows, int64 (count,) each, of `count` positions from `position` on."""
        shards, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        filled = 0
        while filled < count:
            number, first = self._piece_at(position + filled), position + filled
            end = position + count
            if number + 1 < len(self._pieces):
                end = min(end, self._pieces[number + 1].start)
            piece, part = self._pieces[number], slice(filled, filled + end - first)
            shards[part], rows[part] = piece.samples.at(first - piece.start, end - first)
            filled = part.stop
        return shards, rows

    def window_at(self, position: int) -> Hashable:
        """Return what changes when other shards are needed."""
        number = self._piece_at(position)
        piece = self._pieces[number]
        return number, piece.samples.window_at(position - piece.start)

    def upcoming_shards(self, position: int, count: int | None = None) -> list[int]:
        """Return the shards in the order of their next use, from the window of `position` on.

        All or the first `count`, and as many of each part while new samples are mixed with the rest of a pass.
        """
        number = self._piece_at(position)
        piece = self._pieces[number]
        shards = piece.samples.shards_of_pass(position - piece.start, count)
        if count is None or len(shards) < count:
            missing = None if count is None else count - len(shards)
            shards += self._shards_after(position, number, missing)
        return list(dict.fromkeys(shards))  # each at its first place

    def _shards_after(self, position: int, number: int, count: int | None) -> list[int]:
        """Return the shards of the pass after that of `position`."""
        piece = self._pieces[number]
        following = self._pieces[number + 1] if number + 1 < len(self._pieces) else None
        if isinstance(piece.samples, Selected):
            length = piece.samples.num_samples
            next_pass = ((position - piece.start) // length + 1) * length
            if following is None or piece.start + next_pass < following.start:
                return piece.samples.shards_of_pass(next_pass, count)
        assert following is not None, "the rest of a pass is followed by other passes"
        return following.samples.shards_of_pass(0, count)


class SuccessiveOrders:
    """Orders of which each begins anew at a position, with all its samples: for balanced classes, which have no common pass.

    Args:
        starts: position at which each order begins, not descending; the first is 0.
        orders: the orders.
        selections: the samples that each of them counts; None for all.
    """

    def __init__(
        self, starts: Sequence[int], orders: Sequence[BalancedOrder], selections: Sequence[Selection | None]
    ) -> None:
        self.shard_sizes = orders[-1].shard_sizes
        self._starts, self._orders, self._selections = starts, orders, selections

    def _at(self, position: int) -> int:
        return bisect_right(self._starts, position) - 1

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows, int64 (count,) each, of `count` positions from `position` on."""
        parts = []
        while count:
            number = self._at(position)
            is_last = number + 1 == len(self._starts)
            length = count if is_last else min(count, self._starts[number + 1] - position)
            shards, rows = self._orders[number].at(position - self._starts[number], length)
            selection = self._selections[number]
            parts.append((shards, rows if selection is None else selection.rows_at(shards, rows)))
            position, count = position + length, count - length
        return np.concatenate([shards for shards, _ in parts]), np.concatenate([rows for _, rows in parts])

    def window_at(self, position: int) -> Hashable:
        """Return the number of the order: all of its shards are one window."""
        return self._at(position)

    def upcoming_shards(self, position: int, count: int | None = None) -> list[int]:
        """Return all shards of the order at a position, whatever `count` is, and with no `count` those of the next one."""
        number = self._at(position)
        shards = self._orders[number].upcoming_shards(position - self._starts[number])
        if count is None and number + 1 < len(self._orders):
            shards += self._orders[number + 1].upcoming_shards(0)
        return list(dict.fromkeys(shards))
