"""The same samples with the same draws, whoever reads them, from wherever; and no thread is left or lost."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.data.random_draws import draw, draw_noise
from lfm.data.stream.latent_stream import LatentStream
from lfm.data.stream.mixture import single_source
from lfm.errors import DataError, LfmError, StorageError
from lfm.storage.cache import Cache
from lfm.types import LatentBatch
from lfm.world import World
from tests.support.latents import NUM_CLASSES, OPTIONS, SCALE, SHAPE, SHIFT, SIZES, TOTAL, Latents, samples_of

SMALL = settings(max_examples=12, deadline=None)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    return Latents(str(tmp_path_factory.mktemp("latents")))


def read(stream: LatentStream, samples_seen: int, count: int) -> list[LatentBatch]:
    with closing(stream.batches(samples_seen)) as batches:
        return list(islice(batches, count))


# --- what a batch holds ------------------------------------------------------------------------------------------


@SMALL
@given(start=st.integers(0, 3 * TOTAL), flips=st.booleans(), conditional=st.booleans())
def test_a_latent_is_mean_plus_std_times_noise_shifted_and_scaled(
    tmp_path_factory: pytest.TempPathFactory, start: int, flips: bool, conditional: bool
) -> None:
    latents = Latents(str(tmp_path_factory.mktemp("latents")), classes=conditional, flips=flips)
    stream = latents.stream(replace(OPTIONS, conditions=frozenset({"class"} if conditional else ())))
    batch = stream.batch(start)
    numbers = batch.sample_numbers.numpy()
    assert sorted(numbers) == list(range(start, start + 8))
    draws = draw(OPTIONS.seed, batch.sample_numbers)
    posterior_noise, noise = draw_noise(OPTIONS.seed, batch.sample_numbers, SHAPE)
    shards, rows = stream.order.at(start, 8)
    for row, number in enumerate(numbers):
        place = int(shards[number - start]), int(rows[number - start])
        moments = latents.posterior[(*place, bool(draws.flip[row]) and flips)].astype(np.float64)
        mean, std = moments.reshape(2, *SHAPE)
        expected = (mean + std * posterior_noise[row].numpy() - SHIFT) * SCALE
        assert np.allclose(batch.latents[row].numpy(), expected, atol=1e-6)
        if conditional:
            assert batch.condition.class_index is not None
            assert batch.condition.class_index[row] == latents.classes[place]
    assert torch.equal(batch.noise, noise)
    assert torch.equal(batch.uniform, draws.uniform)
    assert {t.dtype for t in (batch.latents, batch.noise, batch.uniform)} == {torch.float32}
    assert batch.sample_numbers.dtype == torch.int64
    assert (batch.condition.class_index is None) == (not conditional) and batch.condition.spatial is None


def test_without_spread_a_latent_is_one_of_two_means(tmp_path: Path) -> None:
    """The image's or its mirror's, in about half of the epochs each."""
    latents = Latents(str(tmp_path), std=0.0)
    stream, seen = latents.stream(), []
    for start in range(0, 40 * TOTAL, 8):
        batch = stream.batch(start)
        shards, rows = stream.order.at(start, 8)
        for row, number in enumerate((batch.sample_numbers - start).tolist()):
            place = int(shards[number]), int(rows[number])
            means = [
                torch.from_numpy(latents.posterior[(*place, flip)][:2].astype(np.float32)) for flip in (False, True)
            ]
            matches = [torch.allclose((mean - SHIFT) * SCALE, batch.latents[row]) for mean in means]
            assert sum(matches) == 1
            seen.append(matches[1])
    assert abs(np.mean(seen) - 0.5) < 4 * 0.5 / np.sqrt(len(seen))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_classes_are_dropped_at_their_rate(latents: Latents, rate: float) -> None:
    stream = latents.stream(
        replace(OPTIONS, conditions=frozenset({"class"}), condition_dropout=rate, global_batch=2000)
    )
    dropped = stream.batch(0).condition.class_index
    assert dropped is not None and dropped.dtype == torch.int64 and dropped.max() <= NUM_CLASSES
    share = (dropped == NUM_CLASSES).double().mean().item()
    assert abs(share - rate) <= 4 * np.sqrt(rate * (1 - rate) / 2000)
    kept = replace(stream.options, condition_dropout=0.0)
    classes = latents.stream(kept).batch(0).condition.class_index
    assert classes is not None and classes.max() < NUM_CLASSES
    assert torch.equal(classes[dropped != NUM_CLASSES], dropped[dropped != NUM_CLASSES])


def test_a_sample_is_drawn_anew_in_every_epoch(latents: Latents) -> None:
    stream = latents.stream(replace(OPTIONS, global_batch=TOTAL))
    epochs = [samples_of(stream.batch(epoch * TOTAL)) for epoch in range(3)]
    assert len({value[0] for epoch in epochs for value in epoch.values()}) == 3 * TOTAL


# --- the same whoever reads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_samples_do_not_depend_on_the_world(latents: Latents, size: int) -> None:
    options = replace(OPTIONS, conditions=frozenset({"class"}), condition_dropout=0.3)
    for start in (0, 5, 2 * TOTAL - 3):
        alone = samples_of(*read(latents.stream(options), start, 6))
        together = [read(latents.stream(options, World(rank, 0, size)), start, 6) for rank in range(size)]
        assert samples_of(*(batch for batches in together for batch in batches)) == alone
        assert sorted(alone) == list(range(start, start + 48))


@SMALL
@given(stop=st.integers(0, 70), batches=st.tuples(st.integers(1, 30), st.integers(1, 30)), window=st.integers(1, 7))
def test_resumed_is_uninterrupted(latents: Latents, stop: int, batches: tuple[int, int], window: int) -> None:
    """At any sample, even with another batch size from there on."""
    options = [
        replace(OPTIONS, global_batch=batch, window=window, conditions=frozenset({"class"})) for batch in batches
    ]
    uninterrupted = samples_of(*read(latents.stream(options[0]), 0, 100 // batches[0] + 2))
    resumed = samples_of(*read(latents.stream(options[1]), stop, 2))
    for number, sample in resumed.items():
        if number in uninterrupted:
            assert uninterrupted[number] == sample
    assert stop in resumed and stop in uninterrupted


def test_every_sample_once_an_epoch(latents: Latents) -> None:
    whole = latents.stream(replace(OPTIONS, global_batch=TOTAL)).batch(TOTAL)
    assert sorted(whole.sample_numbers.tolist()) == list(range(TOTAL, 2 * TOTAL))
    order = latents.stream().order
    places = set(zip(*(part.tolist() for part in order.at(TOTAL, TOTAL)), strict=True))
    assert places == set(latents.classes)


def test_remote_shards_are_read_through_the_cache(tmp_path: Path, latents: Latents) -> None:
    remote = Latents(f"memory://stream-{tmp_path.name}")
    batches = read(remote.stream(cache=tmp_path), 0, 8)
    assert samples_of(*batches) == samples_of(*read(latents.stream(), 0, 8))
    assert len(list(tmp_path.glob("*.tar"))) == sum(size > 0 for size in SIZES)


def test_few_shards_stay_mapped(latents: Latents) -> None:
    stream = latents.stream(replace(OPTIONS, window=1, global_batch=3))
    for start in range(0, 2 * TOTAL, 3):
        stream.batch(start)
        assert len(stream._shards._values) <= 2


# --- the thread --------------------------------------------------------------------------------------------------


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("prefetch", "read-ahead")]


def ended(*threads: threading.Thread) -> bool:
    """Whether they end within a second; those that open shards end by themselves."""
    for thread in threads:
        thread.join(1)
    return not any(thread.is_alive() for thread in threads)


def test_a_closed_generator_ends_its_threads_and_closes_its_shards(latents: Latents) -> None:
    assert ended(*stream_threads())
    stream = latents.stream()
    batches = stream.batches(0, ahead=2)
    assert stream_threads() == [], "it starts with the first batch"
    next(batches)
    threads = stream_threads()
    time.sleep(0.15)  # until it waits for room
    batches.close()
    assert ended(*threads) and stream._shards._values == {}


def test_an_error_of_the_thread_reaches_the_consumer(latents: Latents, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, error = latents.stream(), MemoryError()
    whole = stream._gather

    def gather(position: int, plan: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if position >= 16:
            raise error
        return whole(position, plan)

    monkeypatch.setattr(stream, "_gather", gather)
    batches = stream.batches(0)
    assert [next(batches).sample_numbers.min().item() for _ in range(2)] == [0, 8]
    with pytest.raises(MemoryError) as raised:
        next(batches)
    assert raised.value is error
    assert ended(*stream_threads())


def test_a_missing_or_truncated_shard_is_one_line_naming_it(tmp_path: Path) -> None:
    for number, damage in enumerate(("missing", "truncated")):
        latents = Latents(str(tmp_path / damage))
        path = tmp_path / damage / "000003.tar"
        path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises((StorageError, DataError)[number]) as error:
            read(latents.stream(), 0, 8)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
        assert ended(*stream_threads())


def test_waiting_is_counted(latents: Latents, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = latents.stream()
    whole = stream._gather
    monkeypatch.setattr(stream, "_gather", lambda *place: time.sleep(0.05) or whole(*place))
    read(stream, 0, 3)
    assert 0.1 < stream.wait_seconds < 10


def test_a_data_set_without_latents_is_refused(latents: Latents) -> None:
    for manifest in (
        latents.manifest.model_copy(update={"autoencoder": None}),
        latents.manifest.model_copy(update={"shards": ()}),
    ):
        with pytest.raises(LfmError, match=r"^here: holds no latents to train on$"):
            LatentStream(single_source("here", manifest), OPTIONS, World(), Cache(Path("/nowhere")))


def test_classes_beyond_those_of_the_manifest_are_refused(latents: Latents) -> None:
    """They would be read outside the table of embeddings, which ends a process on a GPU."""
    manifest = latents.manifest.model_copy(update={"classes": latents.manifest.classes[:1]})
    options = replace(OPTIONS, conditions=frozenset({"class"}))
    stream = LatentStream(single_source(latents.folder, manifest), options, World(), Cache(Path("/nowhere")))
    with closing(stream), pytest.raises(DataError, match="classes beyond the 1 of the manifest"):
        stream.batch(0)
