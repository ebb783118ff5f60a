"""The shipped configurations, and manifests of data sets that they may train on."""

from __future__ import annotations

from lfm.data.manifest import AutoencoderRecord, ClassRecord, Manifest, Member
from tests.support.commands import REPOSITORY

NAMES = ("latent.npy", "mask.npy", "masked.npy", "seg.npy")
SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))


def latents_manifest(image_size: int, num_classes: int, downsample_factor: int = 4) -> Manifest:
    """Return the manifest of a latent data set with every member and no shards."""
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
        members=tuple(Member(suffix=x, dtype="u1", shape=(), offset=0) for x in NAMES),
        shards=(),
    )
