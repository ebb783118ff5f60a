"""How well images stand for the very ones that they replace: for inpainting, and for any task that comes in pairs.

A linear support vector machine with squared hinge loss is trained to tell real features from generated ones,

    minimise over w:  |w|^2 / 2 + C sum_i max(0, 1 - y_i w . (x_i, 1))^2         y = 1 for real, -1 for generated

and then asked about the features that it was trained on (Zhao et al. 2021, section 4.1, Eq. 4 and 5):

    U-IDS = share of all features that it takes for the other kind
    P-IDS = share of the pairs in which it rates the generated one above the real one

PSNR and SSIM compare the pixels of a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lfm.errors import ConfigError

_MOST_STEPS = 200


class DiscriminationScores(NamedTuple):
    """P-IDS and U-IDS, between 0 and about 0.5; higher is better."""

    paired: float
    unpaired: float


def discrimination_scores(real: Tensor, fake: Tensor) -> DiscriminationScores:
    """Scores of features (N, D) whose rows are pairs."""
    assert real.shape == fake.shape, f"real {tuple(real.shape)}, fake {tuple(fake.shape)}"
    features = torch.cat([real, fake]).double()
    sign = torch.ones(len(features), dtype=torch.float64, device=features.device)
    sign[len(real) :] = -1
    ratings = _with_one(features) @ linear_svm(features, sign)
    taken_wrongly = ((ratings > 0) != (sign > 0)).double().mean()
    of_real, of_fake = ratings.split(len(real))
    return DiscriminationScores(float((of_fake > of_real).double().mean()), float(taken_wrongly))


def linear_svm(features: Tensor, sign: Tensor, penalty: float = 1.0) -> Tensor:
    """The minimiser w (D + 1,) of the formula above by Newton's method: features float64 (N, D), sign (N,) +-1."""
    points = _with_one(features)
    weights = points.new_zeros(points.shape[1])

    def objective(at: Tensor) -> Tensor:
        return at.square().sum() / 2 + penalty * (1 - sign * (points @ at)).clamp(min=0).square().sum()

    for _ in range(_MOST_STEPS):
        shortfall = (1 - sign * (points @ weights)).clamp(min=0)
        inside = points[shortfall > 0]
        gradient = weights - 2 * penalty * points.T @ (sign * shortfall)
        curvature = torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
        step = torch.linalg.solve(curvature + 2 * penalty * inside.T @ inside, gradient)
        decrease, size = gradient @ step, 1.0
        if decrease <= 1e-12 * objective(weights):
            break
        while objective(weights - size * step) > objective(weights) - 1e-4 * size * decrease:
            size /= 2
        weights = weights - size * step
    return weights


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of uint8 images (B, 3, H, W), float32 (B,); 100 where they are equal."""
    error = (first.float() - second.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).clamp(max=100)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of uint8 images (B, 3, H, W), float32 (B,): Gaussian window of 11 pixels (Wang et al. 2004)."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ConfigError("SSIM needs torchmetrics: pip install 'lfm[evaluate]'") from error
    value = structural_similarity_index_measure(first.float(), second.float(), data_range=255.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(-1)  # of a single image it would have no dimension
