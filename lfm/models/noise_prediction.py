"""A network that predicts the noise of a variance-preserving diffusion, as a velocity network of the linear path.

    diffusion    x_vp = a(k) data + b(k) noise,    a^2 = prod_j (1 - beta_j),  b^2 = 1 - a^2,    k = 0 .. 999
    path         x    = (1 - t) data + t noise

Both are the same mixture, up to scale, where b / a = t / (1 - t): that gives k for a time t, between whole steps too. Then

    x_vp = a x / (1 - t),    velocity = noise - data = (predicted noise - x) / (1 - t)

beta rises linearly from 1e-4 to 0.02 (Ho et al. 2020), as DiT was trained (Peebles & Xie 2022). The noisiest step still holds
0.6 % of the data, so the last of the path, t > 0.994, keeps its velocity there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfm.types import Condition

NUM_DIFFUSION_STEPS = 1000


class NoisePrediction(nn.Module):
    """The velocity network that a noise-predicting one is: state, time and condition -> velocity."""

    log_ratio: Tensor  # float64 (1000,): log b / a of each step

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        betas = torch.linspace(1e-4, 0.02, NUM_DIFFUSION_STEPS, dtype=torch.float64)
        kept = (1 - betas).cumprod(0)
        self.register_buffer("log_ratio", ((1 - kept) / kept).log() / 2, persistent=False)

    def forward(self, state: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Velocity, float32 (B, C, h, w), at state (B, C, h, w) and time (B,)."""
        time = time.double().clamp(max=float(self.log_ratio[-1].sigmoid()))
        wanted = torch.logit(time).clamp(min=self.log_ratio[0])  # log t / (1 - t)
        above = torch.searchsorted(self.log_ratio, wanted).clamp(1, NUM_DIFFUSION_STEPS - 1)
        low, high = self.log_ratio[above - 1], self.log_ratio[above]
        step = above - 1 + (wanted - low) / (high - low)
        data_share = (1 + (2 * wanted).exp()).rsqrt()  # a
        scale = (data_share / (1 - time)).float().view(-1, 1, 1, 1)
        noise = self.network(state * scale, step.float(), condition)
        return (noise - state) / (1 - time).float().view(-1, 1, 1, 1)
