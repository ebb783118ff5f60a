"""The probability path between data and noise, and the errors of a predicted velocity.

    state(t)          = (1 - t) data + (s + (1 - s) t) noise          t in [0, 1]: 0 is data, 1 is noise
    velocity          = d state / dt = (1 - s) noise - data           the same at every t
    squared error     = mean over C, h, w of (predicted - velocity)^2
    direction error   = mean over h, w of (1 - cosine over C of predicted and velocity)

data is a latent, noise is standard normal, and s is sigma_min, the standard deviation of the noise at t = 0. This is
section 3 of Dao et al. 2023, and the conditional optimal-transport path of Lipman et al. 2023, Eq. 22 and 23, with time
reversed. Their loss is the squared error; the direction error is that of Yao et al. 2024 (FasterDiT). The training loss
is the weighted sum of such errors in `lfm.training.loss_terms`.

Everything is float32, whatever the dtype of the inputs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from lfm.types import PathSample

SIGMA_MIN = 1e-5

# The first velocity of a new network is 0, where the gradient of the cosine is 1 / this. With torch's default of 1e-8 it
# would be larger than all other gradients.
_COSINE_EPSILON = 0.1


def path_sample(data: Tensor, noise: Tensor, time: Tensor, sigma_min: float = SIGMA_MIN) -> PathSample:
    """Return the training example of each row: data and noise (B, ...) at time (B,) in [0, 1]."""
    assert data.shape == noise.shape, f"data {tuple(data.shape)}, noise {tuple(noise.shape)}"
    assert time.shape == data.shape[:1], f"time {tuple(time.shape)}, batch {data.shape[0]}"
    data, noise, time = data.float(), noise.float(), time.float()
    t = time.view(-1, *[1] * (data.ndim - 1))
    state = (1 - t) * data + (sigma_min + (1 - sigma_min) * t) * noise
    velocity = (1 - sigma_min) * noise - data
    return PathSample(state, time, velocity)


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each row, float32 (B,), of velocities (B, C, ...)."""
    assert predicted.shape == target.shape, f"predicted {tuple(predicted.shape)}, target {tuple(target.shape)}"
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def direction_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Return 1 - the mean cosine of each row, float32 (B,) in [0, 2], of velocities (B, C, ...)."""
    assert predicted.shape == target.shape, f"predicted {tuple(predicted.shape)}, target {tuple(target.shape)}"
    cosine = cosine_similarity(predicted.float(), target.float(), dim=1, eps=_COSINE_EPSILON)  # (B, ...)
    return (1 - cosine).flatten(1).mean(1)
