"""The probability path between data and noise, the sampling of its time, and the loss.

    state(t)    = (1 - t) data + (s + (1 - s) t) noise          t in [0, 1]: 0 is data, 1 is noise
    velocity    = d state / dt = (1 - s) noise - data           the same at every t
    loss        = mean over C, h, w of (predicted - velocity)^2

data, a latent; noise, standard normal of its shape; s = sigma_min, the spread that is left at t = 0.
Dao et al. 2023, section 3; it is the conditional optimal-transport path of Lipman et al. 2023, Eq. 22 and 23,
with time reversed. Everything here is float32, whatever comes in: a bfloat16 time has 256 values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lfm.types import PathSample

SIGMA_MIN = 1e-5

# torch.rand gives multiples of 2^-24 in float32: 0 stands for all of [0, 2^-24), whose middle is this
_SMALLEST_UNIFORM = 2.0**-25


def path_sample(data: Tensor, noise: Tensor, time: Tensor, sigma_min: float = SIGMA_MIN) -> PathSample:
    """The training example of each row at its time: data and noise (B, ...), time (B,) in [0, 1]."""
    assert data.shape == noise.shape, f"data {tuple(data.shape)}, noise {tuple(noise.shape)}"
    assert time.shape == data.shape[:1], f"time {tuple(time.shape)}, batch {data.shape[0]}"
    data, noise, time = data.float(), noise.float(), time.float()
    t = time.view(-1, *[1] * (data.ndim - 1))
    state = (1 - t) * data + (sigma_min + (1 - sigma_min) * t) * noise
    velocity = (1 - sigma_min) * noise - data
    return PathSample(state, time, velocity)


def velocity_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row, float32 (B,), of predicted and target velocities (B, ...)."""
    assert predicted.shape == target.shape, f"predicted {tuple(predicted.shape)}, target {tuple(target.shape)}"
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def uniform_time(uniform: Tensor) -> Tensor:
    """Every time alike: float32 (B,) in [0, 1) of uniform (B,) in [0, 1)."""
    return uniform.float()


def logit_normal_time(uniform: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times whose logit is normal: sigmoid(mean + std z), z the normal quantile of `uniform`.

    Esser et al. 2024, Eq. 19. A mean above 0 prefers noise, a small std the middle. Float32 (B,) in [0, 1] of
    uniform (B,) in [0, 1).
    """
    assert std > 0, f"std {std}"
    quantile = torch.special.ndtri(uniform.float().clamp(min=_SMALLEST_UNIFORM))
    return torch.sigmoid(mean + std * quantile)


def shifted_time(uniform: Tensor, shift: float) -> Tensor:
    """Uniform times moved towards noise (shift > 1) or data (shift < 1) (Esser et al. 2024, Eq. 23).

    shift t / (1 + (shift - 1) t), float32 (B,) in [0, 1] of uniform (B,) in [0, 1). The ends stay where they are.
    """
    assert shift > 0, f"shift {shift}"
    time = uniform.float()
    return (shift * time / (1 + (shift - 1) * time)).clamp(max=1.0)


TIME_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_time,
    "logit_normal": logit_normal_time,
    "shifted": shifted_time,
}
