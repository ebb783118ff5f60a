"""The random numbers of a sample, as pure functions of (seed, sample number).

    word i of a sample = mix(start + i stride)                       64 bits; i counts from 1
    start = mix(mix(seed) + number),  stride = mix(~start) | 1       so that every sample has a sequence of its own

mix is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). There is
no state: nothing depends on the batch, the rank or the world size, and nothing has to be saved to resume. It is integer
arithmetic on tensors, so that noise is generated on the device that needs it and is equal on all devices (up to the last
digit of Box and Muller's transform); the host would spend more time on it than on everything else together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_IMAGES = 1 << 63  # distinguishes the noise of images from that of training, whose sample numbers are below it
_SCALARS = 3  # words of a sample that precede those of its noise
_ROUNDS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB as int64


@dataclass(frozen=True)
class Draws:
    """The random numbers of samples besides their noise, in the shape of the sample numbers."""

    flip: Tensor  # bool
    drop: Tensor  # float32 in [0, 1): the condition is dropped if it is below condition_dropout
    uniform: Tensor  # float32 in [0, 1): mapped to a time by the time sampler


def draw(seed: int, sample_numbers: Tensor) -> Draws:
    """Return the random numbers of samples by their numbers in the global order of training, int64 of any shape."""
    words = _words(seed, sample_numbers, 1, _SCALARS)
    uniforms = (words >> 40).bitwise_and_((1 << 24) - 1).float().mul_(2.0**-24)  # float32 has 24 bits of precision
    return Draws(words[..., 0] < 0, uniforms[..., 1], uniforms[..., 2])


def draw_noise(seed: int, sample_numbers: Tensor, shape: Sequence[int], pair: int = 0) -> tuple[Tensor, Tensor]:
    """Return the posterior's noise and the path's noise, on the device of the sample numbers, int64 (B,).

    Both are float32 (B, *shape), standard normal, independent of each other and within six standard deviations. So are
    further pairs, from 1 on, of each other and of the first.
    """
    count = math.prod(shape)
    words = _words(seed, sample_numbers, 1 + _SCALARS + pair * count, count).view(len(sample_numbers), *shape)
    radius = (words >> 32).float().mul_(2.0**-32).add_(0.5).clamp_(min=2.0**-26).log_().mul_(-2).sqrt_()
    angle = words.bitwise_and_((1 << 32) - 1).float().mul_(2.0**-32 * 2 * math.pi)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)


def draw_candidates(seed: int, sample_numbers: Tensor, shape: Sequence[int], count: int) -> Iterator[Tensor]:
    """Yield `count` further noises of each sample, each float32 (B, *shape), independent of those of `draw_noise`."""
    for number in range(count):
        if number % 2 == 0:
            pair = draw_noise(seed, sample_numbers, shape, 1 + number // 2)
        yield pair[number % 2]


def kept_tokens(seed: int, sample_numbers: Tensor, num_tokens: int, num_kept: int) -> Tensor | None:
    """Return the tokens of each sample that the middle blocks see, uniformly random: int64 (B, num_kept); None for all."""
    if num_kept == num_tokens:
        return None
    return _words(seed, sample_numbers, -num_tokens, num_tokens).argsort(1)[
        :, :num_kept
    ]  # words that nothing else uses


def _words(seed: int, sample_numbers: Tensor, first: int, count: int) -> Tensor:
    """Return `count` words of each sample from word `first` on, int64 (..., count)."""
    start = _mix(sample_numbers + _key(seed))[..., None]
    index = torch.arange(first, first + count, device=sample_numbers.device)
    return _mix(index * (_mix(~start) | 1) + start)


@lru_cache(maxsize=8)
def _key(seed: int) -> int:
    return int(_mix(torch.tensor(seed)))


def _mix(words: Tensor) -> Tensor:
    """Apply, in place, a bijection of int64 after which every bit depends on all bits."""
    for shift, factor in _ROUNDS:
        words.bitwise_xor_(_shifted(words, shift)).mul_(factor)
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, bits: int) -> Tensor:
    # Shifting an int64 right copies its sign bit, which is masked out.
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def image_noise(seeds: Sequence[int] | np.ndarray, shape: Sequence[int], step: int = 0) -> np.ndarray:
    """Return each seed's initial noise, or the noise of a stochastic solver's step, counted from 1.

    Float32 (len(seeds), *shape), standard normal.
    """
    noise = np.empty((len(seeds), *shape), np.float32)
    for row, seed in enumerate(seeds):
        random = np.random.Generator(
            np.random.Philox(key=np.array([_IMAGES, int(seed)], np.uint64), counter=[0, 0, 0, step])
        )
        random.standard_normal(out=noise[row], dtype=np.float32)
    return noise
