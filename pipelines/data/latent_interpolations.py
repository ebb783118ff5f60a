"""The distance between images and decoded interpolations of their latents, a measure of latents before any training on them.

    middle_i = (latent_i + latent_n(i)) / 2          n(i): the nearest other latent
    distance = KID(images, decoded middles)

Xu et al. 2026 (arXiv 2603.05630) found it to agree with the distance of the images that a diffusion model makes of such
latents, which the distance of reconstructions does not. They use the Frechet distance of a whole data set; the KID is unbiased
for few images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lfm.autoencoder import Autoencoder
from lfm.metrics.features import FeatureNetwork
from lfm.metrics.kid import squared_discrepancy

_TOGETHER = 16  # images decoded at a time


@dataclass(frozen=True)
class InterpolationDistance:
    """KIDs to the images: of decoded interpolations, and of decoded latents."""

    interpolated: float
    reconstructed: float


def nearest_others(latents: Tensor) -> Tensor:
    """Return the number of the nearest other latent of each of (N, C, h, w), int64 (N,)."""
    distances = torch.cdist(latents.flatten(1), latents.flatten(1))  # (N, N)
    return distances.fill_diagonal_(torch.inf).argmin(1)


def interpolation_distance(
    autoencoder: Autoencoder, latents: Tensor, images: Tensor | None, network: FeatureNetwork
) -> InterpolationDistance:
    """Return the distances of at least two latents.

    Args:
        autoencoder: that of the latents.
        latents: scaled, float32 (N, C, h, w).
        images: their images, uint8 (N, 3, H, W); None for the decoded latents.
        network: its pooled features are compared.
    """
    middles = (latents + latents[nearest_others(latents)]) / 2  # (N, C, h, w)
    decoded = _features(autoencoder, latents, network)  # (N, D)
    reference = decoded
    if images is not None:
        reference = torch.cat([network(part).pooled for part in images.split(_TOGETHER)])  # (N, D)
    return InterpolationDistance(
        squared_discrepancy(reference, _features(autoencoder, middles, network)),
        0.0 if images is None else squared_discrepancy(reference, decoded),
    )


def _features(autoencoder: Autoencoder, latents: Tensor, network: FeatureNetwork) -> Tensor:
    return torch.cat([network(autoencoder.decode(part)).pooled for part in latents.split(_TOGETHER)])  # (N, D)
