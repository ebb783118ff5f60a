"""Tests of the velocity of a noise-predicting network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lfm.models.noise_prediction import NUM_DIFFUSION_STEPS, NoisePrediction
from lfm.types import Condition


class NoiseOfNormalData(nn.Module):
    """The best prediction of the noise for normal data of this standard deviation, between whole steps too."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, state: Tensor, step: Tensor, condition: Condition) -> Tensor:
        data_variance = (1 - torch.linspace(1e-4, 0.02, NUM_DIFFUSION_STEPS, dtype=torch.float64)).cumprod(0)
        log_ratio = np.interp(
            step.double(), range(NUM_DIFFUSION_STEPS), ((1 - data_variance) / data_variance).log() / 2
        )
        data_share = (1 + torch.from_numpy(np.exp(2 * log_ratio))).rsqrt().view(-1, 1, 1, 1)
        noise_share = (1 - data_share**2).sqrt()
        return noise_share * state / ((data_share * self.spread) ** 2 + noise_share**2)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_the_velocity_is_that_of_the_linear_path(spread: float) -> None:
    state, time = torch.randn(40, 1, 2, 2), torch.linspace(0.02, 0.99, 40)
    velocity = NoisePrediction(NoiseOfNormalData(spread))(state, time, Condition())
    t = time.view(-1, 1, 1, 1)
    slope = (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2)
    torch.testing.assert_close(velocity.float(), slope * state, atol=1e-3, rtol=1e-3)
    ends = NoisePrediction(NoiseOfNormalData(spread))(state[:2], torch.tensor([0.0, 1.0]), Condition())
    assert ends.isfinite().all()
