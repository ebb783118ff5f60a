"""All that is random about a sample, as a pure function of (seed, sample number).

Each sample has a counter-based generator of its own (Philox, Salmon et al., 2011), keyed by both numbers. So nothing
depends on the batch, the rank or the world, and nothing need be saved to resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_PICTURES = 1 << 63  # sets the noise of pictures apart from that of training: numbers stay below it


@dataclass(frozen=True)
class Draws:
    """What was drawn for B samples of shape (C, h, w)."""

    flip: np.ndarray  # bool (B,)
    drop: np.ndarray  # float32 (B,) in [0, 1): a condition is dropped where it is below the rate
    uniform: np.ndarray  # float32 (B,) in [0, 1): for the time
    posterior_noise: np.ndarray  # float32 (B, C, h, w), standard normal
    noise: np.ndarray  # float32 (B, C, h, w), standard normal


def draw(seed: int, sample_numbers: Sequence[int] | np.ndarray, shape: Sequence[int]) -> Draws:
    """The draws of the samples of these numbers (in the global order of training)."""
    count = len(sample_numbers)
    uniforms = np.empty((count, 3), np.float32)
    normals = np.empty((count, 2, *shape), np.float32)
    for row, number in enumerate(sample_numbers):
        random = np.random.Generator(np.random.Philox(key=[seed, int(number)]))
        random.random(out=uniforms[row], dtype=np.float32)
        random.standard_normal(out=normals[row], dtype=np.float32)
    return Draws(uniforms[:, 0] < 0.5, uniforms[:, 1], uniforms[:, 2], normals[:, 0], normals[:, 1])


def picture_noise(seeds: Sequence[int] | np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The noise that each seed's picture begins with: float32 (len(seeds), *shape), standard normal."""
    noise = np.empty((len(seeds), *shape), np.float32)
    for row, seed in enumerate(seeds):
        random = np.random.Generator(np.random.Philox(key=np.array([_PICTURES, int(seed)], np.uint64)))
        random.standard_normal(out=noise[row], dtype=np.float32)
    return noise
