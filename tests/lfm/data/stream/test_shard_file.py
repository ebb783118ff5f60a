"""Selected samples of remote shards are read by ranges where that saves half of the bytes, and are the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm import storage
from lfm.data.columns.selection import Selection
from lfm.data.manifest import Manifest, ShardRecord
from lfm.data.stream import shard_file
from lfm.data.stream.latent_stream import LatentStream
from lfm.data.stream.mixture import LatentSource, Mixture, View, single_source
from lfm.data.stream.mixture_order import Stage
from lfm.data.stream.shard_file import ShardFiles
from lfm.storage.cache import Cache
from lfm.world import World
from tests.support.latents import OPTIONS, Latents, samples_of

SPARSE = Selection(np.array([1, 0, 2, 3, 6, 0, 5], np.uint16), np.array([1, 1, 0, 3, 0, 2]))


@pytest.fixture(autouse=True)
def no_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of the tests are small: fetch none that lie between."""
    monkeypatch.setattr(shard_file, "GAP_BYTES", 0)


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The ranges that are requested: name and size of each."""
    found: list[tuple[str, int]] = []
    read_ranges = storage.read_ranges

    def recorded(path: str, ranges: list[tuple[int, int]]) -> bytes:
        found.extend((path[-10:], end - start) for start, end in ranges)
        return read_ranges(path, ranges)

    monkeypatch.setattr(storage, "read_ranges", recorded)
    yield found


def mixture_of(latents: Latents, selection: Selection | None) -> Mixture:
    mixture = single_source(latents.folder, latents.manifest)
    source = replace(mixture.sources[0], selection=selection)
    return replace(mixture, sources=(source,), stages=(Stage(0, (Fraction(1),)),))


def samples(mixture: Mixture, cache: Path, count: int = 5) -> dict:
    conditions = frozenset({"class"} if mixture.manifest.classes else ())
    stream = LatentStream(mixture, replace(OPTIONS, conditions=conditions), World(), Cache(cache))
    return samples_of(*(stream.batch(number * OPTIONS.global_batch) for number in range(count)))


@pytest.mark.parametrize("classes", [True, False])
def test_a_sparse_subset_of_a_remote_set(tmp_path: Path, requested: list[tuple[str, int]], classes: bool) -> None:
    local = Latents(str(tmp_path / "local"), classes=classes)
    remote = Latents(f"memory://{tmp_path.name}-{classes}", classes=classes)
    expected = samples(mixture_of(local, SPARSE), tmp_path / "none")
    assert requested == [], "local shards are mapped"
    assert samples(mixture_of(remote, SPARSE), tmp_path / "cache") == expected
    stride = remote.manifest.stride
    assert sorted(requested) == [
        ("000000.tar", stride),  # row 1 of 5
        ("000001.tar", stride),
        ("000003.tar", stride),
        ("000003.tar", 2 * stride),  # rows 2 and 3 of 7, by one request
        ("000005.tar", stride),
        ("000005.tar", stride),
    ]
    copies = {path: path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")}
    assert sorted(copies.values()) == [stride + 4, stride + 4, 2 * stride + 4, 3 * stride + 4]
    requested.clear()
    assert samples(mixture_of(remote, SPARSE), tmp_path / "cache") == expected and not requested, (
        "copies are used again"
    )
    damaged = next(iter(copies))
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    assert samples(mixture_of(remote, SPARSE), tmp_path / "cache") == expected
    assert requested, "a copy that was changed is made again"


def test_another_subset_has_other_copies(tmp_path: Path) -> None:
    remote = Latents(f"memory://{tmp_path.name}")
    other = replace(SPARSE, rows=SPARSE.rows.copy())
    other.rows[0] = 2
    files = [ShardFiles(mixture_of(remote, selection).sources[0])[0] for selection in (SPARSE, other, None)]
    assert len({file.copy_name for file in files}) == 3


@given(st.sets(st.integers(0, 99), min_size=1), st.integers(0, 4))
def test_ranges_hold_the_selected_rows_and_save_half(rows: set[int], gap: int) -> None:
    stride = 1024
    record = ShardRecord(name="000000.tar", samples=100, bytes=100 * stride + 1024, sha256="", crc32=0)
    shards = Manifest.model_construct(kind="latents", shards=(record,), stride=stride)
    selection = Selection(np.array(sorted(rows), np.uint16), np.array([len(rows)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_file, "GAP_BYTES", gap * stride)
        file = ShardFiles(LatentSource("s3://bucket/set", shards, selection=selection))[0]
    if file.rows is None:
        assert file.ranges == () and file.num_bytes == record.bytes
        return
    assert rows <= {*file.rows.tolist()} and file.num_bytes <= record.bytes / 2 + 4
    assert [row for start, end in file.ranges for row in range(start // stride, end // stride)] == file.rows.tolist()
    assert all(later[0] - sooner[1] > gap * stride for sooner, later in zip(file.ranges, file.ranges[1:], strict=False))


def test_all_that_the_segments_of_a_history_read(tmp_path: Path) -> None:
    """A run that lost samples, or got new ones, reads what it read before, too."""
    remote = Latents(f"memory://{tmp_path.name}")
    fewer = Selection(SPARSE.rows[1:4], np.array([0, 1, 0, 2]))
    source = mixture_of(remote, SPARSE).sources[0]
    views = (View(4, Selection(np.array([4, 0], np.uint16), np.array([1, 0, 0, 1]))), View(4, fewer))
    file = ShardFiles(replace(source, selection=fewer, views=views))[0]
    assert file.rows is not None and file.rows.tolist() == [4]
    everything = ShardFiles(replace(source, selection=fewer, views=(View(4, None), views[1])))[0]
    assert everything.rows is None


def test_a_shard_that_another_program_packed_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requested: list[tuple[str, int]]
) -> None:
    local, remote = Latents(str(tmp_path / "local")), Latents(f"memory://{tmp_path.name}")
    expected = samples(mixture_of(local, SPARSE), tmp_path / "none")
    monkeypatch.setattr(shard_file, "has_stride", lambda *arguments: False)
    assert samples(mixture_of(remote, SPARSE), tmp_path / "cache") == expected and requested
    sizes = {path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")}
    assert {
        shard.bytes for shard, selected in zip(remote.manifest.shards, SPARSE.counts, strict=True) if selected
    } <= sizes
