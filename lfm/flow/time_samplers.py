"""Samplers of the time of a training example, and the shift of times.

    uniform         t = u                                 u uniform in [0, 1)
    logit_normal    t = sigmoid(mean + std z)             z the standard normal quantile of u (Esser et al. 2024, Eq. 19)
    shifted         t' = s t / (1 + (s - 1) t)            s the shift (Esser et al. 2024, Eq. 23)

Everything is float32: a bfloat16 time has 256 values. To add a sampler, write its function and a line in `TIME_SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# torch.rand returns multiples of 2^-24 in float32. Its 0 represents all of [0, 2^-24), of which this is the centre.
_SMALLEST_UNIFORM = 2.0**-25


def uniform_time(uniform: Tensor) -> Tensor:
    """Return uniformly distributed times, float32 (B,) in [0, 1), for uniform (B,) in [0, 1)."""
    return uniform.float()


def logit_normal_time(uniform: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return times with a normal logit, float32 (B,) in [0, 1], for uniform (B,) in [0, 1).

    A mean above 0 puts more of them near noise, and a small standard deviation more near the middle.
    """
    assert std > 0, f"std {std}"
    quantile = torch.special.ndtri(uniform.float().clamp(min=_SMALLEST_UNIFORM))
    return torch.sigmoid(mean + std * quantile)


def shifted_time(time: Tensor, shift: float) -> Tensor:
    """Shift times (B,) in [0, 1] towards noise (shift > 1) or data (shift < 1): float32 (B,) in [0, 1].

    0 and 1 stay where they are, and a shift of 1 changes nothing.
    """
    assert shift > 0, f"shift {shift}"
    time = time.float()
    return (shift * time / (1 + (shift - 1) * time)).clamp(max=1.0)


TIME_SAMPLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": uniform_time,
    "logit_normal": logit_normal_time,
}
