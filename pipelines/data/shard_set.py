"""What `lfm shard` and `lfm encode` share: writing a shard with its record, and completing the set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.manifest import ShardRecord
from lfm.data.tar import write_tar
from lfm.errors import DataError


def write_shard(
    dest: str, name: str, samples: Iterable[dict[str, Any]], describe: Callable[[], dict[str, Any]]
) -> ShardRecord:
    """Write one shard and then its record.

    Args:
        dest: folder of the set, a path or URL.
        name: file name of the shard.
        samples: each sample as the members of the tar.
        describe: called after the last sample; returns the record's fields beside name, size and checksums.

    Raises:
        DataError: the folder's recipe was replaced meanwhile.
    """
    recipe_path = storage.join(dest, manifests.RECIPE)
    recipe = storage.read_bytes(recipe_path)

    def check_recipe() -> None:
        if not storage.exists(recipe_path) or storage.read_bytes(recipe_path) != recipe:
            raise DataError(f"{dest}: another command has begun anew there with `overwrite`; run one of them at a time")

    with storage.writing(storage.join(dest, name)) as temporary:
        write_tar(temporary, samples)
        checksums = storage.checksums(temporary)
        check_recipe()  # shards of two recipes must not mix
    record = ShardRecord(name=name, **asdict(checksums), **describe())
    check_recipe()
    manifests.commit(dest, record)
    return record


def complete_records(dest: str, names: list[str]) -> tuple[ShardRecord, ...] | None:
    """The records of all shards of a set in the order of `names`; None while some are not done.

    Raises:
        DataError: a record or a shard is damaged.
    """
    if not set(names) <= manifests.done(dest):
        return None
    return manifests.records(dest, names)
