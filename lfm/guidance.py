"""The network as a velocity field that counts its evaluations, and classifier-free guidance of such fields.

    v = v_null + s (v_cond - v_null)          on all channels; s = 1 is v_cond alone

v_cond, the velocity under the condition; v_null, under the null class; s, the guidance scale (Ho & Salimans 2022,
with s = 1 + w). NFE, the number of function evaluations, counts the calls of the network for each picture: a guided
evaluation counts twice.
"""

from __future__ import annotations

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
    """Two velocity fields as one that leads away from the second; at scale 1 the second is never evaluated."""

    def __init__(self, conditional: CountedVelocity, unconditional: CountedVelocity, scale: float) -> None:
        self.conditional = conditional
        self.unconditional = unconditional
        self.scale = scale

    @property
    def nfe(self) -> Tensor:
        """Network evaluations of both fields, int64 (B,)."""
        return self.conditional.nfe + self.unconditional.nfe.to(self.conditional.nfe.device)

    def __call__(self, state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        towards = self.conditional(state, time, rows)
        if self.scale == 1:
            return towards
        away = self.unconditional(state, time, rows)
        return away + self.scale * (towards - away)
