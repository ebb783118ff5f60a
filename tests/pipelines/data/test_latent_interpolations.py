"""Tests of the distance of decoded interpolations of latents."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm import autoencoder as autoencoders
from lfm.metrics.features import FeatureNetwork, Features
from pipelines.data.latent_interpolations import interpolation_distance, nearest_others
from tests.support.commands import SmallSet, assert_one_line, lfm
from tests.support.feature_networks import PooledPixels


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 9))
def test_each_latent_is_paired_with_the_nearest_other(seed: int, count: int) -> None:
    latents = torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    for number, other in enumerate(nearest_others(latents).tolist()):
        distances = (latents - latents[number]).square().flatten(1).sum(1)
        distances[number] = torch.inf
        assert other == int(distances.argmin())


def test_latents_whose_interpolations_are_like_the_images_are_nearer() -> None:
    network = FeatureNetwork(
        "pooled", "fd", "0", "", torch.device("cpu"), lambda images: Features(PooledPixels()(images))
    )
    autoencoder = autoencoders.load("embedded")
    images = torch.randint(0, 256, (12, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = images.repeat(1, 1, 16, 16)
    latents = (autoencoder.encode(images).mean - autoencoder.shift) * autoencoder.scale_factor
    twice = torch.cat([latents, latents])  # each has a nearest one that is itself
    exact = interpolation_distance(autoencoder, twice, torch.cat([images, images]), network)
    assert abs(exact.interpolated - exact.reconstructed) < 1e-6
    mixed = interpolation_distance(autoencoder, latents, images, network)
    assert mixed.interpolated > mixed.reconstructed
    alone = interpolation_distance(autoencoder, latents, None, network)
    assert alone.reconstructed == 0


def test_the_command_prints_it_and_refuses_it_for_images(small_set: SmallSet, tmp_path: Path) -> None:
    out, latents = tmp_path / "sheet.png", small_set.raw.parent / "latents"
    result = lfm("inspect", latents, "--raw", small_set.raw, "--interpolations", 20, "--num", 4, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "decoded interpolations of 20 latents: KID " in result.stdout and "to the images (decoded" in result.stdout
    assert_one_line(lfm("inspect", small_set.raw, "--interpolations", 4, "--out", out), "interpolations", "latents")
