"""The stream from a real object store, through its faults: nothing lost, nothing twice, and no more asked for than needed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lfm import storage
from lfm.data.columns.selection import Selection
from lfm.data.manifest import publish
from lfm.data.stream import shard_file
from lfm.data.stream.latent_stream import LatentStream
from lfm.data.stream.mixture import single_source
from lfm.data.stream.sample_order import Order
from lfm.errors import DataError
from lfm.storage.cache import Cache
from lfm.training.run_folder import RunFolder
from lfm.world import World
from tests.support import latents as known_latents
from tests.support.commands import SmallSet
from tests.support.fault_proxy import Fault, FaultProxy, is_download
from tests.support.latents import OPTIONS, TOTAL, Latents, samples_of
from tests.support.object_store import BUCKET, ObjectStore, requires_object_store
from tests.support.training_runs import assert_same_weights, losses, train

pytestmark = [requires_object_store, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
FAULTS = ("cut", "reset", "drop", "status", "flip", "lost", "slow")


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    """A proxy in front of an object store, whose clients go through the proxy."""
    store = ObjectStore(tmp_path_factory.mktemp("store") / "weed")
    with FaultProxy(store.port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in (store.environment() | {"AWS_ENDPOINT_URL": proxy.url}).items():
            patch.setenv(name, value)
        yield proxy
    store.close()


@pytest.fixture(scope="module")
def remote(proxy: FaultProxy) -> Latents:
    return Latents(f"s3://{BUCKET}/latents")


@pytest.fixture(autouse=True)
def calm(proxy: FaultProxy) -> None:
    proxy.plan, proxy.always = [], None
    proxy.requests.clear()


def read(latents: Latents, cache: Cache, start: int, count: int, *skip_shards: str) -> dict:
    stream = LatentStream(single_source(latents.folder, latents.manifest, skip_shards), OPTIONS, World(), cache)
    with closing(stream.batches(start)) as batches:
        return samples_of(*islice(batches, count))


def held(folder: Path) -> int:
    """Bytes of all that is in a cache's folder while nobody makes room; a file that just changes its name counts once."""
    found = {}
    with (folder / "lock-room").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                found[entry.inode()] = entry.stat().st_size
    return sum(found.values())


def maps(folder: Path) -> int:
    """How many shards below a folder this process has mapped, those that have been evicted since among them."""
    return len({line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line})


def test_each_fault_is_overcome_and_the_samples_are_the_same(
    proxy: FaultProxy, remote: Latents, tmp_path: Path
) -> None:
    local = Latents(str(tmp_path / "local"))
    expected = read(local, Cache(tmp_path / "none"), 0, 8)
    for kind in FAULTS:
        at = {"status": 503, "slow": 200_000}.get(kind, 700)
        proxy.plan = [Fault(kind, at), None] * 2  # type: ignore[arg-type]
        cache = Cache(tmp_path / kind)
        assert read(remote, cache, 0, 8) == expected, kind
        assert proxy.plan == [] and cache.counts["downloads"] == 5
        assert kind != "flip" or cache.counts["retries"] == 2


def test_ranges_overcome_each_fault_that_they_can_see(
    proxy: FaultProxy, remote: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed bit among the values is not seen: the checksum is of the whole shard."""
    monkeypatch.setattr(shard_file, "GAP_BYTES", 0)
    selection = Selection(np.array([1, 0, 2, 5], np.uint16), np.array([1, 1, 0, 2, 0, 0]))

    def subset(folder: str, cache: Cache) -> dict:
        whole = single_source(folder, remote.manifest)
        mixture = replace(whole, sources=(replace(whole.sources[0], selection=selection),))
        stream = LatentStream(mixture, replace(OPTIONS, global_batch=4), World(), cache)
        return samples_of(*(stream.batch(4 * number) for number in range(2)))

    local = Latents(str(tmp_path / "local"))
    expected = subset(local.folder, Cache(tmp_path / "none"))
    for kind in FAULTS:
        if kind != "flip":
            at = {"status": 503, "slow": 200_000}.get(kind, 700)
            proxy.plan = [Fault(kind, at), None] * 2  # type: ignore[arg-type]
            cache = Cache(tmp_path / kind)
            assert subset(remote.folder, cache) == expected, kind
            assert proxy.plan == [] and cache.counts["downloads"] == 3


def test_a_full_cache_asks_for_nothing(proxy: FaultProxy, remote: Latents, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    read(remote, cache, 0, 8)
    assert cache.counts["downloads"] == 5
    proxy.requests.clear()
    again = Cache(tmp_path)
    read(remote, again, 0, 20)
    assert proxy.requests == [] and again.counts["cache_hits"] >= 5 and again.counts["downloads"] == 0


def test_under_a_limit_each_shard_is_fetched_about_once_an_epoch(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 shards of equal size, of which a cache may hold 4: two windows of two."""
    monkeypatch.setattr(known_latents, "SIZES", (6,) * 20)
    latents, epochs = Latents(f"s3://{BUCKET}/many"), 3
    size = latents.manifest.shards[0].bytes
    cache = Cache(tmp_path, limit=4 * size)
    stream = LatentStream(
        single_source(latents.folder, latents.manifest), replace(OPTIONS, global_batch=4), World(), cache
    )
    proxy.requests.clear()
    most, mapped = 0, 0
    with closing(stream.batches(0)) as batches:
        for _ in islice(batches, epochs * 120 // 4):
            most, mapped = max(most, held(tmp_path)), max(mapped, maps(tmp_path))
    fetched = Counter(proxy.downloads)
    assert len(fetched) == 20 and sum(fetched.values()) <= 1.2 * 20 * (epochs + 0.3), (
        "ahead, the next one's first windows"
    )
    assert most <= 4 * size and mapped <= 4 and maps(tmp_path) == 0, "memory is what two windows take, and then none"


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_shard_is_named_and_can_be_left_out(proxy: FaultProxy, tmp_path: Path, damage: str) -> None:
    latents = Latents(f"s3://{BUCKET}/{damage}")
    path = f"{latents.folder}/000003.tar"
    content = storage.read_bytes(path)
    storage.write_bytes(path, content[:-512] if damage == "truncated" else b"?" + content[1:])
    with pytest.raises(DataError) as error:
        read(latents, Cache(tmp_path), 0, 8)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert "skip_shards" in str(error.value)
    assert len(read(latents, Cache(tmp_path), 0, 8, "000003.tar")) == 64


READER = """
import json, sys
from contextlib import closing
from itertools import islice
from pathlib import Path
from lfm.storage.cache import Cache
from lfm.data.manifest import load
from lfm.data.stream.latent_stream import LatentStream, StreamOptions
from lfm.data.stream.mixture import single_source
from lfm.world import World
folder, cache, rank, size = sys.argv[1:]
options = StreamOptions(seed=3, window=2, global_batch=8)
cache = Cache(Path(cache))
stream = LatentStream(single_source(folder, load(folder, "latents")), options, World(int(rank), 0, int(size)), cache)
with closing(stream.batches(0)) as batches:
    for batch in islice(batches, 12):
        print(json.dumps([batch.sample_numbers.tolist(), batch.latents.sum((1, 2, 3)).tolist()]), flush=True)
"""


def reader(latents: Latents, cache: Path, rank: int, size: int) -> subprocess.Popen[str]:
    arguments = [latents.folder, str(cache), str(rank), str(size)]
    return subprocess.Popen(
        [sys.executable, "-c", READER, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ
    )


def printed(*processes: subprocess.Popen[str]) -> dict[int, float]:
    found: dict[int, float] = {}
    for process in processes:
        for line in process.communicate()[0].splitlines():
            for number, value in zip(*json.loads(line), strict=True):
                assert number not in found
                found[number] = value
        assert process.returncode == 0
    return found


def test_two_ranks_share_a_cache_through_faults_and_a_kill(proxy: FaultProxy, remote: Latents, tmp_path: Path) -> None:
    """Each shard arrives once for both; one that is killed while it fetches leaves nothing that a second run keeps."""
    publish(remote.folder, remote.manifest)
    proxy.always = Fault("slow", 3000)
    with reader(remote, tmp_path / "cache", 0, 1) as killed:
        until = time.monotonic() + 30
        while not list((tmp_path / "cache").glob(".writing-*")) and time.monotonic() < until:
            time.sleep(0.05)
        killed.kill()
    assert list((tmp_path / "cache").glob(".writing-*"))
    proxy.always = None
    proxy.requests.clear()
    proxy.plan = [None, Fault("cut", 700), Fault("reset", 0), None, Fault("status", 503), Fault("flip", 600)]
    with reader(remote, tmp_path / "cache", 0, 2) as first, reader(remote, tmp_path / "cache", 1, 2) as second:
        together = printed(first, second)
    assert not list((tmp_path / "cache").glob(".writing-*"))
    shards = Counter(path for path in proxy.downloads if path.endswith(".tar"))
    assert sum(shards.values()) <= 5 + 4, "five shards, and four faults"
    proxy.plan = []
    with reader(remote, tmp_path / "alone", 0, 1) as alone:
        assert printed(alone) == together
    assert sorted(together) == list(range(96)) and TOTAL < 96


def test_training_on_two_ranks_through_faults_ends_as_undisturbed(
    proxy: FaultProxy, small_set: SmallSet, experiment: Path, tmp_path: Path
) -> None:
    """Nothing lost and nothing twice: the losses of all steps and the weights are the same, bit for bit."""
    import fsspec

    fsspec.filesystem("s3").put(str(small_set.latents), f"{BUCKET}/small", recursive=True)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    assert train(experiment, f"run={undisturbed}", ranks=2).returncode == 0
    proxy.requests.clear()
    faults = (("cut", 900), ("reset", 5000), ("status", 503), ("flip", 3000), ("drop", 0), ("stall", 300))
    broken = [Fault(kind, at) for kind, at in faults]  # type: ignore[arg-type]
    proxy.matches, proxy.plan = lambda method, path: method == "GET" and path.endswith(".tar"), list(broken)
    remote = (f"data.shards=s3://{BUCKET}/small", f"data.cache={tmp_path / 'cache'}")
    result = train(experiment, f"run={disturbed}", *remote, ranks=2)
    assert result.returncode == 0, result.stderr
    assert proxy.plan == []
    assert losses(disturbed) == losses(undisturbed)
    assert_same_weights(disturbed, undisturbed)
    last = json.loads((disturbed / "log.jsonl").read_text().splitlines()[-1])
    assert last["downloads"] + last["cache_hits"] >= 3 and 0 <= last["data_wait"] <= 1 and last["retries"] >= 0
    proxy.matches = is_download


def test_a_shard_that_is_left_out_is_told_and_stands_in_the_checkpoint(
    small_set: SmallSet, experiment: Path, tmp_path: Path
) -> None:
    """The run stops at a truncated shard and names it; told to leave it out, it goes on from its checkpoint."""
    latents = tmp_path / "latents"
    shutil.copytree(small_set.latents, latents)
    sequence = Order([16, 16, 8], 0, 1).upcoming_shards(0, 3)
    bad = latents / f"{sequence[2]:06d}.tar"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-1])
    options = (f"data.shards={latents}", "data.window=1", "train.checkpoint_every=1")
    stopped = train(experiment, *options, ranks=2)
    assert stopped.returncode == 2 and str(bad) in stopped.stderr and "data.skip_shards" in stopped.stderr
    result = train(experiment, *options, f"data.skip_shards=[{bad.name}]", ranks=2)
    assert result.returncode == 0, result.stderr
    assert "1 shards left out" in result.stdout and "from samples-" in result.stdout
    run = RunFolder(str(tmp_path / "run"))
    state = run.read_state(run.newest(), verify=True)  # type: ignore[arg-type]
    assert state.config["data"]["skip_shards"] == [bad.name]
