"""Several processes encode one data set: no shard is made twice while its owner lives, and a dead owner is replaced."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lfm.data import manifest as manifests
from lfm.errors import DataError
from lfm.world import World
from pipelines.data import encode, shard_claims
from pipelines.data.encode import EncodeConfig
from pipelines.data.shard_claims import WORK, ShardClaims
from pipelines.data.shard_set import write_shard
from tests.support.commands import SmallSet, lfm
from tests.support.images import folder_contents

SHARD = "000003.tar"


def claim_of(folder: Path, machine: str, pid: int) -> Path:
    """Write the claim of another process."""
    path = folder / WORK / f"{SHARD}-another"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "pid": pid, "renewals": 0}))
    return path


def test_of_many_processes_at_most_one_has_a_shard(tmp_path: Path) -> None:
    holders, most, wins = Counter[str](), Counter[str](), Counter[str]()
    lock, shards = threading.Lock(), [f"{number:06d}.tar" for number in range(3)]

    def work(_: int) -> None:
        with ShardClaims(str(tmp_path)) as claims:
            for shard in 20 * shards:
                if claims.claim(shard):
                    with lock:
                        holders[shard] += 1
                        most[shard] = max(most[shard], holders[shard])
                        wins[shard] += 1
                    time.sleep(0.002)
                    with lock:
                        holders[shard] -= 1
                    claims.withdraw(shard)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert all(most[shard] == 1 for shard in shards), most
    assert all(wins[shard] > 10 for shard in shards), wins
    assert list((tmp_path / WORK).iterdir()) == []


def test_a_shard_is_claimed_once_and_free_after_the_withdrawal(tmp_path: Path) -> None:
    with ShardClaims(str(tmp_path)) as one, ShardClaims(str(tmp_path)) as other:
        assert one.claim(SHARD)
        assert not other.claim(SHARD)
        assert other.claim("000004.tar")
        one.withdraw(SHARD)
        assert other.claim(SHARD)
    assert not other.claim("000005.tar"), "closed"


def test_the_claim_of_an_ended_process_of_this_machine_has_expired(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    assert process.pid is not None
    path = claim_of(tmp_path, shard_claims._machine(), process.pid)
    process.join()
    with ShardClaims(str(tmp_path)) as claims:
        assert claims.claim(SHARD)
        assert not path.exists()
        claim_of(tmp_path, shard_claims._machine(), os.getpid())
        claims.withdraw(SHARD)
        assert not claims.claim(SHARD), "its process lives"


def test_the_claim_of_another_machine_expires_after_the_lease(tmp_path: Path) -> None:
    claim_of(tmp_path, "another", 1)
    with ShardClaims(str(tmp_path), lease_seconds=0.5) as claims:
        assert not claims.claim(SHARD)
        time.sleep(0.7)
        assert claims.claim(SHARD)


def test_a_claim_is_renewed_while_its_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = iter(range(10**6))
    monkeypatch.setattr(shard_claims, "_machine", lambda: str(next(machines)))  # so that the lease alone decides
    with ShardClaims(str(tmp_path), lease_seconds=1) as owner, ShardClaims(str(tmp_path), lease_seconds=1) as other:
        assert owner.claim(SHARD)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            assert not other.claim(SHARD)
            time.sleep(0.05)


def rank(config: EncodeConfig, number: int, size: int) -> encode.EncodeResult:
    return encode.run(config, World(number, number, size))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The thread and the shard of every call that writes a shard."""
    calls: list[tuple[str, str]] = []

    def counted(dest: str, name: str, *arguments: object) -> manifests.ShardRecord:
        calls.append((threading.current_thread().name, name))
        return write_shard(dest, name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "write_shard", counted)
    return calls


@pytest.fixture(scope="module")
def four_shards(small_set: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("four") / "raw"
    assert lfm("shard", small_set.images, raw, "--image-size", 16, "--samples-per-shard", 10).exit_code == 0
    return raw


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_write_every_shard_once(
    small_set: SmallSet, four_shards: Path, tmp_path: Path, written: list[tuple[str, str]], size: int
) -> None:
    config = EncodeConfig(str(four_shards), str(tmp_path / "latents"), str(small_set.autoencoder), batch_size=3)
    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank, [config] * size, range(size), [size] * size))
    assert sorted(name for _, name in written) == [f"{number:06d}.tar" for number in range(4)]
    assert all(result.manifest == results[0].manifest is not None for result in results)
    assert not any(name.startswith(WORK) for name in folder_contents(tmp_path / "latents"))


def test_a_rank_waits_for_a_living_owner_and_takes_over_what_it_gives_up(
    small_set: SmallSet, four_shards: Path, tmp_path: Path, written: list[tuple[str, str]]
) -> None:
    dest = tmp_path / "latents"
    config = EncodeConfig(str(four_shards), str(dest), str(small_set.autoencoder))
    with ShardClaims(str(dest)) as owner, ThreadPoolExecutor(1) as pool:
        shutil.rmtree(dest, ignore_errors=True)
        future = pool.submit(rank, config, 0, 1)
        while not (dest / manifests.RECIPE).exists():
            time.sleep(0.01)
        while not owner.claim(SHARD):
            time.sleep(0.001)
        while len(written) < 3:
            time.sleep(0.01)
        time.sleep(1.5)
        assert SHARD not in {name for _, name in written} and not future.done()
        owner.withdraw(SHARD)
        assert future.result(60).manifest is not None
    assert sorted(name for _, name in written) == [f"{number:06d}.tar" for number in range(4)]


def test_no_rank_takes_old_shards_for_done_while_rank_0_overwrites(
    small_set: SmallSet, four_shards: Path, tmp_path: Path, written: list[tuple[str, str]]
) -> None:
    """With an equal recipe nothing in the folder tells old shards from new ones; and rank 1 may start first."""
    dest = tmp_path / "latents"
    config = EncodeConfig(str(four_shards), str(dest), str(small_set.autoencoder), overwrite=True)
    rank(config, 0, 1)
    whole = folder_contents(dest)
    (dest / "000002.tar").write_bytes(b"damaged")
    written.clear()
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(rank, config, 1, 2)
        time.sleep(2)
        assert not second.done() and not written
        first = pool.submit(rank, config, 0, 2)
        assert first.result(60).manifest == second.result(60).manifest is not None
    assert sorted(name for _, name in written) == [f"{number:06d}.tar" for number in range(4)]
    assert folder_contents(dest) == whole


def test_a_rank_that_starts_late_does_not_wait_to_overwrite(tmp_path: Path) -> None:
    shard_claims.announce_restart(str(tmp_path), World(0, 0, 3))
    for number in (2, 1):
        shard_claims.wait_for_restart(str(tmp_path), World(number, 0, 3), seconds=0)
    with pytest.raises(DataError, match="rank 0 did not remove the old shards"):
        shard_claims.wait_for_restart(str(tmp_path), World(1, 0, 3), seconds=0)
