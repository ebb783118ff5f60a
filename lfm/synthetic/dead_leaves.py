"""Dead leaves: synthetic images of overlapping shapes with random sizes, colours and textures.

Their edges, occlusions and scales have the statistics of photographs (Ruderman, 1997; Lee, Mumford and Huang, 2001),
and networks trained on them transfer to photographs (Baradad et al., "Learning to See by Looking at Noise", 2021).
The embedded autoencoder is trained on them, so that it depends on no copyrighted images.
"""

from __future__ import annotations

import numpy as np

SUPERSAMPLING = 2


def _clouds(random: np.random.Generator, size: int) -> np.ndarray:
    """A texture whose spectrum falls with a random power of the frequency: (size, size), zero mean, unit deviation."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    noise, decay = random.standard_normal((size, size), np.float32), random.uniform(0.5, 2)
    texture = np.fft.irfft2(np.fft.rfft2(noise) / (1 + frequency) ** decay, s=(size, size))
    return (texture - texture.mean()) / (texture.std() + 1e-6)


def draw_leaves(seed: int, index: int, image_size: int) -> np.ndarray:
    """Draw image `index` of the infinite data set `seed`: uint8 (image_size, image_size, 3)."""
    random = np.random.Generator(np.random.Philox(key=[seed, index]))
    fine = image_size * SUPERSAMPLING
    y, x = np.mgrid[0:fine, 0:fine].astype(np.float32) / fine
    textures = [_clouds(random, fine) for _ in range(2)]
    palette = random.uniform(0, 1, (random.integers(2, 8), 3)) ** random.uniform(0.5, 1.5)
    image = palette[0] + random.uniform(0, 0.2) * textures[0][..., None] * random.uniform(-1, 1, 3)

    for _ in range(random.integers(4, 60)):
        # With a power law of sizes, the statistics are the same at every scale.
        radius = min(0.02 * (1 - random.uniform()) ** -0.6, 0.6)
        angle, aspect = random.uniform(0, np.pi), random.uniform(0.3, 1)
        across, down = x - random.uniform(), y - random.uniform()
        along, aside = np.cos(angle) * across + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * across
        power = random.choice([1, 2, 8])  # a diamond, an ellipse, a rectangle
        leaf = (abs(along / radius)) ** power + (abs(aside / radius / aspect)) ** power < 1
        colour = palette[random.integers(len(palette))] + random.normal(0, 0.08, 3)
        shade = random.uniform(-0.4, 0.4) * along[leaf] / radius
        grain = random.uniform(0, 0.12) * textures[random.integers(2)][leaf]
        stripes = random.uniform(0, 0.15) * (random.uniform() < 0.2) * np.sin(random.uniform(20, 120) * aside[leaf])
        image[leaf] = colour + (shade + grain + stripes)[:, None]

    cells = image.reshape(image_size, SUPERSAMPLING, image_size, SUPERSAMPLING, 3).mean((1, 3))
    return np.round(255 * np.clip(cells, 0, 1)).astype(np.uint8)
