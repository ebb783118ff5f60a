"""What `lfm encode` writes, and that neither a dead rank, nor a full disk, nor a damaged shard spoils it."""

from __future__ import annotations

import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from lfm import autoencoder as autoencoders
from lfm.data import manifest as manifests
from lfm.data.latent_shards import LatentShard
from lfm.data.raw_shards import read_raw
from lfm.errors import DataError
from lfm.synthetic.scenes import SEGMENT_NAMES
from lfm.training.memory_forecast import TensorMemory
from pipelines.data.data_options import EncodeConfig
from pipelines.data.encode import disk_bytes, memory
from pipelines.data.encode_images import ImageEncoder
from tests.support.commands import REPOSITORY, SmallSet, assert_one_line, lfm
from tests.support.images import folder_contents, image_bytes, random_pixels


def test_latents_are_those_of_the_images_and_mirrors_those_of_the_mirrored_images(small_set: SmallSet) -> None:
    model = autoencoders.load(str(small_set.autoencoder))
    raw = webdataset.WebDataset(str(small_set.raw / "000001.tar"), shardshuffle=False).decode("rgb8")
    latents = webdataset.WebDataset(str(small_set.latents / "000001.tar"), shardshuffle=False).decode()
    count = 0
    for sample, latent in zip(raw, latents, strict=True):
        assert sample["__key__"] == latent["__key__"] and sample["cls"] == latent["cls"]
        image = torch.from_numpy(sample["webp"].copy()).permute(2, 0, 1)[None]
        for name, pixels in (("latent.npy", image), ("latent_flip.npy", image.flip(3))):
            posterior = model.encode(pixels)
            expected = torch.cat([posterior.mean, posterior.std], 1)[0].numpy()
            np.testing.assert_allclose(latent[name].astype(np.float32), expected, rtol=2e-3, atol=2e-3)
        assert not np.allclose(latent["latent_flip.npy"], latent["latent.npy"][..., ::-1], atol=2e-3)
        count += 1
    assert count == 16


def test_tar_and_vanilla_webdataset_read_both_kinds_of_shard(small_set: SmallSet) -> None:
    for folder, first in ((small_set.raw, "000000000000.cls"), (small_set.latents, "000000000000.cls")):
        names = subprocess.run(
            ["tar", "tf", folder / "000000.tar"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert names[0] == first and len({name.split(".")[0] for name in names}) == 16
        shards = sorted(map(str, folder.glob("*.tar")))
        assert len(list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))) == 40


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in folder_contents(folder).items() if name.endswith(".tar")}


@pytest.mark.slow
def test_two_processes_make_the_same_bytes_as_one(small_set: SmallSet, tmp_path: Path) -> None:
    command = ("encode", small_set.raw, tmp_path / "latents", "--autoencoder", small_set.autoencoder, "--flips")
    result = lfm(*command, "--num-gpus", 2)
    assert result.exit_code == 0, result.stderr
    assert shards_of(tmp_path / "latents") == shards_of(small_set.latents)
    assert digest(tmp_path / "latents") == digest(small_set.latents)
    assert_one_line(lfm(*command, "--num-gpus", 2, env={"WORLD_SIZE": "2"}), "--num-gpus", "leave it out")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_finishes_what_the_others_leave(small_set: SmallSet, tmp_path: Path, rank: int) -> None:
    """Whatever rank lives on, and whatever the dead one had done."""
    done = sorted(small_set.latents.glob("00000*"))[: 2 * rank]
    (tmp_path / "latents").mkdir()
    for path in [*done, small_set.latents / manifests.RECIPE]:
        shutil.copy(path, tmp_path / "latents")
    result = lfm("encode", small_set.raw, tmp_path / "latents", "--autoencoder", small_set.autoencoder, "--flips",
                 env={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert folder_contents(tmp_path / "latents") == folder_contents(small_set.latents)


def digest(folder: Path) -> str:
    return manifests.load(str(folder), "latents").digest


def test_a_shard_whose_tar_or_record_is_gone_is_made_again(small_set: SmallSet, tmp_path: Path) -> None:
    """By any rank, also by one that begins before the first: nobody waits for another."""
    command = ("encode", small_set.raw, tmp_path / "latents", "--autoencoder", small_set.autoencoder, "--flips")
    assert lfm(*command, env={"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}).exit_code == 0
    for name in ("000001.tar", "000002.json"):
        (tmp_path / "latents" / name).unlink()
        assert lfm(*command).exit_code == 0
        assert folder_contents(tmp_path / "latents") == folder_contents(small_set.latents)


@pytest.mark.parametrize("stage", ["shard", "encode"])
def test_what_is_read_is_never_overwritten_by_the_result(small_set: SmallSet, tmp_path: Path, stage: str) -> None:
    shutil.copytree(small_set.raw, tmp_path / "raw")
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    for dest in ("raw", "link"):
        result = lfm(stage, tmp_path / "raw", tmp_path / dest, "--overwrite")
        assert_one_line(result, tmp_path / dest, "choose another folder")
    assert folder_contents(tmp_path / "raw") == folder_contents(small_set.raw)


def test_a_location_may_be_a_file_url_and_is_never_empty(small_set: SmallSet, tmp_path: Path) -> None:
    command = ("encode", f"file://{small_set.raw}", f"file://{tmp_path}/latents", "--flips")
    assert lfm(*command, "--autoencoder", small_set.autoencoder).exit_code == 0
    assert shards_of(tmp_path / "latents") == shards_of(small_set.latents)
    assert_one_line(lfm("encode", small_set.raw, ""), "DEST", "is empty")
    assert_one_line(lfm("shard", "", tmp_path / "raw"), "SOURCE", "is empty")


def test_a_truncated_raw_shard_is_named(small_set: SmallSet, tmp_path: Path) -> None:
    shutil.copytree(small_set.raw, tmp_path / "raw")
    path = tmp_path / "raw" / "000001.tar"
    path.write_bytes(path.read_bytes()[:-3000])
    result = lfm("encode", tmp_path / "raw", tmp_path / "latents", "--autoencoder", small_set.autoencoder)
    assert_one_line(result, path)
    assert not (tmp_path / "latents" / manifests.MANIFEST).exists()
    assert sorted(name for name in folder_contents(tmp_path / "latents") if name.startswith(".")) == []


def test_raw_shards_with_a_flipped_bit_are_named(small_set: SmallSet, tmp_path: Path) -> None:
    shutil.copytree(small_set.raw, tmp_path / "raw")
    path = tmp_path / "raw" / "000002.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(bytes(content))
    result = lfm("encode", tmp_path / "raw", tmp_path / "latents", "--autoencoder", small_set.autoencoder)
    assert_one_line(result, path, "make it again")


def test_the_precision_is_recorded_and_tf32_is_fp32_without_a_gpu(small_set: SmallSet, tmp_path: Path) -> None:
    common = ("encode", small_set.raw, "--autoencoder", small_set.autoencoder)
    for name, flags in {"default": (), "tf32": ("tf32",), "fp32": ("fp32",), "bf16": ("bf16",)}.items():
        precision = ("--precision", *flags) if flags else ()
        assert lfm(*common, tmp_path / name, *precision).exit_code == 0
        manifest = manifests.load(str(tmp_path / name), "latents")
        assert manifest.recipe["precision"] == ("bf16" if name == "bf16" else "fp32")
    contents = {name: folder_contents(tmp_path / name) for name in ("default", "tf32", "fp32", "bf16")}
    assert contents["default"] == contents["tf32"] == contents["fp32"]
    assert contents["bf16"]["000000.tar"] != contents["fp32"]["000000.tar"]
    assert lfm(*common, tmp_path / "fp32", "--precision", "tf32").exit_code == 0, "resumes"
    assert_one_line(lfm(*common, tmp_path / "bf16"), 'precision ("bf16", now "fp32")')


def test_encode_needs_raw_shards(small_set: SmallSet, tmp_path: Path) -> None:
    flags = ("--autoencoder", small_set.autoencoder)
    assert_one_line(lfm("encode", tmp_path, tmp_path / "out", *flags), "lfm shard")
    assert_one_line(lfm("encode", small_set.latents, tmp_path / "out", *flags), "holds latent shards")
    assert_one_line(lfm("encode", small_set.raw, tmp_path / "out", "--autoencoder", tmp_path / "no"), tmp_path / "no")
    assert lfm("shard", small_set.images, tmp_path / "odd", "--image-size", 15).exit_code == 0
    odd = lfm("encode", tmp_path / "odd", tmp_path / "out", *flags)
    assert_one_line(odd, f"{tmp_path / 'odd'}: its images have 15 pixels", "lfm shard --image-size")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw shards of 48 scenes with maps and masks, in shards of 4."""
    root = tmp_path_factory.mktemp("scenes")
    assert lfm("scenes", root / "scenes", "--num", 48, "--image-size", 32).exit_code == 0
    shard = ("shard", root / "scenes", root / "raw", "--image-size", 32)
    assert lfm(*shard, "--samples-per-shard", 4).exit_code == 0
    return root / "raw"


def test_masks_and_maps_lie_beside_the_latents(scenes: Path, tmp_path: Path) -> None:
    """Of the masked image the posterior's mean, of its mirror too; the mask at latent size; the map as it is."""
    assert lfm("encode", scenes, tmp_path / "latents", "--flips").exit_code == 0
    manifest, model = manifests.load(str(tmp_path / "latents"), "latents"), autoencoders.load("embedded")
    assert manifest.fields == ("mask", "segmentation")
    assert manifest.labels == dict(enumerate(SEGMENT_NAMES)) | {255: "unlabelled"} and manifest.num_labels == 256
    shard = LatentShard(tmp_path / "latents" / "000003.tar", 4, manifest.members, manifest.stride)
    with (scenes / "000003.tar").open("rb") as stream:
        for row, sample in enumerate(read_raw(stream, "raw")):
            assert sample.mask is not None
            assert np.array_equal(shard.columns["seg.npy"][row], sample.segmentation)
            cells = [[sample.mask[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].any() for x in range(8)] for y in range(8)]
            assert np.array_equal(shard.columns["mask.npy"][row], cells)
            hidden = np.where(sample.mask[..., None] == 1, 128, sample.image).astype(np.uint8)
            for name, pixels in (("masked.npy", hidden), ("masked_flip.npy", hidden[:, ::-1].copy())):
                mean = model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).mean[0].numpy()
                np.testing.assert_allclose(shard.columns[name][row], mean, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_killed_process_is_replaced_by_the_others(scenes: Path, tmp_path: Path) -> None:
    assert lfm("encode", scenes, tmp_path / "whole", "--flips").exit_code == 0
    command = [
        sys.executable,
        "-m",
        "pipelines.cli.main",
        "encode",
        scenes,
        tmp_path / "latents",
        "--flips",
        "--num-gpus",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not manifests.done(str(tmp_path / "latents")) and time.monotonic() < deadline:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 2
        os.kill(int(workers[1]), signal.SIGKILL)
        said = process.communicate()[1]
    assert process.returncode == 0, said
    assert "1 of 2 processes died" in said
    assert folder_contents(tmp_path / "latents") == folder_contents(tmp_path / "whole")


MOUNT = ["unshare", "-rm", "sh", "-c"]
can_mount = (
    shutil.which("unshare") and not subprocess.run([*MOUNT, "mount -t tmpfs x /mnt"], capture_output=True).returncode
)


@pytest.mark.slow
@pytest.mark.skipif(not can_mount, reason="a small disk cannot be mounted here (unshare -rm)")
def test_on_a_full_disk_nothing_is_half_there_and_with_room_the_same_command_goes_on(
    small_set: SmallSet, tmp_path: Path
) -> None:
    disk, encode = (
        tmp_path / "disk",
        f"{sys.executable} -m pipelines.cli.main encode {small_set.raw} {tmp_path}/disk/latents",
    )
    disk.mkdir()
    script = f"""
        mount -t tmpfs -o size=150k tmpfs {disk}
        {encode} --autoencoder {small_set.autoencoder} --flips
        echo "ended with $?"; cp -r {disk}/latents {tmp_path}/full
        mount -o remount,size=10m {disk}
        {encode} --autoencoder {small_set.autoencoder} --flips && cp -r {disk}/latents {tmp_path}/latents
    """
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([*MOUNT, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "ended with 2" in result.stdout, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no space left" in errors[0] and "run the same command" in errors[0]
    whole = folder_contents(small_set.latents)
    assert folder_contents(tmp_path / "full").items() < whole.items(), "whole shards and their records alone"
    assert folder_contents(tmp_path / "latents") == whole


@pytest.mark.parametrize("size", [(8, 16), (40_000, 25_000)])
def test_a_mask_of_another_size_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    """Even of 10^9 pixels, which a file of a few bytes may claim."""
    image, mask = image_bytes(random_pixels(16, 16, 3)), bytearray(image_bytes(random_pixels(16, 16)))
    mask[16:24] = struct.pack(">II", *size)
    mask[29:33] = struct.pack(">I", zlib.crc32(mask[12:29]))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in (("0.png", image), ("0.mask.png", bytes(mask))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    stream.seek(0)
    with pytest.raises(DataError, match=r"x.tar: sample 0: "):
        list(read_raw(stream, "x.tar"))


@pytest.mark.parametrize("flips", [False, True])
def test_a_dry_run_forecasts_the_disk_space_to_the_byte(small_set: SmallSet, tmp_path: Path, flips: bool) -> None:
    options = ("encode", small_set.raw, tmp_path / "l", "--autoencoder", small_set.autoencoder, *["--flips"] * flips)
    assert lfm(*options).exit_code == 0
    raw = manifests.load(str(small_set.raw), "raw")
    encoder = ImageEncoder(autoencoders.load(str(small_set.autoencoder)), flips)
    assert disk_bytes(raw, encoder) == sum(path.stat().st_size for path in (tmp_path / "l").glob("*.tar"))


def test_a_dry_run_forecasts_memory_and_hours(small_set: SmallSet, tmp_path: Path) -> None:
    options = ("encode", small_set.raw, tmp_path / "l", "--autoencoder", small_set.autoencoder)
    given = lfm(*options, "--dry-run", "--rate", "0.01").stdout
    assert "1.11 h at 0.01 images/s (given)" in given and "process 0.455 GB" in given
    assert "2 times that of one batch on cpu" in lfm(*options, "--dry-run", "--num-gpus", "2").stdout
    assert not (tmp_path / "l").exists()
    assert_one_line(lfm(*options, "--rate", "3"), "--rate", "--dry-run")


def test_the_forecast_of_memory_is_that_of_a_real_batch(small_set: SmallSet) -> None:
    autoencoder = autoencoders.load(str(small_set.autoencoder))
    config = EncodeConfig(str(small_set.raw), "unused", batch_size=32)
    parts = memory(config, manifests.load(str(small_set.raw), "raw"), ImageEncoder(autoencoder, False))
    with TensorMemory(autoencoder.model.parameters()) as counted:
        autoencoder.encode(torch.zeros(32, 3, 16, 16, dtype=torch.uint8))
    assert parts["activations"] == pytest.approx(counted.peak, rel=0.02)
    assert parts["autoencoder"] == sum(4 * parameter.numel() for parameter in autoencoder.model.parameters())
