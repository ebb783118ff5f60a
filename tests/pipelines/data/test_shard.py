"""What `lfm shard` does with a source whatever its layout: rejects, kills, parts, masks, crops and formats."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfm.data import manifest as manifests
from lfm.data.masks import GREY, free_form
from lfm.data.sources.source import Source
from lfm.types import SourceItem
from pipelines.data.shard import ShardConfig, plan, run, write_job
from pipelines.data.shard_plan import TILE
from tests.support.commands import REPOSITORY, assert_one_line, lfm
from tests.support.images import folder_contents, image_bytes, image_folder, random_pixels, raw_samples, save_image

# --- bad files ---------------------------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in a few kilobytes: its rows are zeros, well packed."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


PIXELS = random_pixels(40, 30, 3)
JPEG, PNG, IDS = image_bytes(PIXELS, format="JPEG"), image_bytes(PIXELS), image_bytes(random_pixels(40, 30, high=5))
MASK = image_bytes(np.kron(random_pixels(4, 3, high=2) * np.uint8(255), np.ones((10, 10), np.uint8)))
# the image, its map, its mask, and the reason for the reject
BAD: dict[str, tuple[bytes | None, bytes | None, bytes | None, str]] = {
    "empty": (b"", IDS, MASK, "empty file"),
    "cut": (JPEG[:300], IDS, MASK, "cannot be decoded"),
    "header-only": (JPEG[:2], IDS, MASK, "not an image"),
    "cut-png": (PNG[:-500], IDS, MASK, "cannot be decoded"),
    "bad-crc": (PNG[:60] + b"\0\0\0\0" + PNG[64:], IDS, MASK, "cannot be decoded"),
    "cut-webp": (image_bytes(PIXELS, format="WEBP")[:200], IDS, MASK, "cannot be decoded"),
    "cut-tiff": (image_bytes(PIXELS, format="TIFF")[:900], IDS, MASK, "cannot be decoded"),
    "cut-bmp": (image_bytes(PIXELS, format="BMP")[:900], IDS, MASK, "cannot be decoded"),
    "text": (b"this is no image", IDS, MASK, "not an image"),
    "page": (b"<html><body>404</body></html>", IDS, MASK, "not an image"),
    "pdf": (b"%PDF-1.7\n" + bytes(100), IDS, MASK, "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", IDS, MASK, "not an image"),
    "zip": (b"PK\3\4" + bytes(100), IDS, MASK, "not an image"),
    "zeros": (bytes(5000), IDS, MASK, "not an image"),
    "bomb": (bomb(30_000), IDS, MASK, "too large"),
    "narrow": (image_bytes(np.zeros((60_000, 1, 3), np.uint8)), image_bytes(np.zeros((60_000, 1), np.uint8)),
               image_bytes(np.zeros((60_000, 1), np.uint8)), "too narrow"),
    "link": (None, IDS, MASK, "unreadable"),
    "no-map": (JPEG, None, MASK, "map unreadable"),
    "empty-map": (JPEG, b"", MASK, "map empty file"),
    "cut-map": (JPEG, IDS[:-300], MASK, "map cannot be decoded"),
    "text-map": (JPEG, b"0 0 1", MASK, "map not an image"),
    "colour-map": (JPEG, PNG, MASK, "map not a map"),
    "jpeg-map": (JPEG, image_bytes(random_pixels(40, 30), format="JPEG"), MASK, "map not a map"),
    "small-map": (JPEG, image_bytes(random_pixels(20, 15, high=5)), MASK, "map of another size"),
    "turned-map": (JPEG, image_bytes(random_pixels(30, 40, high=5)), MASK, "map of another size"),
    "id-beyond": (JPEG, image_bytes(random_pixels(40, 30, high=9)), MASK, "map with unknown ids"),
    "no-mask": (JPEG, IDS, None, "mask unreadable"),
    "small-mask": (JPEG, IDS, image_bytes(random_pixels(9, 9)), "mask of another size"),
    "empty-mask": (JPEG, IDS, image_bytes(np.zeros((40, 30), np.uint8)), "mask empty"),
    "full-mask": (JPEG, IDS, image_bytes(np.ones((40, 30), np.uint8)), "mask full"),
    "ids-mask": (JPEG, IDS, IDS, "mask not binary"),
    "text-mask": (JPEG, IDS, b"hole", "mask not an image"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    good = {f"good-{n}": (JPEG, IDS, MASK, "") for n in range(3)}
    for folder in ("images", "labels", "masks"):
        (root / folder).mkdir()
    for name, (*files, _) in (BAD | good).items():
        for path, content in zip((f"images/{name}.jpg", f"labels/{name}.png", f"masks/{name}.png"), files, strict=True):
            if content is not None:
                (root / path).write_bytes(content)
    (root / "images" / "link.jpg").symlink_to(root / "gone.jpg")
    (root / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    return root


def test_every_bad_file_is_a_named_reject(bad_files: Path, tmp_path: Path) -> None:
    result = lfm("shard", bad_files, tmp_path / "raw", "--image-size", 256, "--max-rejected", 1)
    assert result.exit_code == 0, result.stderr
    manifest = manifests.load(str(tmp_path / "raw"), "raw")
    assert {reject.source: reject.reason for reject in manifest.rejects} == {
        f"images/{name}.jpg": reason for name, (*_, reason) in BAD.items()
    }
    assert all(reject.detail for reject in manifest.rejects) and manifest.num_samples == 3
    assert {Path(source).stem for source in raw_samples(tmp_path / "raw")} == {"good-0", "good-1", "good-2"}


def test_a_mask_whose_hole_lies_outside_the_crop_is_kept(tmp_path: Path) -> None:
    mask = np.zeros((40, 80), np.uint8)
    mask[:, :10] = 255
    for folder, content in (("images", image_bytes(random_pixels(40, 80, 3))), ("masks", image_bytes(mask))):
        (tmp_path / "tree" / folder).mkdir(parents=True)
        (tmp_path / "tree" / folder / "wide.png").write_bytes(content)
    result = lfm("shard", tmp_path / "tree", tmp_path / "raw", "--image-size", 32)
    assert result.exit_code == 0, result.stderr
    (sample,) = raw_samples(tmp_path / "raw").values()
    assert sample.mask is not None and not sample.mask.any()


def test_too_many_bad_files_end_the_stage_with_their_reasons(bad_files: Path, tmp_path: Path) -> None:
    result = lfm("shard", bad_files, tmp_path / "raw", "--image-size", 256, "--max-rejected", 0.5)
    counts = Counter(reason for *_, reason in BAD.values())
    assert_one_line(result, f"of {len(BAD) + 3} images rejected", f"{counts['not an image']} not an image", "images/")
    assert not (tmp_path / "raw" / manifests.MANIFEST).exists()


# --- kills and parts ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_every_byte_is_the_same(tmp_path: Path) -> None:
    for index in range(48):
        save_image(tmp_path / "pictures" / f"{index}.png", Image.fromarray(random_pixels(300, 300 + index, 3)))
    arguments = ("--image-size", "256", "--samples-per-shard", "4", "--workers", "2", "--format", "png")
    assert lfm("shard", tmp_path / "pictures", tmp_path / "whole", *arguments[:-4], "--format", "png").exit_code == 0
    raw = tmp_path / "raw"
    command = [sys.executable, "-m", "pipelines.cli.main", "shard", str(tmp_path / "pictures"), str(raw), *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not manifests.done(str(raw)) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert 0 < len(manifests.done(str(raw))) < 12 and not (raw / manifests.MANIFEST).exists()
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if Path(f"/proc/{child}").exists()], "workers outlive the killed command"
    (raw / ".writing-000011.tar.left.by.another").write_bytes(b"half")
    assert lfm("shard", tmp_path / "pictures", raw, *arguments).exit_code == 0
    assert folder_contents(raw) == folder_contents(tmp_path / "whole")


def test_two_parts_in_any_order_are_one_run(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "p", 30)
    run(ShardConfig(str(source), str(tmp_path / "whole"), image_size=16, samples_per_shard=8))
    for part, says in (("2/2", "the last part writes the manifest"), ("1/2", "30 samples")):
        result = lfm("shard", source, tmp_path / "raw", "--image-size", 16, "--samples-per-shard", 8, "--part", part)
        assert result.exit_code == 0 and says in result.stdout and f"2 of them by part {part}" in result.stdout
        assert (tmp_path / "raw" / manifests.MANIFEST).exists() == (part == "1/2")
    assert folder_contents(tmp_path / "raw") == folder_contents(tmp_path / "whole")


def test_the_rejects_of_all_parts_count_together(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "p", 30)
    for index in range(4):
        (source / "cat" / f"bad{index}.jpg").write_bytes(b"")
    common = ("--image-size", 16, "--samples-per-shard", 8, "--max-rejected", 0.1)
    results = [lfm("shard", source, tmp_path / "raw", *common, "--part", part) for part in ("1/2", "2/2")]
    assert_one_line(results[-1], "4 of 34 images rejected")
    assert not (tmp_path / "raw" / manifests.MANIFEST).exists()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2"])
def test_a_part_that_is_none_is_named(tmp_path: Path, part: str) -> None:
    assert_one_line(lfm("shard", image_folder(tmp_path / "p", 2), tmp_path / "raw", "--part", part), f"--part {part}")


# --- masks -------------------------------------------------------------------------------------------------------


def test_drawn_masks_are_large_holes_of_their_key_and_seed_alone() -> None:
    masks = np.stack([free_form(0, f"{row:012d}", 64) for row in range(300)])
    assert masks.dtype == np.uint8 and set(np.unique(masks)) == {0, 1}
    shares = masks.mean((1, 2))
    assert 0.35 < shares.mean() < 0.65 and shares.min() > 0 and shares.max() < 1 and shares.std() > 0.15
    assert len({mask.tobytes() for mask in masks}) == 300
    assert np.array_equal(masks[7], free_form(0, "000000000007", 64))
    assert not np.array_equal(masks[7], free_form(1, "000000000007", 64))
    large = np.mean([free_form(0, f"{row:012d}", 256).mean() for row in range(300)])
    assert abs(large - shares.mean()) < 0.02
    assert masks.mean(0).min() > 0.12  # no corner is spared


def test_masks_are_drawn_where_there_are_none_and_recorded(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "p", 10)
    command = ("shard", source, tmp_path / "raw", "--image-size", 16)
    assert lfm(*command, "--masks", "free-form", "--seed", 5).exit_code == 0
    for sample in raw_samples(tmp_path / "raw").values():
        assert np.array_equal(sample.mask, free_form(5, sample.key, 16))
    assert manifests.load(str(tmp_path / "raw"), "raw").recipe["masks"] == "free-form"
    assert_one_line(lfm(*command, "--seed", 5), "masks", "--overwrite")
    assert_one_line(lfm(*command, "--masks", "boxes"), "--masks boxes: unknown; one of free-form")


def test_the_plan_and_its_sheet_show_the_masks_that_are_drawn(tmp_path: Path) -> None:
    source, sheet = image_folder(tmp_path / "p", 10), tmp_path / "sheet.png"
    command = ("shard", source, tmp_path / "raw", "--image-size", 16, "--masks", "free-form", "--sheet", sheet)
    planned = lfm(*command, "--samples-per-shard", 4, "--dry-run")
    with Image.open(sheet) as image:
        pixels = np.asarray(image)
    assert lfm(*command, "--samples-per-shard", 4).exit_code == 0
    masks = {sample.metadata["source"]: sample.mask for sample in raw_samples(tmp_path / "raw").values()}
    shares = [mask.mean() for mask in masks.values()]
    expected = f"{np.mean(shares):.0%} of the pixels are missing ({min(shares):.0%} to {max(shares):.0%} in 10 masks)"
    assert expected in planned.stdout and "drawn" in planned.stdout, planned.stdout
    first = next(masks[name] for name in sorted(masks))
    tile = pixels[:TILE, TILE : 2 * TILE]  # beside the first image
    hidden = (tile == GREY).all(-1)
    assert np.array_equal(hidden[3::6, 3::6], first == 1)
    for number in range(3):  # of a set that grows, the masks of new images are drawn alone
        save_image(source / "cat" / f"new-{number}.jpg", random_pixels(20 + number, 24, 3))
    assert "in 3 masks)" in lfm(*command, "--samples-per-shard", 4, "--dry-run").stdout


def test_masks_are_not_drawn_over_a_sources_own(bad_files: Path, tmp_path: Path) -> None:
    assert_one_line(lfm("shard", bad_files, tmp_path / "raw", "--masks", "free-form"), "has masks of its own")


def test_a_soft_mask_is_thresholded_at_one_half_after_the_crop(tmp_path: Path) -> None:
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None], 256, 0)
    save_image(tmp_path / "p" / "a.png", random_pixels(256, 256, 3))
    save_image(tmp_path / "p" / "a_mask.png", np.stack([levels] * 3, -1))
    assert lfm("shard", tmp_path / "p", tmp_path / "raw", "--image-size", 256).exit_code == 0
    mask = raw_samples(tmp_path / "raw")["a.png"].mask
    assert np.array_equal(mask, (levels >= 128).astype(np.uint8))


# --- crops and formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["centre", "pad", "squash"])
@pytest.mark.parametrize("shape", [(48, 80), (81, 50), (16, 16), (7, 9)])
def test_map_mask_and_image_get_the_same_crop(tmp_path: Path, rule: str, shape: tuple[int, int]) -> None:
    """The image shows its own map in grey levels: what is far from an edge must agree."""
    ids = np.zeros(shape, np.uint8)
    ids[shape[0] // 2 :, : shape[1] // 3] = 1
    save_image(tmp_path / "p" / "images" / "a.png", np.stack([ids * 200] * 3, -1))
    save_image(tmp_path / "p" / "labels" / "a.png", ids)
    save_image(tmp_path / "p" / "masks" / "a.png", ids * 255)
    (tmp_path / "p" / "labels.txt").write_text("sky\nearth\n")
    result = lfm("shard", tmp_path / "p", tmp_path / "raw", "--image-size", 16, "--crop", rule)
    assert result.exit_code == 0, result.stderr
    sample = raw_samples(tmp_path / "raw")["images/a.png"]
    assert sample.segmentation is not None and sample.mask is not None
    inside = sample.segmentation != 255
    assert inside.all() == (rule != "pad" or shape[0] == shape[1])
    assert np.mean((sample.image[..., 0] > 100)[inside] == (sample.segmentation == 1)[inside]) > 0.9
    assert np.mean(sample.mask[inside] == sample.segmentation[inside]) > 0.9
    assert set(np.unique(sample.segmentation)) <= {0, 1, 255}


def test_jpeg_on_request_is_of_quality_95_without_chroma_subsampling(tmp_path: Path) -> None:
    save_image(tmp_path / "p" / "a.png", np.kron(random_pixels(8, 8, 3), np.ones((8, 8, 1), np.uint8)))
    assert lfm("shard", tmp_path / "p", tmp_path / "raw", "--image-size", 64, "--format", "jpg").exit_code == 0
    recipe = manifests.load(str(tmp_path / "raw"), "raw").recipe
    assert recipe["encoding"] == {"format": "JPEG", "quality": 95, "subsampling": 0}
    original = np.asarray(Image.open(tmp_path / "p" / "a.png"), np.float32)
    buffer = io.BytesIO()
    Image.fromarray(original.astype(np.uint8)).save(buffer, "JPEG", quality=95, subsampling=0)
    assert np.array_equal(raw_samples(tmp_path / "raw")["a.png"].image, np.asarray(Image.open(buffer)))


def test_a_sample_without_the_mask_that_others_have_is_a_reject(tmp_path: Path) -> None:
    for name in ("a", "b", "b_mask"):
        Image.fromarray(np.eye(9, dtype=np.uint8) * 255).save(tmp_path / f"{name}.png")
    source = Source(str(tmp_path), (SourceItem("a.png"), SourceItem("b.png", mask="b_mask.png")))
    (tmp_path / manifests.RECIPE).write_text("{}")
    records = [
        write_job(job) for job in plan(ShardConfig("source", str(tmp_path), image_size=8, samples_per_shard=1), source)
    ]
    assert [reject.reason for record in records for reject in record.rejects] == ["mask missing"]
