"""Tests of `lfm reference`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfm.metrics import reference as references
from lfm.metrics.frechet import FeatureSums, frechet_distance
from pipelines.evaluation.feature_files import FeatureFiles
from tests.support.commands import SmallSet, assert_one_line
from tests.support.commands import lfm as plain_lfm
from tests.support.feature_networks import trusting_lfm as lfm
from tests.support.images import random_images


def test_a_reference_has_the_features_of_every_image_and_its_origin(
    small_set: SmallSet, reference: Path, network: Path
) -> None:
    content = references.load(str(reference))
    assert (content.header.count, content.header.image_size, content.header.rule) == (40, 16, "centre")
    assert (content.header.network_name, content.header.stored) == ("small", "webp")
    assert content.features is not None
    recomputed = FeatureSums.of(content.features).gaussian()
    assert frechet_distance(recomputed, content.gaussians["pooled"]) == pytest.approx(0, abs=1e-9)
    assert list(reference.parent.iterdir()) == [reference], "the feature files were removed"
    again = lfm("reference", small_set.raw, reference, "--network", network)
    assert again.exit_code == 0


def test_another_reference_is_not_overwritten(small_set: SmallSet, reference: Path, tmp_path: Path) -> None:
    before = reference.read_bytes()
    result = lfm("reference", small_set.raw, reference, "--network", "fd-lite")
    assert_one_line(result, reference.name, "network_name", "--overwrite")
    assert reference.read_bytes() == before


def test_images_of_a_folder_are_resized_or_must_have_one_size(network: Path, tmp_path: Path) -> None:
    folder, out = random_images(tmp_path / "images", 8, 24), tmp_path / "r.safetensors"
    assert lfm("reference", folder, out, "--network", network, "--image-size", 16).exit_code == 0
    assert references.load(str(out)).header.resized
    Image.new("RGB", (16, 16)).save(folder / "zzz.png")
    assert_one_line(lfm("reference", folder, tmp_path / "s.safetensors", "--network", network), "zzz.png", "16 x 16")
    assert_one_line(lfm("reference", folder, out, "--crop", "squash"), "--crop", "--image-size")
    assert_one_line(lfm("reference", folder, tmp_path / "s.npz", "--network", network), ".safetensors")


def test_published_statistics_are_imported(tmp_path: Path) -> None:
    arrays = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "adm.npz", **arrays, arr_0=np.zeros(1))
    out = tmp_path / "adm.safetensors"
    assert_one_line(lfm("reference", tmp_path / "adm.npz", out), "--image-size")
    assert lfm("reference", tmp_path / "adm.npz", out, "--image-size", 256).exit_code == 0
    reference = references.load(str(out))
    assert set(reference.gaussians) == {"pooled", "spatial"}
    assert (reference.features, reference.header.network_name) == (None, "inception")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    other = lfm("reference", tmp_path / "other.npz", tmp_path / "o.safetensors", "--image-size", 256)
    assert_one_line(other, "other.npz", "2048 dimensions")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    broken = lfm("reference", tmp_path / "broken.npz", tmp_path / "o.safetensors", "--image-size", 256)
    assert_one_line(broken, "broken.npz", "download it again")


def test_code_is_run_only_on_demand(small_set: SmallSet, reference: Path, network: Path, tmp_path: Path) -> None:
    """Neither a .pt2 file nor a reference that names one is trusted by itself."""
    command = ("reference", small_set.raw, tmp_path / "r.safetensors", "--network", network)
    assert_one_line(plain_lfm(*command), network, "runs code", "--trust-code")
    command = ("evaluate", small_set.raw, "--reference", reference, "--out", tmp_path / "out")
    assert_one_line(plain_lfm(*command), reference, "network small", "--network")
    assert_one_line(plain_lfm(*command, "--network", network), network, "--trust-code")


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_a_damaged_reference_is_made_again(
    small_set: SmallSet, reference: Path, network: Path, tmp_path: Path, damage: str
) -> None:
    path, content = tmp_path / "r.safetensors", reference.read_bytes()
    flipped = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    path.write_bytes({"empty": b"", "truncated": content[:-100], "flipped": flipped}[damage])
    result = plain_lfm("evaluate", small_set.raw, "--reference", path, "--out", tmp_path / "out")
    assert_one_line(result, path, "is not a reference")
    assert lfm("reference", small_set.raw, path, "--network", network).exit_code == 0
    assert references.load(str(path)).features.equal(references.load(str(reference)).features)


def test_two_commands_that_write_one_reference_both_end_well(
    small_set: SmallSet, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faster one removes the blocks that the other one is about to read."""
    path, original = tmp_path / "r.safetensors", FeatureFiles.statistics
    command = ("reference", small_set.raw, path, "--network", network)

    def slow(files: FeatureFiles, number: int) -> object:
        monkeypatch.setattr(FeatureFiles, "statistics", original)
        assert lfm(*command).exit_code == 0
        return original(files, number)

    monkeypatch.setattr(FeatureFiles, "statistics", slow)
    assert lfm(*command).exit_code == 0
    assert references.load(str(path)).header.count == 40
