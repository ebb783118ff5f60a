"""The adaptive solvers of torchdiffeq, which the paper's numbers were computed with.

They take the same steps for the whole batch and control the root mean square of the error over all rows, so an image
depends on the other images of its batch. The solvers of `lfm.solvers.runge_kutta` control each row for itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchdiffeq import odeint

from lfm.types import Velocity


def batch_adaptive_step(method: str, velocity: Velocity, noise: Tensor, *, atol: float, rtol: float) -> Tensor:
    """Integrate from noise to latents (B, ...) by the method of this name in torchdiffeq."""
    rows = torch.arange(len(noise), device=noise.device)
    ends = torch.tensor([1.0, 0.0], dtype=noise.dtype, device=noise.device)
    return odeint(lambda t, x: velocity(x, t.expand(len(x)), rows), noise, ends, method=method, atol=atol, rtol=rtol)[1]
