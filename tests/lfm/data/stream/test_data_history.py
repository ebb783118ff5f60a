"""The order of a mixture by its history, and the list of dropped samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lfm.data.columns.selection import Selection
from lfm.data.dropped import Drop, DroppedSample, add_drop, load_drops
from lfm.data.manifest import DROPPED
from lfm.data.stream.balanced_order import Balance
from lfm.data.stream.data_history import continues, order_of, state_of, with_views
from lfm.data.stream.latent_stream import LatentStream
from lfm.data.stream.mixture import LatentSource, Mixture, mix, single_source
from lfm.data.stream.mixture_order import MixtureOrder
from lfm.data.versions import Segment, SourceState, with_version_before
from lfm.errors import DataError
from lfm.storage.cache import Cache
from lfm.world import World
from tests.support.latents import OPTIONS, SIZES, TOTAL, Latents, samples_of

FIRST = 4  # shards of the first version


def drop_of(*places: tuple[int, int]) -> Drop:
    """Return an entry of the list for samples by shard and row."""
    return Drop(
        samples=tuple(
            DroppedSample(key=f"{shard:06d}{row:06d}", shard=f"{shard:06d}.tar", row=row) for shard, row in places
        )
    )


@pytest.fixture
def source(tmp_path: Path) -> LatentSource:
    """A data set that has grown from 4 shards to 6, and lost two samples then."""
    latents = Latents(str(tmp_path / "grown"), std=0.0)
    before = latents.manifest.model_copy(update={"shards": latents.manifest.shards[:FIRST]})
    manifest = with_version_before(latents.manifest, before)
    return LatentSource(latents.folder, manifest, "grown", drops=(drop_of((0, 1), (5, 2)),))


def history_of(source: LatentSource, first_sample: int, **how: object) -> tuple[Segment, ...]:
    """Return the history of a training that was resumed with the newest version at a sample."""
    old = state_of(source, source.manifest.versions[0].digest, ())
    return (
        Segment(first_sample=0, sources=(old,)),
        Segment(first_sample=first_sample, sources=(state_of(source),), **how),
    )


def grown(source: LatentSource, history: tuple[Segment, ...]) -> Mixture:
    """Return the mixture of one source with a history."""
    read = with_views(source, [segment.sources[0] for segment in history])
    return Mixture((read,), read.manifest, history=history)


def places(order: MixtureOrder, position: int, count: int) -> list[tuple[int, int]]:
    return list(zip(*(part.tolist() for part in order.at(position, count)), strict=True))


def test_states_are_of_versions_without_dropped_samples(source: LatentSource) -> None:
    first, newest = (segment.sources[0] for segment in history_of(source, 0))
    assert (first.num_samples, newest.num_samples) == (sum(SIZES[:FIRST]), TOTAL - 2)
    assert (first.num_drops, newest.num_drops) == (0, 1) and first.drops is None
    assert first.digest == source.manifest.versions[0].digest and newest.digest == source.manifest.digest
    assert continues(source, first) and continues(source, newest)
    assert not continues(replace(source, drops=()), newest)
    assert not continues(replace(source, drops=(drop_of((0, 0)), *source.drops)), newest)
    assert not continues(source, first.model_copy(update={"digest": "0"}))
    with pytest.raises(DataError, match="lost its version"):
        with_views(replace(source, drops=()), [first, newest])
    with pytest.raises(DataError, match="there is no sample 000000000009 in 000000"):
        state_of(replace(source, drops=(drop_of((0, 9)),)))


@pytest.mark.parametrize("join", ["next_pass", "at_once"])
@pytest.mark.parametrize("resumed_at", [8, 16, 40])
def test_the_stream_reads_old_samples_as_before_and_new_ones_from_then_on(
    source: LatentSource, join: str, resumed_at: int
) -> None:
    """Also in batches that cross a segment; a dropped sample is never read again."""
    before = single_source(source.folder, source.manifest.model_copy(update={"shards": source.manifest.shards[:FIRST]}))
    mixture = grown(source, history_of(source, resumed_at, join=join))
    streams = [LatentStream(each, OPTIONS, World(), Cache(Path("/nowhere"))) for each in (before, mixture)]
    old, new = (samples_of(*(stream.batch(first) for first in range(0, 160, 8))) for stream in streams)
    assert [old[number] for number in range(resumed_at)] == [new[number] for number in range(resumed_at)]
    order = order_of(mixture, OPTIONS.seed, OPTIONS.window)
    read = places(order, resumed_at, 160)
    assert not {(0, 1), (5, 2)} & {*read}
    assert len({*read}) == TOTAL - 2
    rest = -resumed_at % sum(SIZES[:FIRST]) - 1  # one sample of it may be dropped
    begun = read[: max(0, rest)]
    assert (join == "at_once") == any(shard >= FIRST for shard, _ in begun)


def test_held_back_shards_are_the_last_of_the_first_version(source: LatentSource) -> None:
    training, held_back = grown(source, history_of(source, 20)).split(1)
    assert [shard.name for shard in held_back.sources[0].manifest.shards] == ["000003.tar"]
    assert [shard.name[5] for shard in training.sources[0].manifest.shards] == ["0", "1", "2", "4", "5"]
    assert [view.num_shards for view in training.sources[0].views] == [3, 5]
    assert training.sources[0].shard_sizes() == [4, 3, 0, 4, 5]
    order = order_of(training, 1, 2)
    assert {shard for shard, _ in places(order, 0, 20)} == {0, 1}
    assert {shard for shard, _ in places(order, 24, 40)} == {0, 1, 3, 4}


def test_a_source_that_did_not_change_keeps_its_order(source: LatentSource, tmp_path: Path) -> None:
    """In a mixture with one that has grown."""
    other = Latents(str(tmp_path / "other"), seed=1)
    still = LatentSource(other.folder, other.manifest, "still")
    first, newest = history_of(source, 30)
    state = state_of(still)
    history = tuple(segment.model_copy(update={"sources": (*segment.sources, state)}) for segment in (first, newest))
    read = [with_views(source, [segment.sources[0] for segment in history]), with_views(still, [state, state])]
    alone = mix([replace(read[0], views=()), still], {"class"})
    mixture = replace(mix(read, {"class"}), history=history)
    read_then, read_now = (
        [place for place in places(order_of(each, 3, 2), 0, 300) if place[0] >= len(SIZES)] for each in (alone, mixture)
    )
    assert read_then == read_now


def test_balanced_classes_begin_anew_with_a_new_version(source: LatentSource) -> None:
    """Until then the order is that of the old version; from then on every class has its share, of old and new samples."""
    random = np.random.default_rng(0)
    codes = [random.integers(3, size=size).astype(np.uint16) for size in SIZES]

    def balance(selection: Selection | None, num_shards: int) -> Balance:
        chosen = Selection.of_all(np.array(SIZES[:num_shards])) if selection is None else selection
        rows = np.split(chosen.rows, np.cumsum(chosen.counts)[:-1])
        return Balance(np.concatenate([of[row] for of, row in zip(codes, rows, strict=False)]), chosen.counts, 1.0)

    def balanced(mixture: Mixture) -> MixtureOrder:
        one = mixture.sources[0]
        views = tuple(replace(view, balance=balance(view.selection, view.num_shards)) for view in one.views)
        own = balance(one.selection, len(one.manifest.shards))
        return order_of(replace(mixture, sources=(replace(one, balance=own, views=views),)), 5, 2)

    history = history_of(source, 31)
    order = balanced(grown(source, history))
    assert places(order, 0, 31) == places(balanced(grown(source, history[:1])), 0, 31)
    assert places(order, 20, 40) == places(order, 0, 60)[20:]
    after = places(order, 31, 90)
    assert len({*after}) == TOTAL - 2 and not {(0, 1), (5, 2)} & {*after}
    counts = np.bincount([codes[shard][row] for shard, row in after])
    assert abs(counts - 30).max() <= 1
    assert order.window_at(30) != order.window_at(31)
    assert {shard for shard, _ in after} <= {*order.upcoming_shards(31, 2)}
    assert {*order.upcoming_shards(30)} == {0, 1, 3, 4, 5}


def test_the_list_of_dropped_samples_grows_at_its_end(tmp_path: Path) -> None:
    assert load_drops(str(tmp_path)) == ()
    for entry in (drop_of((0, 1)), Drop(reason="licence", samples=drop_of((2, 3), (0, 0)).samples)):
        add_drop(str(tmp_path), entry)
    assert [entry.reason for entry in load_drops(str(tmp_path))] == ["", "licence"]
    content = (tmp_path / DROPPED).read_text()
    (tmp_path / DROPPED).write_text(content.replace('"row": 3', '"row": -3').replace('"row":3', '"row":-3'))
    with pytest.raises(DataError, match=r"dropped\.json"):
        load_drops(str(tmp_path))


def test_a_state_has_bounded_numbers() -> None:
    with pytest.raises(ValueError, match="num_samples"):
        SourceState(digest="0", num_samples=-1)
