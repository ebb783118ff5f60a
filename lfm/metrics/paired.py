"""Metrics of generated images that each replace a known real image, as in inpainting.

A linear support vector machine with squared hinge loss is trained to separate real from generated features,

    minimise over w:  |w|^2 / 2 + C sum_i max(0, 1 - y_i w . (x_i, 1))^2         y = 1 for real, -1 for generated

and evaluated on its own training set (Zhao et al. 2021, section 4.1, Eq. 4 and 5):

    U-IDS = fraction of all features that it misclassifies
    P-IDS = fraction of pairs in which it scores the generated image above the real one

PSNR and SSIM compare the pixels of a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lfm.errors import ConfigError


class DiscriminationScores(NamedTuple):
    """P-IDS and U-IDS, between 0 and about 0.5; higher is better."""

    paired: float
    unpaired: float


def discrimination_scores(real: Tensor, fake: Tensor) -> DiscriminationScores:
    """Return P-IDS and U-IDS of features (N, D); row i of `fake` replaces row i of `real`.

    Raises:
        ConfigError: If scikit-learn is not installed.
    """
    assert real.shape == fake.shape, f"real {tuple(real.shape)}, fake {tuple(fake.shape)}"
    try:
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ConfigError("P-IDS and U-IDS need scikit-learn: pip install 'lfm[evaluate]'") from error
    features = torch.cat([real, fake]).double().cpu().numpy()
    is_real = np.arange(len(features)) < len(real)
    scores = LinearSVC(dual=False).fit(features, is_real).decision_function(features)
    misclassified = (scores > 0) != is_real
    of_real, of_fake = np.split(scores, 2)
    return DiscriminationScores(float((of_fake > of_real).mean()), float(misclassified.mean()))


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of uint8 images (B, 3, H, W): float32 (B,); 100 for equal images."""
    error = (first.float() - second.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).clamp(max=100)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the structural similarity of uint8 images (B, 3, H, W): float32 (B,).

    The window is a Gaussian of 11 pixels (Wang et al. 2004).

    Raises:
        ConfigError: If torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ConfigError("SSIM needs torchmetrics: pip install 'lfm[evaluate]'") from error
    value = structural_similarity_index_measure(first.float(), second.float(), data_range=255.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(-1)  # torchmetrics drops the dimension of a single image
