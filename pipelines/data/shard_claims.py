"""Claims of shards: processes that share out a data set without talking to each other, so that no shard is made twice.

    DEST/.work/000003.tar-PROCESS    a claim: this process makes shard 000003.tar
    DEST/.work/restarted-RANK        rank 0 has removed the old shards (`--overwrite`): RANK may begin

A process writes its claim, lists the claims of the shard, and withdraws when another one is live. Of two processes that
claim at the same time, at least one sees the other's claim. This needs no file locks and no exclusive creation, only a
store whose listings include every completed write, as those of local disks, NFS and S3 do.

A claim is renewed while its process lives. Any process may take a shard whose claim has expired: not renewed for
`LEASE_SECONDS` by the clock of the observer (the clocks of two machines may differ), or at once if the observer runs on
the same machine and sees that the process has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from lfm import storage
from lfm.errors import DataError, StorageError
from lfm.world import World

WORK = ".work"  # hidden, so that listings of the data set leave it out
LEASE_SECONDS = 30.0
RENEWALS_PER_LEASE = 4
RESTART_SECONDS = 600.0  # rank 0 may have to remove thousands of objects


class ShardClaims:
    """This process's claims of the shards of one data set; a context manager that withdraws all of them at its end.

    Args:
        dest: folder of the data set, a path or URL.
        lease_seconds: time after which a claim that is not renewed has expired; the same for all processes.
    """

    def __init__(self, dest: str, lease_seconds: float = LEASE_SECONDS) -> None:
        self.folder, self.lease_seconds = storage.join(dest, WORK), lease_seconds
        self.process = uuid.uuid4().hex
        self._claimed: dict[str, str] = {}  # path of the claim by shard
        self._lock = threading.Lock()  # of `_claimed`: the renewing thread reads it
        self._observed: dict[str, tuple[bytes, float]] = {}  # content of others' claims, and when it was first seen
        self._stopped = threading.Event()
        self._renewals = 0

    def __enter__(self) -> ShardClaims:
        threading.Thread(target=self._renew_regularly, name="renew claims", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        for shard in list(self._claimed):
            self.withdraw(shard)

    def claim(self, shard: str) -> bool:
        """Claim a shard by its file name; return False if another process has a live claim of it."""
        if self._stopped.is_set() or self._is_claimed_by_another(shard):
            return False
        path = storage.join(self.folder, f"{shard}-{self.process}")
        with self._lock:
            self._claimed[shard] = path
        self._write(path)
        if self._stopped.is_set() or self._is_claimed_by_another(shard):
            self.withdraw(shard)
            return False
        return True

    def withdraw(self, shard: str) -> None:
        """Give up a claim, after the shard's record was written or when the work is abandoned."""
        with self._lock:
            path = self._claimed.pop(shard)
        _remove(path)

    def wait(self, seconds: float) -> bool:
        """Wait before trying again; return True if the claims were closed meanwhile."""
        return self._stopped.wait(seconds)

    def _is_claimed_by_another(self, shard: str) -> bool:
        """Whether a live claim of another process exists; claims that have expired are removed."""
        is_claimed = False
        for name in storage.sizes(self.folder):
            if not name.startswith(f"{shard}-") or name.endswith(self.process):
                continue
            path = storage.join(self.folder, name)
            if self._has_expired(path):
                _remove(path)
            else:
                is_claimed = True
        return is_claimed

    def _has_expired(self, path: str) -> bool:
        try:
            content = storage.read_bytes(path)
            owner = json.loads(content)
        except (StorageError, ValueError):  # withdrawn since the listing
            return True
        if owner["machine"] == _machine() and not _is_running(owner["pid"]):
            return True
        before, since = self._observed.get(path, (b"", 0.0))
        if content != before:
            self._observed[path] = content, time.monotonic()
            return False
        return time.monotonic() - since > self.lease_seconds

    def _renew_regularly(self) -> None:
        while not self._stopped.wait(self.lease_seconds / RENEWALS_PER_LEASE):
            self._renewals += 1
            with self._lock:
                paths = list(self._claimed.values())
            for path in paths:
                with contextlib.suppress(StorageError):  # a failed renewal costs at most that the shard is made twice
                    self._write(path)
                if path not in self._claimed.values():  # withdrawn meanwhile
                    _remove(path)

    def _write(self, path: str) -> None:
        owner: dict[str, Any] = {"machine": _machine(), "pid": os.getpid(), "renewals": self._renewals}
        storage.write_bytes(path, json.dumps(owner).encode(), flush=False)


def announce_restart(dest: str, world: World) -> None:
    """As rank 0: tell every other rank that the old shards are removed and the new recipe is in place."""
    for rank in range(1, world.size):
        storage.write_bytes(_restart_token(dest, rank), b"")


def wait_for_restart(dest: str, world: World, seconds: float = RESTART_SECONDS) -> None:
    """As another rank: wait for rank 0's `announce_restart`. A rank that starts late finds its token and does not wait.

    Raises:
        DataError: rank 0 made no announcement in `seconds`.
    """
    token, deadline = _restart_token(dest, world.rank), time.monotonic() + seconds
    while not storage.sizes(storage.join(dest, WORK)).keys() & {token.rpartition("/")[2]}:
        if time.monotonic() > deadline:
            raise DataError(f"{dest}: rank 0 did not remove the old shards within {seconds:.0f} s; look at its message")
        time.sleep(0.2)
    storage.remove(token)


def clear_work(dest: str) -> None:
    """Remove the claims and tokens of earlier runs."""
    storage.remove(storage.join(dest, WORK))


def clear_claims(dest: str) -> None:
    """Remove the claims that dead processes left in a data set that is complete."""
    folder = storage.join(dest, WORK)
    for name in storage.sizes(folder):
        if ".tar-" in name:
            _remove(storage.join(folder, name))


def _restart_token(dest: str, rank: int) -> str:
    return storage.join(dest, WORK, f"restarted-{rank}")


def _remove(path: str) -> None:
    with contextlib.suppress(StorageError):  # two processes may remove the same one
        storage.remove(path)


def _machine() -> str:
    """Identify the processes that this one can see: the boot of the machine, and the namespace of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown {uuid.uuid4().hex}"  # equal to no other: the lease decides


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")  # a killed child of a busy parent stays a zombie
