"""`lfm autoencoder`: it learns, resumes bit for bit, and what it wrote is what `lfm encode` loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lfm import autoencoder as autoencoders
from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.evaluation_images import ShardedImages
from lfm.errors import ConfigError, DataError
from lfm.storage.cache import Cache
from lfm.world import World
from pipelines.data.train_autoencoder import (
    AutoencoderConfig,
    AutoencoderTrainer,
    ShuffledImages,
    run,
    transformed,
)
from tests.support.commands import ALONE, SmallSet, assert_one_line, lfm


def config(small_set: SmallSet, dest: Path, **changes: object) -> AutoencoderConfig:
    settings = {"num_steps": 12, "batch_size": 8, "block_channels": (8, 8), "save_every": 5} | changes
    return AutoencoderConfig((str(small_set.raw),), str(dest), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("equivariance", [0.0, 0.5])
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(
    small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equivariance: float
) -> None:
    run(config(small_set, tmp_path / "a", equivariance=equivariance), ALONE)
    step = AutoencoderTrainer._train_step

    def killed(self: AutoencoderTrainer, images: torch.Tensor) -> float:
        if self.step == 7:
            raise KeyboardInterrupt
        return step(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AutoencoderTrainer, "_train_step", killed)
        run(config(small_set, tmp_path / "b", equivariance=equivariance), ALONE)
    run(config(small_set, tmp_path / "b", equivariance=equivariance), ALONE)
    one, other = (autoencoders.load(str(tmp_path / name)) for name in "ab")
    assert one.content_hash == other.content_hash
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors", "recipe.json"
    ]  # fmt: skip


def test_equivariance_brings_the_decoder_of_transformed_latents_near_the_transformed_images(
    small_set: SmallSet, tmp_path: Path
) -> None:
    raw = ShardedImages(str(small_set.raw), manifests.load(str(small_set.raw), "raw"), Cache())
    images = autoencoders.to_unit_range(ShuffledImages(raw, 0).at(0, 40))
    errors = {}
    for weight in (0.0, 1.0):
        dest = tmp_path / str(weight)
        run(config(small_set, dest, num_steps=60, learning_rate=3e-3, equivariance=weight), ALONE)
        assert ("equivariance" in storage.read_json(str(dest / "recipe.json"))) == bool(weight)
        model = autoencoders.load(str(dest)).model
        with torch.no_grad():
            latents = model.encode(images).latent_dist.mean
            decoded = model.decode(transformed(latents, 1, 4)).sample
            errors[weight] = float((decoded - transformed(images, 1, 8)).square().mean())
    assert errors[1.0] < 0.9 * errors[0.0]


def test_a_transformation_rotates_exactly_and_keeps_the_mean() -> None:
    values = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for turns in range(4):
        assert torch.equal(transformed(values, turns, 8), values.rot90(turns, (2, 3)))
        small = transformed(values, turns, 4)
        assert small.shape == (2, 3, 4, 4)
        torch.testing.assert_close(transformed(values, 0, 4).rot90(turns, (2, 3)), small)
    constant = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(transformed(constant, 1, 3), torch.full((1, 1, 3, 3), 0.3))


def test_the_precision_is_recorded_and_tf32_is_fp32_without_a_gpu(small_set: SmallSet, tmp_path: Path) -> None:
    hashes = {}
    for precision in ("tf32", "fp32", "bf16"):
        dest = tmp_path / precision
        run(config(small_set, dest, num_steps=1, precision=precision), ALONE)
        assert storage.read_json(str(dest / "recipe.json"))["precision"] == ("bf16" if precision == "bf16" else "fp32")
        hashes[precision] = autoencoders.load(str(dest)).content_hash
    assert hashes["tf32"] == hashes["fp32"] != hashes["bf16"]
    assert run(config(small_set, tmp_path / "fp32", num_steps=1), ALONE).psnr is None, (
        "the default is the same on a CPU"
    )


def test_it_learns_and_its_latents_have_unit_deviation(small_set: SmallSet, tmp_path: Path) -> None:
    few = run(config(small_set, tmp_path / "few", num_steps=2), ALONE).psnr
    many = run(config(small_set, tmp_path / "many", num_steps=60, learning_rate=3e-3), ALONE).psnr
    assert few is not None and many is not None and many > few + 3
    model = autoencoders.load(str(tmp_path / "many"))
    raw = ShardedImages(str(small_set.raw), manifests.load(str(small_set.raw), "raw"), Cache())
    images = ShuffledImages(raw, 0).at(0, 40)
    assert (model.encode(images).mean * model.scale_factor).std() == pytest.approx(1, abs=0.1)


def test_a_finished_one_is_kept_and_another_is_refused(small_set: SmallSet, tmp_path: Path) -> None:
    run(config(small_set, tmp_path / "a", num_steps=1), ALONE)
    before = (tmp_path / "a" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert run(config(small_set, tmp_path / "a", num_steps=1), ALONE).psnr is None
    with pytest.raises(ConfigError, match="kl_weight"):
        run(config(small_set, tmp_path / "a", num_steps=1, kl_weight=0.5), ALONE)
    assert (tmp_path / "a" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert run(config(small_set, tmp_path / "a", num_steps=1, kl_weight=0.5, overwrite=True), ALONE).psnr is not None
    assert (tmp_path / "a" / "diffusion_pytorch_model.safetensors").read_bytes() != before


def test_a_run_killed_after_its_last_step_is_exported_by_the_next(
    small_set: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: AutoencoderTrainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AutoencoderTrainer, "export", killed)
        run(config(small_set, tmp_path / "a", num_steps=5), ALONE)
    run(config(small_set, tmp_path / "a", num_steps=5), ALONE)
    run(config(small_set, tmp_path / "b", num_steps=5), ALONE)
    one, other = (autoencoders.load(str(tmp_path / name)) for name in "ab")
    assert one.content_hash == other.content_hash


def test_overwrite_leaves_an_autoencoder_of_somebody_else(small_set: SmallSet, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in small_set.autoencoder.iterdir()}
    with pytest.raises(ConfigError, match="something else"):
        run(config(small_set, small_set.autoencoder, num_steps=1, overwrite=True), ALONE)
    assert {path.name: path.read_bytes() for path in small_set.autoencoder.iterdir()} == before


def test_a_loss_that_is_not_finite_stops_it(small_set: SmallSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lower `learning_rate`"):
        run(config(small_set, tmp_path / "a", learning_rate=1e30), ALONE)
    assert not (tmp_path / "a" / "config.json").exists()


def test_several_ranks_are_refused_before_they_write_anything(small_set: SmallSet, tmp_path: Path) -> None:
    """They would all write the same files."""
    with pytest.raises(ConfigError, match="run it without a launcher"):
        run(config(small_set, tmp_path / "out"), World(1, 1, 2))
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    assert_one_line(
        lfm("autoencoder", small_set.raw, tmp_path / "out", env=launched), "started 2", "without a launcher"
    )
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line(small_set: SmallSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_one_line(lfm("autoencoder", small_set.raw, small_set.raw, out, "--batch-size", 3), "--batch-size 3")
    assert_one_line(lfm("autoencoder", small_set.latents, out), "holds latent shards")
    assert_one_line(lfm("autoencoder", small_set.raw, out, "--kl-weight", "nan"), "--kl-weight")
    assert_one_line(lfm("autoencoder", small_set.raw, out, "--initialize-from", tmp_path / "no"), tmp_path / "no")
    assert_one_line(lfm("autoencoder", small_set.raw, small_set.raw, small_set.images), "something else")
    assert not out.exists()
