"""The stages on a real object store: the same bytes as on the local disk, and nothing half-written."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.dropped import load_drops
from lfm.data.manifest import ShardRecord
from lfm.data.stream.latent_stream import LatentStream, StreamOptions
from lfm.data.stream.mixture import single_source
from lfm.storage.cache import Cache
from lfm.world import World
from pipelines.data import encode
from pipelines.data.encode import EncodeConfig
from pipelines.data.shard_claims import WORK
from pipelines.data.shard_set import write_shard
from tests.support.commands import ALONE, SmallSet, assert_one_line, lfm
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.images import random_images
from tests.support.object_store import BUCKET, ObjectStore, requires_object_store

pytestmark = [requires_object_store, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    server = ObjectStore(tmp_path_factory.mktemp("store") / "weed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server
    server.close()


def content(folder: str) -> dict[str, bytes]:
    """Every shard of a folder and its bytes."""
    return {
        name: storage.read_bytes(storage.join(folder, name)) for name in storage.find(folder) if name.endswith(".tar")
    }


def test_shards_and_latents_have_the_same_bytes_as_on_the_local_disk(
    store: ObjectStore, small_set: SmallSet, tmp_path: Path
) -> None:
    raw, latents = f"s3://{BUCKET}/raw", f"s3://{BUCKET}/latents"
    shard = ("shard", small_set.images, raw, "--image-size", 16, "--samples-per-shard", 16)
    for _ in range(2):  # the second time there is nothing to do
        assert lfm(*shard).exit_code == 0
    assert content(raw) == content(str(small_set.raw))
    cache = tmp_path / "cache"
    encode = ("encode", raw, latents, "--autoencoder", small_set.autoencoder, "--flips", "--cache", cache)
    result = lfm(*encode)
    assert result.exit_code == 0, result.stderr
    assert content(latents) == content(str(small_set.latents))
    local, remote = (manifests.load(folder, "latents") for folder in (str(small_set.latents), latents))
    assert local.digest == remote.digest

    options = StreamOptions(global_batch=8, conditions=frozenset({"class"}), window=2)
    streams = (
        LatentStream(single_source(str(small_set.latents), local), options, ALONE, Cache(cache)),
        LatentStream(single_source(latents, remote), options, ALONE, Cache(cache)),
    )
    for samples_seen in (0, 40, 72):
        one, other = (stream.batch(samples_seen) for stream in streams)
        np.testing.assert_array_equal(one.latents, other.latents)


def test_a_file_that_another_process_writes_or_removes_is_noticed(store: ObjectStore) -> None:
    """Whatever was listed before: ranks see each other's shards by their names alone."""
    folder = f"s3://{BUCKET}/noticed"
    storage.write_bytes(f"{folder}/a", b"1")
    assert storage.sizes(folder) == {"a": 1}
    another = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    another.pipe(f"{BUCKET}/noticed/b", b"2")
    another.rm(f"{BUCKET}/noticed/a")
    assert storage.exists(f"{folder}/b") and not storage.exists(f"{folder}/a")


def test_a_part_of_a_file_is_read(store: ObjectStore) -> None:
    path = f"s3://{BUCKET}/part"
    storage.write_bytes(path, b"0123456789")
    assert [storage.read_range(path, *part) for part in ((0, 3), (3, 4), (8, 9))] == [b"012", b"3456", b"89"]


def test_two_ranks_write_every_shard_once(
    store: ObjectStore, small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claims need neither file locks nor exclusive creation, only listings that include every completed write."""
    raw, latents, written = tmp_path / "raw", f"s3://{BUCKET}/shared", []
    assert lfm("shard", small_set.images, raw, "--image-size", 16, "--samples-per-shard", 5).exit_code == 0

    def counted(dest: str, name: str, *arguments: Any) -> ShardRecord:
        written.append(name)
        return write_shard(dest, name, *arguments)

    monkeypatch.setattr(encode, "write_shard", counted)
    config = EncodeConfig(str(raw), latents, str(small_set.autoencoder))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(encode.run, [config] * 2, [World(rank, rank, 2) for rank in range(2)]))
    assert sorted(written) == [f"{number:06d}.tar" for number in range(8)]
    assert results[0].manifest == results[1].manifest is not None
    assert not any(storage.sizes(storage.join(latents, WORK)))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["broken answers", "a restart"])
def test_an_unreliable_store_costs_time_and_not_a_byte(
    store: ObjectStore, small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    raw, latents = (f"s3://{BUCKET}/{fault[-7:]}/{name}" for name in ("raw", "latents"))
    assert lfm("shard", small_set.images, raw, "--image-size", 16, "--samples-per-shard", 16).exit_code == 0
    kinds = [
        Fault("cut", 700),
        Fault("status", 503),
        Fault("reset", 90),
        Fault("drop"),
        Fault("lost"),
        Fault("flip", 99),
    ]
    broken = lambda method, path: fault != "a restart"  # noqa: E731
    with FaultProxy(store.port, broken, plan=[what for kind in 6 * kinds for what in (kind, None)]) as proxy:
        proxy.plan.insert(9, Fault("stall", 300))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()

        def restart() -> None:
            while len(proxy.requests) < 8:
                time.sleep(0.001)
            store.kill()
            time.sleep(1)
            store.start()

        thread = threading.Thread(target=restart)
        thread.start() if fault == "a restart" else None
        encode = ("encode", raw, latents, "--autoencoder", small_set.autoencoder, "--flips")
        result = lfm(*encode, "--cache", tmp_path / "cache")
        s3fs.S3FileSystem.clear_instance_cache()
        thread.join() if fault == "a restart" else None
    assert result.exit_code == 0, result.stderr
    if fault != "a restart":
        assert {request.fault.kind for request in proxy.requests if request.fault} >= {kind.kind for kind in kinds}
    monkeypatch.undo()
    assert content(latents) == content(str(small_set.latents))


def test_a_source_in_the_store_shards_as_one_on_the_disk(
    store: ObjectStore, small_set: SmallSet, tmp_path: Path
) -> None:
    import fsspec

    fsspec.filesystem("s3").put(str(small_set.images), f"{BUCKET}/images", recursive=True)
    result = lfm("shard", f"s3://{BUCKET}/images", tmp_path / "raw", "--image-size", 16, "--samples-per-shard", 16)
    assert result.exit_code == 0, result.stderr
    assert content(str(tmp_path / "raw")) == content(str(small_set.raw))


def test_a_refused_key_is_one_line(store: ObjectStore, small_set: SmallSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert_one_line(lfm("shard", small_set.images, f"s3://{BUCKET}/new", "--image-size", 16), f"s3://{BUCKET}/new")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_set_in_the_store_grows_as_one_on_the_disk(store: ObjectStore, small_set: SmallSet, tmp_path: Path) -> None:
    """Raw shards, latents and the list of dropped samples; the shards before are not written again."""
    images = random_images(tmp_path / "images", 24)
    aside = [path.rename(tmp_path / path.name) for path in sorted(images.iterdir())[10:]]
    places = [(str(tmp_path / kind), f"s3://{BUCKET}/growing/{kind}") for kind in ("raw", "latents")]

    def make() -> None:
        for raw, latents in zip(*places, strict=True):
            for command in (
                ("shard", images, raw, "--image-size", 16, "--samples-per-shard", 5),
                ("encode", raw, latents, "--autoencoder", small_set.autoencoder),
            ):
                result = lfm(*command)
                assert result.exit_code == 0, result.stderr

    make()
    for path in aside:
        path.rename(images / path.name)
    make()
    for local, remote in places:
        assert content(local) == content(remote)
        one, other = (manifests.load(folder) for folder in (local, remote))
        assert one == other and [version.num_shards for version in one.versions] == [2] and len(one.shards) == 5
        assert lfm("data", "drop", remote, "000004000001", "000000000002").exit_code == 0
        assert [(each.shard, each.row) for each in load_drops(remote)[0].samples] == [
            ("000004.tar", 1),
            ("000000.tar", 2),
        ]
