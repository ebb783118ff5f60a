"""Balanced classes: shares are exact at every sample, each class is read once before any of it comes again, for any world."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm import storage
from lfm.data.columns.selection import Selection
from lfm.data.stream.balanced_order import Balance, BalancedOrder, class_weights
from lfm.data.stream.latent_stream import LatentStream
from lfm.data.stream.mixture import LatentSource, Mixture, single_source
from lfm.data.stream.mixture_order import MixtureOrder, Stage
from lfm.errors import ConfigError
from lfm.storage.cache import Cache
from lfm.world import World
from tests.support.latents import NUM_CLASSES, OPTIONS, SIZES, Latents, samples_of

SMALL = settings(max_examples=60, deadline=None)
ONE = (Stage(0, (Fraction(1),)),)
# The class of each sample, by shard.
CODES = st.lists(st.lists(st.sampled_from([0, 0, 0, 1, 3, 7]), max_size=9), min_size=1, max_size=6).filter(any)
POWERS = st.sampled_from([0.1, 0.5, 0.75, 1.0])
SEEDS, WINDOWS = st.integers(0, 2**32), st.integers(1, 4)


def balance_of(codes: list[list[int]], power: float) -> Balance:
    return Balance(
        np.array(list(chain.from_iterable(codes)), np.uint16), np.array([len(part) for part in codes]), power
    )


def order_of(codes: list[list[int]], power: float, seed: int, window: int) -> BalancedOrder:
    return BalancedOrder([len(part) for part in codes], seed, window, balance_of(codes, power))


def sequence(order: BalancedOrder | MixtureOrder, position: int, count: int) -> list[tuple[int, int]]:
    shards, rows = order.at(position, count)
    assert shards.dtype == rows.dtype == np.int64 and len(shards) == len(rows) == count
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


@SMALL
@given(codes=CODES, power=POWERS, seed=SEEDS, window=WINDOWS)
def test_shares_are_exact_and_each_class_is_read_once_before_any_of_it_comes_again(
    codes: list[list[int]], power: float, seed: int, window: int
) -> None:
    read = sequence(order_of(codes, power, seed, window), 0, 300)
    sizes = Counter(list(chain.from_iterable(codes)))
    total = sum(size ** (1 - power) for size in sizes.values())
    of_class: dict[int, list[tuple[int, int]]] = {index: [] for index in sizes}
    for number, (shard, row) in enumerate(read, 1):
        of_class[codes[shard][row]].append((shard, row))
        for index, size in sizes.items():
            assert abs(len(of_class[index]) - number * size ** (1 - power) / total) < 1.5
    for index, places in of_class.items():
        everything = {(s, r) for s, part in enumerate(codes) for r, code in enumerate(part) if code == index}
        for start in range(0, len(places), len(everything)):
            one_pass = places[start : start + len(everything)]
            assert len(set(one_pass)) == len(one_pass) and set(one_pass) <= everything


@SMALL
@given(codes=CODES, power=POWERS, seed=SEEDS, start=st.integers(0, 300), count=st.integers(0, 60))
def test_resuming_at_any_sample_is_having_read_all_before(
    codes: list[list[int]], power: float, seed: int, start: int, count: int
) -> None:
    replayed = sequence(order_of(codes, power, seed, 2), 0, start + count)
    order = order_of(codes, power, seed, 2)
    assert sequence(order, start, count) == replayed[start:]
    assert [pair for n in range(start, start + count) for pair in sequence(order, n, 1)] == replayed[start:]


@SMALL
@given(
    codes=CODES,
    power=POWERS,
    seed=SEEDS,
    phases=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_order_is_equal_for_every_world_and_batch(
    codes: list[list[int]], power: float, seed: int, phases: list[tuple[int, int, int]]
) -> None:
    """Each phase: a number of ranks, a global batch and a number of steps; then the run is resumed with others."""
    position, read = 0, []
    for world_size, batch, steps in phases:
        orders = [order_of(codes, power, seed, 2) for _ in range(world_size)]
        for _ in range(steps):
            for rank, order in enumerate(orders):
                part = World(rank, 0, world_size).slice_of(batch)
                read += sequence(order, position + part.start, part.stop - part.start)
            position += batch
    assert read == sequence(order_of(codes, power, seed, 2), 0, position)


@SMALL
@given(codes=CODES, power=POWERS, seed=SEEDS, window=WINDOWS, position=st.integers(0, 200))
def test_all_shards_are_upcoming_those_of_the_next_samples_first(
    codes: list[list[int]], power: float, seed: int, window: int, position: int
) -> None:
    order = order_of(codes, power, seed, window)
    upcoming = order.upcoming_shards(position, 1)
    assert sorted(upcoming) == [shard for shard, part in enumerate(codes) if part]
    seen = list(dict.fromkeys(shard for shard, _ in sequence(order, position, 60)))
    assert upcoming[: len(seen)] == seen


@SMALL
@given(codes=CODES, other=CODES, power=POWERS, seed=SEEDS, first=st.integers(1, 5), second=st.integers(1, 5))
def test_balance_within_a_source_of_a_mixture_leaves_the_shares_and_the_other_source_as_they_are(
    codes: list[list[int]], other: list[list[int]], power: float, seed: int, first: int, second: int
) -> None:
    stages = (Stage(0, (Fraction(first), Fraction(second))),)
    sizes = [[len(part) for part in each] for each in (codes, other)]
    balanced = MixtureOrder(sizes, stages, seed, 2, balances=[balance_of(codes, power), None])
    before = sequence(MixtureOrder(sizes, stages, seed, 2), 0, 90)
    after = sequence(balanced, 0, 90)
    for one, two in zip(before, after, strict=True):
        is_other = one[0] >= len(codes)
        assert (two[0] >= len(codes)) == is_other
        assert not is_other or one == two
    alone = BalancedOrder(sizes[0], seed, 2, balance_of(codes, power), stream=(0,))
    own = [place for place in after if place[0] < len(codes)]
    assert own == sequence(alone, 0, len(own))


@SMALL
@given(codes=CODES, keep=st.lists(st.booleans(), min_size=54, max_size=54), power=POWERS, seed=SEEDS)
def test_balance_within_a_subset_reads_the_selected_samples_only(
    codes: list[list[int]], keep: list[bool], power: float, seed: int
) -> None:
    flags = iter(keep)
    rows = [[row for row in range(len(part)) if next(flags)] for part in codes]
    if not any(rows):
        return
    kept = [[part[row] for row in of_shard] for part, of_shard in zip(codes, rows, strict=True)]
    selection = Selection(np.array(list(chain.from_iterable(rows)), np.uint16), np.array([len(part) for part in rows]))
    order = MixtureOrder([selection.counts], ONE, seed, 2, [selection], [balance_of(kept, power)])
    selected = {(shard, row) for shard, of_shard in enumerate(rows) for row in of_shard}
    assert set(sequence(order, 0, 600)) == selected


def test_weights_are_powers_of_the_counts() -> None:
    assert class_weights([1, 4, 100], 1.0) == [1, 1, 1]
    assert class_weights([1, 4, 100], 0.5) == [1, 2, 10]
    assert float(class_weights([5], 0.3)[0]) == pytest.approx(5**0.7, rel=1e-14)


def test_a_shard_left_out_keeps_the_shares_of_the_classes() -> None:
    codes = [[0, 0, 1], [0, 0, 0, 0], [1, 1]]
    order = BalancedOrder([3, 0, 2], 0, 1, balance_of(codes, 0.5))
    read = Counter(codes[shard][row] for shard, row in sequence(order, 0, 300))
    assert read[0] / 300 == pytest.approx(6**0.5 / (6**0.5 + 3**0.5), abs=0.01)
    assert 1 not in {shard for shard, _ in sequence(order, 0, 300)}
    of_one_class = BalancedOrder([3, 4, 0], 0, 1, balance_of([[0, 0, 0], [0, 0, 0, 0], [1, 1]], 1.0))
    assert {shard for shard, _ in sequence(of_one_class, 0, 100)} == {0, 1}


def test_the_stream_has_all_classes_alike_on_every_world(tmp_path: Path) -> None:
    """Also after a split into parts to train on and held back, of which the second is read as it is."""
    latents = Latents(str(tmp_path), std=0.0)
    codes = np.array([latents.classes[shard, row] for shard, size in enumerate(SIZES) for row in range(size)])
    source = LatentSource(
        str(tmp_path), latents.manifest, "s", balance=Balance(codes.astype(np.uint16), np.array(SIZES), 1.0)
    )
    training, held_back = Mixture((source,), latents.manifest).split(1)
    assert held_back.sources[0].balance is None
    options = replace(OPTIONS, conditions=frozenset({"class"}))
    border = sum(SIZES[:-1])
    present = np.unique(codes[:border])
    batch = options.global_batch

    def stream(world: World) -> LatentStream:
        return LatentStream(training, options, world, Cache(Path("/nowhere")))

    one, end = stream(World()), 12 * batch
    whole = [one.batch(position) for position in range(0, end, batch)]
    read = Counter(int(index) for part in whole for index in part.condition.class_index)
    assert set(read) == set(present.tolist()) and len(present) > 1 and max(present) < NUM_CLASSES
    assert max(read.values()) - min(read.values()) <= 2
    samples = samples_of(*whole)
    for rank in range(2):
        of_rank = stream(World(rank, rank, 2))
        part = samples_of(*(of_rank.batch(position) for position in range(2 * batch, end, batch)))
        assert part and part.items() <= samples.items()


def test_a_remote_source_is_read_as_a_local_one_if_the_cache_holds_it(tmp_path: Path) -> None:
    latents = Latents(str(tmp_path / "latents"), std=0.0)
    remote = f"memory://{uuid.uuid4()}"
    for path in (tmp_path / "latents").glob("*.tar"):
        storage.write_bytes(f"{remote}/{path.name}", path.read_bytes())
    size = sum(shard.bytes for shard in latents.manifest.shards if shard.samples)
    codes = np.arange(sum(SIZES), dtype=np.uint16) % 3

    def mixture(folder: str) -> Mixture:
        source = single_source(folder, latents.manifest).sources[0]
        return Mixture((replace(source, balance=Balance(codes, np.array(SIZES), 0.5)),), latents.manifest)

    def read(folder: str, cache: Cache) -> dict[int, tuple[bytes, ...]]:
        stream = LatentStream(mixture(folder), OPTIONS, World(), cache)
        batches = list(islice(stream.batches(8), 6))
        stream.close()
        return samples_of(*batches)

    local = read(str(tmp_path / "latents"), Cache(Path("/nowhere")))
    empty = sum(shard.bytes for shard in latents.manifest.shards if not shard.samples)
    assert read(remote, Cache(tmp_path / "cache", size + empty)) == local
    with pytest.raises(ConfigError, match="raise its limit"):
        LatentStream(mixture(remote), OPTIONS, World(), Cache(tmp_path / "small", size - 1))
