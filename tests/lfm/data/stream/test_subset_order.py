"""The order of a subset: each selected sample once in a pass, for any world, and whole sets in the order that they had."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.columns.selection import Selection
from lfm.data.stream.latent_stream import LatentStream
from lfm.data.stream.mixture import LatentSource, Mixture
from lfm.data.stream.mixture_order import MixtureOrder, Stage
from lfm.storage.cache import Cache
from lfm.world import World
from tests.support.latents import OPTIONS, SIZES, TOTAL, Latents, samples_of

ONE = (Stage(0, (Fraction(1),)),)


def selection_of(masks: list[list[bool]]) -> Selection:
    """Return the selection of the rows whose mask is true, by shard."""
    rows = [np.flatnonzero(mask) for mask in masks]
    return Selection(np.concatenate(rows).astype(np.uint16), np.array([len(row) for row in rows]))


MASKS = st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=6).filter(lambda masks: any(map(any, masks)))


@settings(deadline=None)
@given(MASKS, st.integers(0, 99), st.integers(1, 3), st.integers(0, 40), st.integers(0, 40))
def test_each_selected_sample_once_in_a_pass(
    masks: list[list[bool]], seed: int, window: int, position: int, count: int
) -> None:
    """Passes hold exactly the selected rows, and any part of the order is a slice of the whole."""
    selection = selection_of(masks)
    order = MixtureOrder([selection.counts], ONE, seed, window, [selection])
    selected = {(shard, row) for shard, mask in enumerate(masks) for row, is_in in enumerate(mask) if is_in}
    num = len(selected)
    for first in (0, num):
        assert set(zip(*(part.tolist() for part in order.at(first, num)), strict=True)) == selected
    whole = order.at(0, position + count)
    for part, expected in zip(order.at(position, count), whole, strict=True):
        assert part.tolist() == expected[position:].tolist()


@settings(deadline=None)
@given(MASKS, MASKS, st.integers(0, 99), st.integers(1, 5), st.integers(1, 5))
def test_subsets_in_a_mixture(one: list[list[bool]], two: list[list[bool]], seed: int, first: int, second: int) -> None:
    """Shares hold over the selected samples, each source's own once before any again."""
    selections = [selection_of(one), selection_of(two)]
    stages = (Stage(0, (Fraction(first), Fraction(second))),)
    order = MixtureOrder([selection.counts for selection in selections], stages, seed, 2, selections)
    shards, rows = order.at(0, 60)
    of_second = shards >= order.first_shards[1]
    assert abs(of_second.sum() - 60 * second / (first + second)) < 1
    for source, (part, masks) in enumerate(zip((~of_second, of_second), (one, two), strict=True)):
        places = list(zip((shards[part] - order.first_shards[source]).tolist(), rows[part].tolist(), strict=True))
        assert all(masks[shard][row] for shard, row in places)
        num = sum(map(sum, masks))
        for start in range(0, len(places), num):
            assert len(set(places[start : start + num])) == len(places[start : start + num])


@given(st.integers(0, 99), st.integers(1, 3))
def test_all_samples_selected_is_the_order_of_the_whole_set(seed: int, window: int) -> None:
    """A condition that holds for all samples changes nothing."""
    selection = selection_of([[True] * size for size in SIZES])
    whole = MixtureOrder([SIZES], ONE, seed, window).at(0, 3 * TOTAL)
    for part, expected in zip(
        MixtureOrder([SIZES], ONE, seed, window, [selection]).at(0, 3 * TOTAL), whole, strict=True
    ):
        assert part.tolist() == expected.tolist()


def test_the_stream_of_a_subset_is_equal_for_every_world(tmp_path: Path) -> None:
    """Latents are those of the selected rows, on one rank and on two, from the start and from the middle."""
    latents = Latents(str(tmp_path), std=0.0)
    masks = [[(3 * row + shard) % 4 != 1 for row in range(size)] for shard, size in enumerate(SIZES)]
    source = LatentSource(str(tmp_path), latents.manifest, "s", selection=selection_of(masks))
    mixture = Mixture((source,), latents.manifest)
    num, batch = source.num_samples, OPTIONS.global_batch
    assert 0 < num < TOTAL

    def read(world: World, start: int, end: int) -> dict[int, tuple[bytes, ...]]:
        stream = LatentStream(mixture, OPTIONS, world, Cache(Path("/nowhere")))
        return samples_of(*(stream.batch(position) for position in range(start, end, batch)))

    end = 4 * batch
    whole = read(World(), 0, end)
    for rank in range(2):
        part = read(World(rank, rank, 2), 2 * batch, end)
        assert part and part.items() <= whole.items()
    scaled = {
        ((latents.posterior[shard, row, flip][:2].astype(np.float32) - 0.25) * 0.5).tobytes()
        for shard, mask in enumerate(masks)
        for row, is_in in enumerate(mask)
        if is_in
        for flip in (False, True)
    }
    assert {sample[0] for sample in whole.values()} <= scaled
