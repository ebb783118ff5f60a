"""A network that predicts the noise of a variance-preserving diffusion, as a velocity network of the linear path.

    diffusion    x_vp = a(k) data + b(k) noise,    a^2 = prod_j (1 - beta_j),  b^2 = 1 - a^2,    k = 0 .. 999
    path         x    = (1 - t) data + t noise

The two are equal up to scale where b / a = t / (1 - t). That gives the step k of a time t, between whole steps too. Then

    x_vp = a x / (1 - t),    velocity = noise - data = (predicted noise - x) / (1 - t)

beta rises linearly from 1e-4 to 0.02 (Ho et al. 2020), as DiT was trained (Peebles & Xie 2022). The noisiest step still
contains 0.6 % of the data, so times above 0.994 are treated as 0.994.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfm.types import Condition

NUM_DIFFUSION_STEPS = 1000


class NoisePrediction(nn.Module):
    """The velocity network of a noise-predicting network, which takes the diffusion step as its time."""

    log_ratio: Tensor  # float64 (1000,): log b / a of each step

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        betas = torch.linspace(1e-4, 0.02, NUM_DIFFUSION_STEPS, dtype=torch.float64)
        data_variance = (1 - betas).cumprod(0)  # a^2
        log_ratio = ((1 - data_variance) / data_variance).log() / 2
        self.register_buffer("log_ratio", log_ratio, persistent=False)

    def forward(self, state: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Compute the velocity, float32 (B, C, h, w), at state (B, C, h, w) and time (B,)."""
        time = time.double().clamp(max=float(self.log_ratio[-1].sigmoid()))  # (B,)
        log_ratio = torch.logit(time).clamp(min=self.log_ratio[0])  # (B,): log t / (1 - t)
        above = torch.searchsorted(self.log_ratio, log_ratio).clamp(1, NUM_DIFFUSION_STEPS - 1)  # (B,): step
        low, high = self.log_ratio[above - 1], self.log_ratio[above]  # (B,)
        step = above - 1 + (log_ratio - low) / (high - low)  # (B,)
        data_scale = (1 + (2 * log_ratio).exp()).rsqrt()  # (B,): a
        scale = (data_scale / (1 - time)).float().view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        noise = self.network(state * scale, step.float(), condition)  # (B, C, h, w)
        return (noise - state) / (1 - time).float().view(-1, 1, 1, 1)  # (B, C, h, w)
