"""`lfm shard` into a folder that is complete: what is new, what is known, kills and mistakes."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lfm.data import manifest as manifests
from lfm.data.manifest import INDEX, MANIFEST, RECIPE
from lfm.data.versions import at_version, digests
from lfm.synthetic.scenes import draw_scene
from pipelines.data.growth import shard_growth
from pipelines.data.shard import ShardConfig, run
from tests.support.commands import REPOSITORY, assert_one_line, lfm
from tests.support.images import folder_contents, image_folder, random_pixels, raw_samples, save_image
from tests.support.small_disk import SmallDisk

OPTIONS = ("--image-size", 16, "--samples-per-shard", 8)


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in folder_contents(folder).items() if name.endswith(".tar")}


def add(folder: Path, count: int, first: int, name: str = "cat") -> list[str]:
    """Write more random images into a class folder; return their paths in the source."""
    random = np.random.default_rng(first)
    names = [f"{name}/{index}.jpg" for index in range(first, first + count)]
    for each in names:
        save_image(folder / each, random.integers(0, 256, (20, 24, 3), np.uint8))
    return names


@pytest.mark.parametrize("has_index", [True, False])
def test_a_set_grows_by_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_index: bool) -> None:
    """Old shards stay as they are; classes keep their indices; samples, index and versions are complete; again does nothing."""
    source, raw = image_folder(tmp_path / "p", 20), tmp_path / "raw"
    (source / "dog" / "broken.jpg").write_bytes(b"")
    command = ("shard", source, raw, *OPTIONS, "--max-rejected", 0.2)
    assert lfm(*command).exit_code == 0
    if not has_index:  # as without pyarrow
        (raw / INDEX).unlink()
        manifests.publish(str(raw), manifests.load(str(raw)).model_copy(update={"columns": None}))
        for facts in raw.glob("*.columns.json"):
            facts.unlink()
    before, old = manifests.load(str(raw)), shards_of(raw)
    new = [*add(source, 5, 100), *add(source, 4, 200, "ant")]
    copied = shutil.copy(source / "cat" / "0.jpg", source / "cat" / "renamed.jpg")
    shutil.rmtree(source / "dog")

    planned = lfm(*command, "--dry-run")
    assert "grows by 10" in planned.stdout and folder_contents(raw).keys() >= old.keys(), planned.stdout
    grown = lfm(*command)
    assert grown.exit_code == 0, grown.stderr
    assert "which has 10 of them and grows by 10" in grown.stdout and "29 samples" in grown.stdout
    after = manifests.load(str(raw))
    assert {name: shards_of(raw)[name] for name in old} == old
    assert after.shards[: len(before.shards)] == before.shards
    assert [entry.name for entry in after.classes] == ["cat", "dog", "ant"]
    assert [entry.count for entry in after.classes] == [15, 10, 4]
    samples = raw_samples(raw)
    assert {name for name in samples if name.startswith("ant/")} | {
        name for name in samples if int(Path(name).stem) >= 100
    } == {*new}
    assert len(samples) == 29 and samples["ant/200.jpg"].class_index == 2
    assert {reject.source: reject.reason for reject in after.rejects} == {
        "dog/broken.jpg": "empty file",
        f"cat/{Path(copied).name}": shard_growth.KNOWN_CONTENT,
    }
    assert digests(after) == [before.digest, after.digest]
    assert at_version(after, before.digest, "here").model_copy(update={"columns": before.columns}) == before
    assert after.columns is not None and after.columns.file != INDEX
    table = pq.read_table(raw / after.columns.file).to_pydict()
    stored = [sample for shard in sorted(raw.glob("*.tar")) for sample in _in_order(shard)]
    assert table["key"] == [key for key, _ in stored] and table["source"] == [name for _, name in stored]
    assert Counter(table["class"]) == {"cat": 15, "dog": 10, "ant": 4}

    contents = folder_contents(raw)
    (raw / after.shards[-1].name).write_bytes(b"damaged")
    again = lfm(*command)
    assert again.exit_code == 0, again.stderr
    assert folder_contents(raw) == contents


def _in_order(shard: Path) -> list[tuple[str, str]]:
    samples = raw_samples_of(shard)
    return [(sample.key, sample.metadata["source"]) for sample in samples]


def raw_samples_of(shard: Path) -> list:
    from lfm.data.raw_shards import read_raw

    with shard.open("rb") as stream:
        return list(read_raw(stream, str(shard)))


def test_it_grows_again_in_parts_and_by_any_number_of_workers(tmp_path: Path) -> None:
    """Two parts in any order are one run, and all versions are listed."""
    source = image_folder(tmp_path / "p", 12)
    folders = [tmp_path / "one", tmp_path / "two"]
    config = {"image_size": 16, "samples_per_shard": 4}
    for folder in folders:
        run(ShardConfig(str(source), str(folder), **config), lambda _: None)
    for first in (100, 200):
        add(source, 11, first, "dog")
        run(ShardConfig(str(source), str(folders[0]), **config), lambda _: None)
        for part in ("2/2", "1/2"):
            result = run(ShardConfig(str(source), str(folders[1]), part=part, **config), lambda _: None)
            assert (result.manifest is not None) == (part == "1/2")
        assert folder_contents(folders[0]) == folder_contents(folders[1])
    manifest = manifests.load(str(folders[0]))
    assert [version.num_shards for version in manifest.versions] == [3, 6] and len(manifest.shards) == 9
    assert manifest.num_samples == 34


@pytest.mark.slow
def test_killed_while_it_grows_the_old_version_stays_and_a_rerun_finishes(tmp_path: Path) -> None:
    """Every byte is then that of a growth without the kill; a source that changes meanwhile begins it anew."""
    source = tmp_path / "pictures"
    for index in range(40):
        if index == 8:
            assert lfm("shard", source, tmp_path / "before", *_large()).exit_code == 0
        save_image(source / f"{index}.png", Image.fromarray(random_pixels(300, 300 + index, 3)))
    whole, raw = tmp_path / "whole", tmp_path / "raw"
    shutil.copytree(tmp_path / "before", whole)
    shutil.copytree(tmp_path / "before", raw)
    assert lfm("shard", source, whole, *_large()).exit_code == 0
    command = [sys.executable, "-m", "pipelines.cli.main", "shard", source, raw, *_large()]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(manifests.done(str(raw))) < 4 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert 2 < len(manifests.done(str(raw))) < 10
    for name, content in folder_contents(tmp_path / "before").items():
        assert name == RECIPE or (raw / name).read_bytes() == content
    shutil.copytree(raw, tmp_path / "reverted")
    shutil.copytree(raw, tmp_path / "changed")
    assert lfm("shard", source, raw, *_large()).exit_code == 0
    assert folder_contents(raw) == folder_contents(whole)

    (source / "39.png").unlink()
    assert lfm("shard", source, tmp_path / "changed", *_large()).exit_code == 0
    assert manifests.load(str(tmp_path / "changed")).num_samples == 39
    for index in range(8, 39):
        (source / f"{index}.png").unlink()
    assert lfm("shard", source, tmp_path / "reverted", *_large()).exit_code == 0
    assert folder_contents(tmp_path / "reverted") == folder_contents(tmp_path / "before")


def test_on_a_full_disk_the_old_version_stays_and_with_room_the_same_command_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever of its files the disk is full."""
    source, before, whole = image_folder(tmp_path / "p", 20), tmp_path / "before", tmp_path / "whole"
    command = ("shard", source)
    assert lfm(*command, before, *OPTIONS).exit_code == 0
    add(source, 20, 100)
    shutil.copytree(before, whole)
    assert lfm(*command, whole, *OPTIONS).exit_code == 0
    old, new, disk = folder_contents(before), folder_contents(whole), SmallDisk(monkeypatch)
    for room in itertools.count():
        raw = shutil.copytree(before, tmp_path / f"raw-{room}")
        disk.room = room
        result, disk.room = lfm(*command, raw, *OPTIONS), None
        if result.exit_code == 0:
            break
        assert_one_line(result, raw, "no space left", "run the same command to resume")
        contents = folder_contents(raw)
        assert all(name == RECIPE or contents[name] == content for name, content in old.items())
        assert contents.keys() <= new.keys() | {name for name in contents if name.startswith(".work/")}
        assert manifests.load(str(raw)) == manifests.load(str(before))
        assert lfm(*command, raw, *OPTIONS).exit_code == 0
        assert folder_contents(raw) == new
    assert room > 3 * 3, "three new shards, each of three files"
    assert folder_contents(raw) == new


def _large() -> tuple[object, ...]:
    return ("--image-size", 256, "--samples-per-shard", 4, "--format", "png")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """Other settings, other fields and damaged shards; nothing changes."""
    source, raw = image_folder(tmp_path / "p", 8), tmp_path / "raw"
    assert lfm("shard", source, raw, *OPTIONS).exit_code == 0
    add(source, 3, 100)
    contents = folder_contents(raw)
    assert_one_line(lfm("shard", source, raw, *OPTIONS, "--crop", "pad"), raw, "different settings", "crop")
    assert_one_line(lfm("shard", source, raw, *OPTIONS, "--classes", "none"), raw, "have class", "have images only")
    assert folder_contents(raw) == contents
    (raw / "000000.tar").write_bytes(b"")
    assert_one_line(lfm("shard", source, raw, *OPTIONS), "000000.tar", "restore it")
    (raw / "000000.tar").write_bytes(contents["000000.tar"])
    assert lfm("shard", source, raw, *OPTIONS).exit_code == 0
    (raw / MANIFEST).write_text("{")
    assert_one_line(lfm("shard", source, raw, *OPTIONS), MANIFEST)


def test_near_duplicates_of_images_that_the_set_has_are_dropped(tmp_path: Path) -> None:
    """Also where the new image is the first of both in the order of the source."""
    source, raw = tmp_path / "images", tmp_path / "raw"
    options = ("--image-size", 32, "--samples-per-shard", 4, "--near-duplicates", "drop", "--classes", "none")
    for number in range(6):
        save_image(source / "mz"[number % 2] / f"{number}.png", Image.fromarray(draw_scene(0, number, 96).image))
    assert lfm("shard", source, raw, *options).exit_code == 0
    old = shards_of(raw)
    with Image.open(source / "m" / "2.png") as image:
        save_image(source / "a" / "copy.png", image.resize((72, 72)))
    for number in range(6, 9):
        save_image(source / "z" / f"{number}.png", Image.fromarray(draw_scene(0, number, 96).image))
    result = lfm("shard", source, raw, *options)
    assert result.exit_code == 0 and "1 of 10 images, at most" in result.stdout, result.output
    manifest = manifests.load(str(raw))
    assert [(each.source, each.detail) for each in manifest.rejects] == [("a/copy.png", "near duplicate: of m/2.png")]
    assert manifest.num_samples == 9 and {name: shards_of(raw)[name] for name in old} == old
