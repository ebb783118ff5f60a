"""The probability path between data and noise, which noise a datum has, the sampling of its time, and the loss.

    state(t)    = (1 - t) data + (s + (1 - s) t) noise          t in [0, 1]: 0 is data, 1 is noise
    velocity    = d state / dt = (1 - s) noise - data           the same at every t
    loss        = mean over C, h, w of (predicted - velocity)^2
                + direction_weight * mean over h, w of (1 - cosine over C of predicted and velocity)

data, a latent; noise, standard normal of its shape; s = sigma_min, the spread that is left at t = 0.
Dao et al. 2023, section 3; it is the conditional optimal-transport path of Lipman et al. 2023, Eq. 22 and 23,
with time reversed. direction_weight is 0 there; its term is that of Yao et al. 2024 (FasterDiT).
Everything here is float32, whatever comes in: a bfloat16 time has 256 values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lfm.types import PathSample

SIGMA_MIN = 1e-5

# torch.rand gives multiples of 2^-24 in float32: 0 stands for all of [0, 2^-24), whose middle is this
_SMALLEST_UNIFORM = 2.0**-25

# A new network's velocity is 0, where the cosine's gradient is 1 / this: torch's own 1e-8 would drown all others
_SMALLEST_LENGTH = 0.1


def couple(data: Tensor, noise: Tensor, sample_numbers: Tensor, group: int) -> Tensor:
    """`noise` (B, ...) dealt out anew where it is nearest to `data` (B, ...), among each `group` of successive numbers.

    The permutation of least summed squared distance: minibatch optimal transport (Pooladian et al. 2023; Tong et al.
    2024). It straightens the flow of a model without conditions; under conditions it would give each one a noise of its
    own, which sampling does not (Cheng & Schwing 2025). `sample_numbers` int64 (B,), in any order; `group` divides B.
    """
    assert len(data) % group == 0, f"{len(data)} rows, groups of {group}"
    if group == 1:
        return noise
    coupled = torch.empty_like(noise)
    for rows in sample_numbers.argsort().split(group):
        product = data[rows].flatten(1).double() @ noise[rows].flatten(1).double().T  # all of it that a pairing changes
        _, partners = linear_sum_assignment(product.cpu(), maximize=True)
        coupled[rows] = noise[rows[torch.from_numpy(partners).to(rows.device)]]
    return coupled


def path_sample(data: Tensor, noise: Tensor, time: Tensor, sigma_min: float = SIGMA_MIN) -> PathSample:
    """The training example of each row at its time: data and noise (B, ...), time (B,) in [0, 1]."""
    assert data.shape == noise.shape, f"data {tuple(data.shape)}, noise {tuple(noise.shape)}"
    assert time.shape == data.shape[:1], f"time {tuple(time.shape)}, batch {data.shape[0]}"
    data, noise, time = data.float(), noise.float(), time.float()
    t = time.view(-1, *[1] * (data.ndim - 1))
    state = (1 - t) * data + (sigma_min + (1 - sigma_min) * t) * noise
    velocity = (1 - sigma_min) * noise - data
    return PathSample(state, time, velocity)


def velocity_loss(predicted: Tensor, target: Tensor, direction_weight: float = 0.0) -> Tensor:
    """The loss of each row, float32 (B,), of predicted and target velocities (B, C, ...); by default the squared error."""
    assert predicted.shape == target.shape, f"predicted {tuple(predicted.shape)}, target {tuple(target.shape)}"
    predicted, target = predicted.float(), target.float()
    loss = (predicted - target).square().flatten(1).mean(1)
    if direction_weight:
        cosine = cosine_similarity(predicted, target, dim=1, eps=_SMALLEST_LENGTH)
        loss = loss + direction_weight * (1 - cosine).flatten(1).mean(1)
    return loss


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


def shifted_time(time: Tensor, shift: float) -> Tensor:
    """Times (B,) in [0, 1] moved towards noise (shift > 1) or data (shift < 1) (Esser et al. 2024, Eq. 23).

    shift t / (1 + (shift - 1) t), float32 (B,) in [0, 1]. The ends stay where they are, and a shift of 1 changes nothing.
    """
    assert shift > 0, f"shift {shift}"
    time = time.float()
    return (shift * time / (1 + (shift - 1) * time)).clamp(max=1.0)


TIME_SAMPLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": uniform_time,
    "logit_normal": logit_normal_time,
}
