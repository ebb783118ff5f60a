"""`lfm inspect`: it says what is there, finds every damaged shard, and its sheet shows maps and masks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lfm import autoencoder as autoencoders
from lfm.data import manifest as manifests
from lfm.data.latent_shards import LatentShard
from lfm.data.raw_shards import read_raw
from lfm.data.stream.latent_stream import LatentStream, StreamOptions
from lfm.data.stream.mixture import single_source
from lfm.storage.cache import Cache
from lfm.synthetic.scenes import CLASS_NAMES, draw_scene
from lfm.types import RawSample
from pipelines.common import image_files
from pipelines.data.inspect_shards import overlaid
from tests.support.commands import ALONE, SmallSet, assert_one_line, lfm


@pytest.mark.parametrize("kind", ["raw", "latents"])
def test_it_describes_shards_and_makes_a_sheet(small_set: SmallSet, tmp_path: Path, kind: str) -> None:
    sheet = tmp_path / "sheet.png"
    result = lfm("inspect", small_set.raw.parent / kind, "--out", sheet, "--num", 9, "--verify")
    assert result.exit_code == 0, result.stderr
    assert f"{kind} shards: 40 samples of 16 x 16 pixels in 3 shards" in result.stdout
    assert all(name in result.stdout for name in CLASS_NAMES) and "every shard equals" in result.stdout
    with Image.open(sheet) as image:
        assert image.size == ((3 * 18 - 2) * 8,) * 2


def test_a_sheet_replaces_that_of_its_own_folder_alone(
    small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        for kind in ("raw", "latents"):
            folder = small_set.raw.parent / kind
            result = lfm("inspect", folder, "--num", 4)
            assert result.exit_code == 0, result.stderr
            assert f"sheet-{folder.parent.name}-{kind}.png" in result.stdout
    first = tmp_path / f"sheet-{small_set.raw.parent.name}-raw.png"
    photograph = first.with_name("photograph.png")
    image_files.save(np.zeros((4, 4, 3), np.uint8), photograph)
    for file in (first, photograph):
        content = file.read_bytes()
        refused = lfm("inspect", small_set.latents, "--num", 4, "--out", file)
        assert_one_line(refused, file, "--out", "--overwrite")
        assert file.read_bytes() == content
    assert lfm("inspect", small_set.latents, "--num", 4, "--out", first, "--overwrite").exit_code == 0
    assert first.read_bytes() != content


def test_every_damaged_shard_is_named(small_set: SmallSet, tmp_path: Path) -> None:
    shutil.copytree(small_set.raw, tmp_path / "raw")
    for name in ("000000.tar", "000002.tar"):
        path = tmp_path / "raw" / name
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(bytes(content))
    result = lfm("inspect", tmp_path / "raw", "--verify", "--out", tmp_path / "sheet.png")
    assert_one_line(result, tmp_path / "raw" / "000000.tar", tmp_path / "raw" / "000002.tar")
    assert "000001.tar" not in result.stderr


def test_a_hole_is_red_and_every_class_has_its_colour() -> None:
    scene = draw_scene(0, 0, 32)
    grey = np.full_like(scene.image, 128)
    masked = overlaid(RawSample("0", grey, mask=scene.mask))
    assert (masked[scene.mask == 0] == 128).all()
    assert (masked[scene.mask == 1] == [204, 51, 51]).all()
    mapped = overlaid(RawSample("0", grey, segmentation=scene.segmentation))
    ids = np.unique(scene.segmentation)
    assert len({tuple(mapped[scene.segmentation == index][0]) for index in ids}) == len(ids)


def test_a_folder_without_shards_is_one_line(tmp_path: Path) -> None:
    assert_one_line(lfm("inspect", tmp_path), tmp_path, "lfm shard")


def test_the_plan_is_what_training_reads(small_set: SmallSet) -> None:
    """From any sample on, across the end of an epoch."""
    manifest = manifests.load(str(small_set.latents), "latents")
    options = StreamOptions(seed=5, window=2, global_batch=10)
    stream = LatentStream(single_source(str(small_set.latents), manifest), options, ALONE, Cache())
    lines = lfm("inspect", small_set.latents, "--plan", "--at", 33, "--num", 10, "--seed", 5, "--window", 2)
    lines = lines.stdout.splitlines()
    batch = stream.batch(33)
    assert (
        len(lines) == 10 and lines[0].startswith("sample 33: epoch 0, ") and lines[9].startswith("sample 42: epoch 1, ")
    )
    for number, latent in zip(batch.sample_numbers.tolist(), batch.latents, strict=True):
        name, _, row, *mirrored = lines[number - 33].split(", ", 1)[1].replace(",", "").split()
        record = next(record for record in manifest.shards if record.name == name)
        shard = LatentShard(small_set.latents / name, record.samples, manifest.members, manifest.stride)
        column = shard.columns["latent_flip.npy" if mirrored else "latent.npy"]
        mean, std = torch.from_numpy(column[slice(int(row), int(row) + 1)]).float().chunk(2, dim=1)
        assert abs(latent / stream.scale + stream.shift - mean[0]).max() <= 6 * std.max()


def test_held_back_shards_are_not_in_the_plan(small_set: SmallSet) -> None:
    """A pass is over the other shards, each of whose samples it has once."""
    kept = manifests.load(str(small_set.latents), "latents").shards[:2]
    num_samples = sum(shard.samples for shard in kept)
    listed = lfm("inspect", small_set.latents, "--plan", "--held-back", 1, "--num", num_samples + 1).stdout.splitlines()
    samples = {tuple(line.split(", ")[1].split()[::2]) for line in listed[:-1]}
    assert samples == {(shard.name, str(row)) for shard in kept for row in range(shard.samples)}
    assert "epoch 0" in listed[-2] and "epoch 1" in listed[-1]
    assert_one_line(lfm("inspect", small_set.latents, "--plan", "--held-back", 3), "held_back 3", "3 shards")


def test_options_of_the_plan_need_it(small_set: SmallSet) -> None:
    assert_one_line(lfm("inspect", small_set.latents, "--at", 5), "--plan")


def test_latents_are_compared_with_their_own_raw_shards_alone(small_set: SmallSet, tmp_path: Path) -> None:
    from lfm.metrics.paired import psnr

    sheet = tmp_path / "sheet.png"
    result = lfm("inspect", small_set.latents, "--raw", small_set.raw, "--num", 9, "--out", sheet)
    assert result.exit_code == 0, result.stderr
    manifest, model = manifests.load(str(small_set.latents), "latents"), autoencoders.load(str(small_set.autoencoder))
    shard = LatentShard(small_set.latents / "000000.tar", 16, manifest.members, manifest.stride)
    first = model.decode(torch.from_numpy(shard.columns["latent.npy"][:9, :4].astype(np.float32)) * model.scale_factor)
    with (small_set.raw / "000000.tar").open("rb") as stream:
        images = [sample.image for _, sample in zip(range(9), read_raw(stream, "raw"), strict=False)]
    second = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    assert f"PSNR {psnr(first, second).mean():.3f}" in result.stdout and "SSIM 0." in result.stdout
    assert_one_line(lfm("inspect", small_set.raw, "--raw", small_set.raw, "--out", sheet), "--raw")
    lfm("shard", small_set.images, tmp_path / "other", "--image-size", 16, "--seed", 1)
    wrong = lfm("inspect", small_set.latents, "--raw", tmp_path / "other", "--out", sheet)
    assert_one_line(wrong, tmp_path / "other", "encoded from other shards")


def test_an_option_that_would_not_be_used_is_refused(small_set: SmallSet) -> None:
    assert_one_line(lfm("inspect", small_set.latents, "--plan", "--verify"), "--plan", "--verify")
    assert_one_line(lfm("inspect", small_set.raw, "--autoencoder", "x"), "--autoencoder", "raw shards")
