"""The network as a velocity field that counts its evaluations, and guidance of such fields.

    v = v_weak + s (v - v_weak)          on all channels, where time is in the interval; s = 1 is v alone

v, the velocity under the condition; s, the guidance scale. v_weak is v under the null condition (Ho & Salimans 2022, with
s = 1 + w), or the velocity of a smaller or earlier model under the same condition: autoguidance (Karras et al. 2024). An
interval in the middle of the times costs less and keeps variety (Kynkaanniemi et al. 2024). NFE, the number of function
evaluations, counts the calls of a network for each image: a guided evaluation counts twice.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from lfm.types import Condition, Velocity


class CountedVelocity(Velocity, Protocol):
    """A velocity field that knows what it cost."""

    @property
    def nfe(self) -> Tensor:
        """Network evaluations so far, int64 (B,), for each row of the batch."""


class NetworkVelocity:
    """A network under the conditions of one batch, without gradients."""

    def __init__(self, model: nn.Module, condition: Condition, batch_size: int) -> None:
        self.model = model
        self.condition = condition
        self.nfe = torch.zeros(batch_size, dtype=torch.int64)

    @torch.no_grad()
    def __call__(self, state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        self.nfe = self.nfe.to(rows.device)
        self.nfe[rows] += 1
        return self.model(state, time, self.condition.rows(rows))


class Guided:
    """Two velocity fields as one that leads away from the second, where time is in `interval`.

    At scale 1, and outside of the interval, the second is never evaluated.
    """

    def __init__(
        self,
        velocity: CountedVelocity,
        weak: CountedVelocity,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.velocity, self.weak, self.scale = velocity, weak, scale
        low, high = interval  # open at the ends of time, which torchdiffeq's last step goes beyond
        self.interval = (low if low > 0 else -math.inf, high if high < 1 else math.inf)

    @property
    def nfe(self) -> Tensor:
        """Network evaluations of both fields, int64 (B,)."""
        return self.velocity.nfe + self.weak.nfe.to(self.velocity.nfe.device)

    def __call__(self, state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        towards = self.velocity(state, time, rows)
        inside = (time >= self.interval[0]) & (time <= self.interval[1])
        if self.scale == 1 or not inside.any():
            return towards
        away = self.weak(state[inside], time[inside], rows[inside])
        return towards.index_put((inside,), away + self.scale * (towards[inside] - away))
