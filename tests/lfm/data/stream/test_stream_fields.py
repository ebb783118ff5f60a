"""Conditions come with their latents, mirrored with them; foreign shards are read as ours; bad ones can be left out."""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lfm import storage
from lfm.data.latent_shards import LatentShard, latent_layout, latent_members
from lfm.data.manifest import AutoencoderRecord, ClassRecord, Manifest, ShardRecord
from lfm.data.random_draws import draw
from lfm.data.stream.latent_stream import LatentStream, StreamOptions
from lfm.data.stream.mixture import single_source
from lfm.data.tar import sample_key, write_tar
from lfm.errors import ConfigError, DataError
from lfm.storage.cache import Cache
from lfm.types import LatentBatch, LatentSample
from lfm.world import World

SHAPE, PIXELS, SIZES, SCALE, SHIFT = (2, 4, 4), (8, 8), (5, 3, 4), 0.5, 0.25
LABELS = {0: "sky", 300: "tree"}
EVERYTHING = StreamOptions(seed=1, window=2, global_batch=24, conditions=frozenset({"class", "inpaint", "semantic"}))


def sample(shard: int, row: int) -> LatentSample:
    random = np.random.default_rng([shard, row])

    def half(channels: int) -> np.ndarray:
        return random.standard_normal((channels, *SHAPE[1:])).astype(np.float16)

    return LatentSample(
        sample_key(shard, row), half(4), half(4), class_index=int(random.integers(3)),
        mask=random.integers(0, 2, SHAPE[1:]).astype(np.uint8), masked=half(2), masked_flip=half(2),
        segmentation=random.integers(0, 301, PIXELS).astype(np.uint16),
    )  # fmt: skip


def latents(folder: Path, change: Callable[[Path], None] = lambda path: None) -> LatentStream:
    """A stream of shards with every member; `change` is done to each shard before it is recorded."""
    folder.mkdir(exist_ok=True)
    records = []
    for shard, size in enumerate(SIZES):
        path = folder / f"{shard:06d}.tar"
        write_tar(path, (latent_members(sample(shard, row)) for row in range(size)))
        change(path)
        records.append(ShardRecord(name=path.name, samples=size, **vars(storage.checksums(path))))
    members, stride = latent_layout(sample(0, 0))
    autoencoder = AutoencoderRecord(
        name="x", content_hash="x", downsample_factor=2, latent_channels=2, scale_factor=SCALE, shift=SHIFT
    )
    classes = tuple(ClassRecord(index=index, name=str(index), count=1) for index in range(3))
    manifest = Manifest(kind="latents", image_size=8, classes=classes, labels=LABELS, recipe={}, autoencoder=autoencoder,
                        members=members, stride=stride, shards=tuple(records))  # fmt: skip
    return stream_of(folder, manifest, EVERYTHING)


def stream_of(folder: Path, manifest: Manifest, options: StreamOptions, *skip_shards: str) -> LatentStream:
    return LatentStream(single_source(str(folder), manifest, skip_shards), options, World(), Cache(Path("/nowhere")))


def equal(one: LatentBatch, other: LatentBatch) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in (
            (one.latents, other.latents),
            (one.condition.class_index, other.condition.class_index),
            (one.condition.spatial, other.condition.spatial),
            (one.condition.segmentation, other.condition.segmentation),
        )
        if a is not None and b is not None
    )


def test_every_condition_is_the_samples_own_and_mirrored_with_it(tmp_path: Path) -> None:
    stream = latents(tmp_path)
    batch = stream.batch(0)
    flips = draw(1, batch.sample_numbers).flip.tolist()
    assert len(set(flips)) == 2
    spatial, segmentation, classes = batch.condition.spatial, batch.condition.segmentation, batch.condition.class_index
    assert spatial is not None and segmentation is not None and classes is not None
    assert (spatial.dtype, segmentation.dtype) == (torch.float32, torch.int64)
    assert spatial.shape == (24, 3, 4, 4) and segmentation.shape == (24, *PIXELS)
    shards, rows = stream.order.at(0, 24)
    for place, (number, flip) in enumerate(zip(batch.sample_numbers.tolist(), flips, strict=True)):
        stored = sample(int(shards[number]), int(rows[number]))
        mask, labels = np.asarray(stored.mask), np.asarray(stored.segmentation).astype(np.int64)
        masked = np.asarray(stored.masked_flip if flip else stored.masked)
        expected = (torch.from_numpy(masked.astype(np.float32)) - SHIFT) * SCALE
        assert torch.equal(spatial[place, :2], expected)
        assert np.array_equal(spatial[place, 2], mask[:, ::-1] if flip else mask)
        assert np.array_equal(segmentation[place], labels[:, ::-1] if flip else labels)
        assert classes[place] == stored.class_index


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_all_of_a_condition_is_dropped_at_once(tmp_path: Path, rate: float) -> None:
    whole = latents(tmp_path)
    stream = stream_of(tmp_path, whole.manifest, replace(EVERYTHING, condition_dropout=rate, global_batch=600))
    condition = stream.batch(0).condition
    assert condition.class_index is not None and condition.spatial is not None and condition.segmentation is not None
    dropped = condition.class_index == 3
    assert abs(dropped.double().mean().item() - rate) <= 4 * np.sqrt(rate * (1 - rate) / 600)
    assert torch.equal(dropped, (condition.segmentation == 301).all((1, 2)))
    assert not (condition.segmentation[~dropped] == 301).any()
    null = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 4, 4)
    assert all(torch.equal(spatial, null) for spatial in condition.spatial[dropped])


@pytest.mark.parametrize("condition", ["class", "inpaint", "semantic"])
def test_a_condition_that_the_latents_lack_is_one_line(tmp_path: Path, condition: str) -> None:
    manifest = latents(tmp_path).manifest
    bare = manifest.model_copy(update={"members": tuple(m for m in manifest.members if m.suffix == "latent.npy")})
    with pytest.raises(DataError, match=r"the latents hold no .*; encode shards that do") as error:
        stream_of(tmp_path, bare, replace(EVERYTHING, conditions=frozenset({condition})))
    assert "\n" not in str(error.value)


# --- shards that others made --------------------------------------------------------------------------------------


def rewritten(path: Path, *, reverse: bool, longer: bool) -> None:
    """The same samples as another program packs them: members in another order, classes in any length, npy as numpy's."""
    with tarfile.open(path) as archive:
        found = [(entry.name, archive.extractfile(entry).read()) for entry in archive]  # type: ignore[union-attr]
    samples: dict[str, list[tuple[str, bytes]]] = {}
    for name, content in found:
        samples.setdefault(name.partition(".")[0], []).append((name, content))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number, members in enumerate(samples.values()):
            for name, content in members[::-1] if reverse else members:
                if name.endswith(".npy"):
                    buffer = io.BytesIO()
                    np.save(buffer, np.load(io.BytesIO(content)))
                    content = buffer.getvalue()
                elif longer:
                    content = str(int(content)).encode()
                if longer and number % 2:  # beside it, something that nobody asked for
                    archive.addfile(tarfile.TarInfo(f"made/{name}.txt"), io.BytesIO())
                entry = tarfile.TarInfo(f"made/{name}")
                entry.size, entry.mtime = len(content), 1.5  # type: ignore[assignment]  # a header of its own
                archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(("reverse", "longer"), [(True, False), (False, True), (True, True)])
def test_a_foreign_shard_is_read_as_ours_and_said_to_be_slower(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reverse: bool, longer: bool
) -> None:
    ours = latents(tmp_path / "ours")
    stream = latents(tmp_path / "theirs", lambda path: rewritten(path, reverse=reverse, longer=longer))
    manifest = stream.manifest.model_copy(update={"stride": 0})
    theirs = stream_of(tmp_path / "theirs", manifest, EVERYTHING)
    with caplog.at_level(logging.WARNING):
        for start in (0, 24, 5):
            assert equal(theirs.batch(start), ours.batch(start))
    said = [record.message for record in caplog.records]
    assert len(said) == len(SIZES) and all("slower" in line for line in said), "an index is made once"


def test_a_shard_whose_members_lie_elsewhere_is_noticed(tmp_path: Path) -> None:
    """Though the manifest has a stride: one that was packed again by hand."""
    ours = latents(tmp_path / "ours")
    theirs = latents(tmp_path / "theirs", lambda path: rewritten(path, reverse=True, longer=False))
    assert equal(theirs.batch(0), ours.batch(0))


def test_what_is_not_as_the_manifest_says_is_one_line(tmp_path: Path) -> None:
    manifest = latents(tmp_path).manifest
    other = tuple(
        m.model_copy(update={"shape": (9, 9, 9)}) if m.suffix == "latent.npy" else m for m in manifest.members
    )
    (tmp_path / "text.tar").write_bytes(b"no tar" * 200)
    for path, members in ((tmp_path / "000000.tar", other), (tmp_path / "text.tar", manifest.members)):
        with pytest.raises(DataError) as error:
            LatentShard(path, 5, members, 0)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    with pytest.raises(DataError, match="does not hold 6 samples"):
        LatentShard(tmp_path / "000000.tar", 6, manifest.members, 0)


# --- bad shards and small caches ----------------------------------------------------------------------------------


def test_a_shard_that_is_left_out_moves_nothing_before_it(tmp_path: Path) -> None:
    """A run that stopped where a bad shard begins goes on with the sequence that it had, without that shard."""
    stream = latents(tmp_path)
    last = stream.order.upcoming_shards(0, 3)[2]
    bad = stream.manifest.shards[last].name
    without = stream_of(tmp_path, stream.manifest, EVERYTHING, bad)
    before = sum(SIZES) - SIZES[last]
    for mine, theirs in zip(without.order.at(0, before), stream.order.at(0, before), strict=True):
        assert np.array_equal(mine, theirs)
    (tmp_path / bad).unlink()
    for epoch in range(3):
        shards, rows = without.order.at(epoch * before, before)
        assert len(set(zip(shards.tolist(), rows.tolist(), strict=True))) == before and last not in shards
    without.batch(0)
    with pytest.raises(DataError, match=r"no shard 000009\.tar to leave out"):
        stream_of(tmp_path, stream.manifest, EVERYTHING, "000009.tar")


def test_a_cache_that_holds_no_two_windows_is_refused(tmp_path: Path) -> None:
    manifest = latents(tmp_path).manifest
    needed = sum(shard.bytes for shard in manifest.shards)
    options = replace(EVERYTHING, window=3)
    LatentStream(single_source(f"file://{tmp_path}", manifest), options, World(), Cache(tmp_path, limit=needed))
    with pytest.raises(ConfigError, match=rf"take {needed:,} bytes"):
        LatentStream(single_source(f"file://{tmp_path}", manifest), options, World(), Cache(tmp_path, limit=needed - 1))


def test_the_streams_of_a_process_count_together(tmp_path: Path) -> None:
    """The limit must hold the windows of all; a stream counts as long as it is in use, whether or not it was read."""
    manifest = latents(tmp_path).manifest
    needed = sum(shard.bytes for shard in manifest.shards)
    options, cache = replace(EVERYTHING, window=3), Cache(tmp_path / "cache", limit=needed)
    for _ in range(2):
        stream = LatentStream(single_source(f"file://{tmp_path}", manifest), options, World(), cache)
        stream.batch(0)
        with pytest.raises(ConfigError, match=rf"take {2 * needed:,} bytes"):
            LatentStream(single_source(f"file://{tmp_path}", manifest), options, World(), cache)
        del stream
