"""A network that predicts the noise of a variance-preserving diffusion, as a velocity network of the linear path.

    diffusion    x_vp = a(k) data + b(k) noise,    a^2 = prod_j (1 - beta_j),  b^2 = 1 - a^2,    k = 0 .. 999
    path         x    = (1 - t) data + t noise

The two are equal up to scale where b / a = t / (1 - t). That gives the step k of a time t, between whole steps too. Then

    x_vp = a x / (1 - t),    velocity = noise - data = (predicted noise - x) / (1 - t)

beta rises linearly from 1e-4 to 0.02 (Ho et al. 2020), as DiT was trained (Peebles & Xie 2022). The noisiest step still
contains 0.6 % of the data, so times above 0.994 are treated as 0.994.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lfm.types import Condition

NUM_DIFFUSION_STEPS = 1000


class NoisePrediction(nn.Module):
    """The velocity network of a noise-predicting network, which takes the diffusion step as its time."""

    log_ratio: Tensor  # float64 (1000,): log b / a of each step

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        betas = torch.linspace(1e-4, 0.02, NUM_DIFFUSION_STEPS, dtype=torch.float64)
        data_variance = (1 - betas).cumprod(0)  # a^2
        log_ratio = ((1 - data_variance) / data_variance).log() / 2
        self.register_buffer("log_ratio", log_ratio, persistent=False)

    def forward(
        self,
        state: Tensor,
        time: Tensor,
        condition: Condition,
        kept_tokens: Tensor | None = None,
        return_tokens: tuple[int, ...] = (),
        internal: bool = False,
        latent: bool = False,
    ) -> Any:
        """Compute the velocity, float32 (B, C, h, w), at state (B, C, h, w) and time (B,); see `VelocityNetwork.forward`."""
        time = time.double().clamp(max=float(self.log_ratio[-1].sigmoid()))  # (B,)
        log_ratio = torch.logit(time).clamp(min=self.log_ratio[0])  # (B,): log t / (1 - t)
        above = torch.searchsorted(self.log_ratio, log_ratio).clamp(1, NUM_DIFFUSION_STEPS - 1)  # (B,): step
        low, high = self.log_ratio[above - 1], self.log_ratio[above]  # (B,)
        step = above - 1 + (log_ratio - low) / (high - low)  # (B,)
        data_scale = (1 + (2 * log_ratio).exp()).rsqrt()  # (B,): a
        scale = (data_scale / (1 - time)).float().view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        options: tuple[Any, ...] = (kept_tokens, return_tokens, internal, latent)
        if kept_tokens is None and not (return_tokens or internal or latent):
            options = ()  # which not every network takes
        output = self.network(state * scale, step.float(), condition, *options)
        noise, tokens = output if return_tokens else (output, ())  # noise (B, C, h, w), or (n, B, C, h, w)
        velocity = (noise - state) / (1 - time).float().view(-1, 1, 1, 1)  # the same shape
        if latent:
            velocity = torch.cat([velocity[:-1], noise[-1:]])  # the last is a prediction of the clean latent
        return (velocity, tokens) if return_tokens else velocity


def as_velocity(network: Any, prediction: str, device: Any = None) -> Any:
    """Return a network as a velocity network, for a prediction of "velocity" or "noise"."""
    return NoisePrediction(network).to(device) if prediction == "noise" else network
