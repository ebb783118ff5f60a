"""Tests of the versions of a data set that has grown: digests, lookup, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfm.data import manifest as manifests
from lfm.data.manifest import ClassRecord, Manifest, ShardRecord
from lfm.data.versions import at_version, digests, with_version_before
from lfm.errors import DataError


def raw_manifest(num_shards: int, num_classes: int = 1) -> Manifest:
    """Return the manifest of raw shards of as many samples as their numbers."""
    names = [f"{number:06d}.tar" for number in range(num_shards)]
    return Manifest(
        kind="raw",
        image_size=8,
        classes=tuple(ClassRecord(index=i, name=str(i), count=num_shards) for i in range(num_classes)),
        recipe={"pictures": num_shards},
        shards=tuple(ShardRecord(name=name, samples=i, bytes=1, sha256="", crc32=0) for i, name in enumerate(names)),
    )


def test_an_ungrown_data_set_keeps_the_digest_that_it_always_had(tmp_path: Path) -> None:
    """The digest and the file of a manifest without versions are those of lfm before there were versions."""
    manifest = raw_manifest(2)
    old = manifest.model_dump(mode="json", exclude={"columns", "versions"})
    assert manifest.digest == manifests.digest([old])
    manifests.publish(str(tmp_path), manifest)
    assert '"versions"' not in (tmp_path / "manifest.json").read_text()
    assert manifests.load(str(tmp_path)) == manifest


def test_every_version_is_found_as_it_was(tmp_path: Path) -> None:
    """Each has its digest, shards, classes and recipe; the list survives the file."""
    versions = [raw_manifest(2)]
    for num_shards, num_classes in ((3, 1), (7, 4)):
        versions.append(with_version_before(raw_manifest(num_shards, num_classes), versions[-1]))
    manifests.publish(str(tmp_path), versions[-1])
    newest = manifests.load(str(tmp_path))
    assert newest == versions[-1] and len(set(digests(newest))) == 3
    assert digests(newest) == [version.digest for version in versions]
    for version in versions:
        assert at_version(newest, version.digest, "here") == version


def test_what_is_no_growth_is_refused() -> None:
    """Other shards in front, no new shards, an unknown version, and shards that have changed since."""
    before = raw_manifest(3)
    with pytest.raises(DataError, match="shards before them are others"):
        with_version_before(raw_manifest(2), before)
    grown = with_version_before(raw_manifest(5), before)
    with pytest.raises(DataError, match=r"^here: has no version 0123"):
        at_version(grown, "0123", "here")
    changed = grown.shards[0].model_copy(update={"sha256": "other"})
    with pytest.raises(DataError, match=r"^here: the first 3 shards are not those"):
        at_version(grown.model_copy(update={"shards": (changed, *grown.shards[1:])}), before.digest, "here")
    for ends in ((5,), (3, 3), (4, 3), (0, 3)):
        content = grown.model_dump()
        content["versions"] = [content["versions"][0] | {"num_shards": end} for end in ends]
        with pytest.raises(ValueError, match="versions: each must have more shards"):
            Manifest.model_validate(content)
