"""`lfm shard --near-duplicates`: copies are reported or dropped, alike for any number of processes and after interruptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lfm.data import manifest as manifests
from lfm.data.manifest import NEAR_DUPLICATES
from lfm.synthetic.scenes import draw_scene
from pipelines.data.shard_claims import WORK
from tests.support.commands import assert_one_line, lfm

OPTIONS = "--image-size", 32, "--samples-per-shard", 4
COPIES = {"b/copy3.jpg": "a/3.png", "b/copy5.png": "a/5.png", "b/copy7.png": "a/5.png"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight different images in folder a, three copies of two of them in folder b, and a file that is no image."""
    root = tmp_path_factory.mktemp("images")
    (root / "a").mkdir()
    (root / "b").mkdir()
    for number in range(8):
        Image.fromarray(draw_scene(0, number, 96).image).save(root / "a" / f"{number}.png")
    for copy, original in COPIES.items():
        with Image.open(root / original) as image:
            image.resize((72, 72)).save(root / copy)
    return root


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_by_default_all_images_are_kept(images: Path, tmp_path: Path) -> None:
    assert lfm("shard", images, tmp_path / "raw", *OPTIONS).exit_code == 0
    assert manifests.load(str(tmp_path / "raw")).num_samples == 11
    assert not (tmp_path / "raw" / NEAR_DUPLICATES).exists()


def test_a_report_lists_them_and_packs_the_same_shards(images: Path, tmp_path: Path) -> None:
    lfm("shard", images, tmp_path / "kept", *OPTIONS)
    options = (*OPTIONS, "--near-duplicates", "report", "--sheet", tmp_path / "sheet.png")
    line = "3 of 11 images, at most 3 of 64 bits from an earlier one: b/copy3.jpg like a/3.png ("
    dry = lfm("shard", images, tmp_path / "raw", *options, "--dry-run")
    assert line in dry.stdout and not (tmp_path / "raw").exists(), dry.output
    with Image.open(tmp_path / "sheet-near-duplicates.png") as sheet:
        assert sheet.size == (2 * (2 * 96 + 2) - 2, 2 * (96 + 2) - 2)
    result = lfm("shard", images, tmp_path / "raw", *options)
    assert result.exit_code == 0 and line in result.stdout
    report = json.loads((tmp_path / "raw" / NEAR_DUPLICATES).read_text())
    assert report["images"] == 11
    assert {each["image"]: each["earlier"] for each in report["near_duplicates"]} == COPIES
    contents = shards_of(tmp_path / "raw")
    del contents[NEAR_DUPLICATES]
    assert contents == shards_of(tmp_path / "kept") and not (tmp_path / "raw" / WORK).exists()


def test_dropping_them_rejects_the_later_ones_for_any_processes(images: Path, tmp_path: Path) -> None:
    """Equal bytes with one process, with two parts in either order, and after a shard and its hashes were lost."""
    options = (*OPTIONS, "--near-duplicates", "drop")
    one = lfm("shard", images, tmp_path / "one", *options)
    assert one.exit_code == 0 and "8 samples, 3 rejected" in one.stdout, one.output
    manifest = manifests.load(str(tmp_path / "one"))
    assert {(each.source, each.reason, each.detail) for each in manifest.rejects} == {
        (copy, "near duplicate", f"near duplicate: of {original}") for copy, original in COPIES.items()
    }
    for part in ("2/2", "1/2"):
        assert lfm("shard", images, tmp_path / "parts", *options, "--part", part).exit_code == 0
    assert shards_of(tmp_path / "parts") == shards_of(tmp_path / "one")
    for name in ("000001.json", "manifest.json"):
        (tmp_path / "parts" / name).unlink()
    assert lfm("shard", images, tmp_path / "parts", *options).exit_code == 0
    assert shards_of(tmp_path / "parts") == shards_of(tmp_path / "one")
    again = lfm("shard", images, tmp_path / "one", *options)
    assert again.exit_code == 0 and "images, at most" not in again.stdout, "nothing is hashed for a complete set"
    assert_one_line(lfm("shard", images, tmp_path / "one", *OPTIONS), "different settings", "near_duplicates")


def test_hashes_of_an_interrupted_run_are_used_if_they_are_whole(images: Path, tmp_path: Path) -> None:
    options = (*OPTIONS, "--near-duplicates", "drop")
    assert lfm("shard", images, tmp_path / "raw", *options, "--part", "1/2").exit_code == 0
    hashes = sorted((tmp_path / "raw" / WORK).iterdir())
    assert len(hashes) == 3
    before = hashes[0].stat().st_mtime_ns
    hashes[1].write_bytes(b"damaged")
    assert lfm("shard", images, tmp_path / "raw", *options, "--part", "1/2", "--dry-run").exit_code == 0
    (tmp_path / "raw" / NEAR_DUPLICATES).unlink()
    assert lfm("shard", images, tmp_path / "raw", *options, "--part", "1/2").exit_code == 0
    assert hashes[0].stat().st_mtime_ns == before and hashes[1].read_bytes() != b"damaged"
    lfm("shard", images, tmp_path / "raw", *options)
    assert manifests.load(str(tmp_path / "raw")).num_samples == 8


@pytest.mark.slow
def test_several_workers_drop_the_same(images: Path, tmp_path: Path) -> None:
    options = (*OPTIONS, "--near-duplicates", "drop")
    assert lfm("shard", images, tmp_path / "one", *options).exit_code == 0
    assert lfm("shard", images, tmp_path / "two", *options, "--workers", 2).exit_code == 0
    assert shards_of(tmp_path / "two") == shards_of(tmp_path / "one")


def test_an_image_that_is_rejected_keeps_no_other_out(tmp_path: Path) -> None:
    """The first of two copies has no mask, and the second one is packed."""
    root = tmp_path / "images"
    root.mkdir()
    for name, number in (("a", 0), ("b", 0), ("c", 1)):
        scene = draw_scene(0, number, 64)
        Image.fromarray(scene.image).save(root / f"{name}.png")
        if name != "a":
            Image.fromarray(255 * scene.mask).save(root / f"{name}_mask.png")
    options = ("--max-rejected", 0.5, "--near-duplicates", "drop")
    result = lfm("shard", root, tmp_path / "raw", *OPTIONS, *options)
    assert result.exit_code == 0 and "2 samples, 1 rejected" in result.stdout, result.output
    (reject,) = manifests.load(str(tmp_path / "raw")).rejects
    assert (reject.source, reject.reason) == ("a.png", "mask unreadable")
