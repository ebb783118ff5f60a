"""The shipped configurations, and manifests of data sets that they may train on."""

from __future__ import annotations

from lfm.data.manifest import AutoencoderRecord, ClassRecord, Manifest, Member
from tests.support.commands import REPOSITORY

SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))


def latents_manifest(image_size: int, num_classes: int, downsample_factor: int = 4) -> Manifest:
    """Return the manifest of a latent data set with every member and no shards."""
    side = image_size // downsample_factor
    record = AutoencoderRecord(
        name="a", content_hash="0", downsample_factor=downsample_factor, latent_channels=4, scale_factor=1.0, shift=0.0
    )
    return Manifest(
        kind="latents",
        image_size=image_size,
        classes=tuple(ClassRecord(index=index, name=str(index), count=1) for index in range(num_classes)),
        labels={0: "background", 18: "hat"},
        recipe={},
        autoencoder=record,
        members=(
            Member(suffix="latent.npy", dtype="<f2", shape=(8, side, side), offset=128),
            Member(suffix="mask.npy", dtype="|u1", shape=(1, side, side), offset=128),
            Member(suffix="masked.npy", dtype="<f2", shape=(4, side, side), offset=128),
            Member(suffix="seg.npy", dtype="|u1", shape=(image_size, image_size), offset=128),
        ),
        shards=(),
    )
