"""`lfm encode` of raw shards that have grown, into the latents of the version before."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lfm.data import manifest as manifests
from lfm.data.dropped import Drop, DroppedSample, add_drop, load_drops
from lfm.data.manifest import RECIPE
from lfm.data.versions import at_version, digests
from tests.support.commands import REPOSITORY, SmallSet, assert_one_line, lfm
from tests.support.images import folder_contents, random_images
from tests.support.small_disk import SmallDisk

SHARD = ("--image-size", 16, "--samples-per-shard", 8)


@dataclass(frozen=True)
class Grown:
    """Raw shards before and after they have grown, and the latents of both."""

    raw: Path
    raw_before: Path
    before: Path
    after: Path
    options: tuple[object, ...]


@pytest.fixture(scope="module")
def grown(small_set: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    root = tmp_path_factory.mktemp("grown")
    images = random_images(root / "images", 60)
    aside = [path.rename(root / path.name) for path in sorted(images.iterdir())[20:]]
    folders = Grown(
        root / "raw", root / "raw-before", root / "before", root / "after", ("--autoencoder", small_set.autoencoder)
    )
    assert lfm("shard", images, folders.raw, *SHARD).exit_code == 0
    shutil.copytree(folders.raw, folders.raw_before)
    assert lfm("encode", folders.raw, folders.before, *folders.options).exit_code == 0
    for path in aside:
        path.rename(images / path.name)
    assert lfm("shard", images, folders.raw, *SHARD).exit_code == 0
    shutil.copytree(folders.before, folders.after)
    result = lfm("encode", folders.raw, folders.after, *folders.options)
    assert result.exit_code == 0, result.stderr
    assert "which has 3 of the shards and grows" in result.stdout and "60 samples" in result.stdout
    return folders


def test_latents_grow_with_their_raw_shards(grown: Grown, tmp_path: Path) -> None:
    """The old shards stay, the new ones are those of a set that is encoded at once, and the versions are listed."""
    before, after = (manifests.load(str(folder)) for folder in (grown.before, grown.after))
    assert after.shards[:3] == before.shards and len(after.shards) == 8
    assert digests(after) == [before.digest, after.digest]
    assert at_version(after, before.digest, "here").model_copy(update={"columns": before.columns}) == before
    assert after.parent_digest == manifests.load(str(grown.raw)).digest
    assert lfm("encode", grown.raw, tmp_path / "once", *grown.options).exit_code == 0
    once = manifests.load(str(tmp_path / "once"))
    assert once.shards == after.shards and once.columns == after.columns and once.channel_mean == after.channel_mean
    contents = folder_contents(grown.after)
    assert lfm("encode", grown.raw, grown.after, *grown.options).exit_code == 0
    assert folder_contents(grown.after) == contents


@pytest.mark.slow
def test_killed_while_they_grow_the_old_version_stays_and_a_rerun_finishes(grown: Grown, tmp_path: Path) -> None:
    latents = shutil.copytree(grown.before, tmp_path / "latents")
    command = [sys.executable, "-m", "pipelines.cli.main", "encode", grown.raw, latents, *grown.options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(manifests.done(str(latents))) < 4 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert len(manifests.done(str(latents))) > 3
    _assert_before(grown, latents)
    assert lfm("encode", grown.raw, latents, *grown.options).exit_code == 0
    assert folder_contents(latents) == folder_contents(grown.after)


def test_on_a_full_disk_the_old_version_stays_and_with_room_the_same_command_finishes(
    grown: Grown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever of its files the disk is full."""
    disk, whole = SmallDisk(monkeypatch), folder_contents(grown.after)
    for room in itertools.count():
        latents = shutil.copytree(grown.before, tmp_path / f"latents-{room}")
        disk.room = room
        result, disk.room = lfm("encode", grown.raw, latents, *grown.options), None
        if result.exit_code == 0:
            break
        assert_one_line(result, latents, "no space left", "run the same command to resume")
        _assert_before(grown, latents)
        assert folder_contents(latents).keys() <= whole.keys()
        assert lfm("encode", grown.raw, latents, *grown.options).exit_code == 0
        assert folder_contents(latents) == whole
    assert room > 5 * 2, "five new shards, each of two files"
    assert folder_contents(latents) == whole


def _assert_before(grown: Grown, latents: Path) -> None:
    """Assert that latents are still of the version before, readable and with all of its files."""
    assert manifests.load(str(latents)) == manifests.load(str(grown.before))
    for name, content in folder_contents(grown.before).items():
        assert name == RECIPE or (latents / name).read_bytes() == content


def test_what_was_finished_before_an_end_is_taken_over(grown: Grown, tmp_path: Path) -> None:
    """A shard that is done, one whose record is missing, and one that is damaged."""
    latents = shutil.copytree(grown.before, tmp_path / "latents")
    for name in (RECIPE, "000003.tar", "000003.json", "000004.tar", "000005.json"):
        shutil.copy(grown.after / name, latents / name)
    (latents / "000005.tar").write_bytes(b"half")
    (latents / "000003.tar").touch()
    time_before = (latents / "000003.tar").stat().st_mtime_ns
    _assert_before(grown, latents)
    assert lfm("encode", grown.raw, latents, *grown.options).exit_code == 0
    assert folder_contents(latents) == folder_contents(grown.after)
    assert (latents / "000003.tar").stat().st_mtime_ns == time_before


def test_other_raw_shards_and_settings_are_no_growth(grown: Grown, small_set: SmallSet, tmp_path: Path) -> None:
    latents = shutil.copytree(grown.before, tmp_path / "latents")
    assert_one_line(lfm("encode", small_set.raw, latents, *grown.options), "different settings", "raw")
    assert_one_line(lfm("encode", grown.raw, latents, *grown.options, "--flips"), "different settings", "flips")
    (latents / "000001.tar").unlink()
    assert_one_line(lfm("encode", grown.raw, latents, *grown.options), "000001.tar", "restore it")
    assert manifests.load(str(latents)) == manifests.load(str(grown.before))


def test_what_was_dropped_from_raw_shards_is_dropped_from_their_latents(grown: Grown, tmp_path: Path) -> None:
    raw = shutil.copytree(grown.raw, tmp_path / "raw")
    sample = DroppedSample(key="000003000002", shard="000003.tar", row=2)
    add_drop(str(raw), Drop(reason="licence", samples=(sample,)))
    latents = shutil.copytree(grown.before, tmp_path / "latents")
    own = Drop(samples=(DroppedSample(key="000000000000", shard="000000.tar", row=0),))
    add_drop(str(latents), own)
    for _ in range(2):
        assert lfm("encode", raw, latents, *grown.options).exit_code == 0
        assert load_drops(str(latents)) == (own, *load_drops(str(raw)))
