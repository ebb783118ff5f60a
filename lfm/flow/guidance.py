"""Velocity fields of networks, which count their evaluations, and guidance of such fields.

    v = v_weak + s (v_cond - v_weak)          on all channels, where time is in the interval

v_cond is the velocity under the condition and s the guidance scale; s = 1 means no guidance. v_weak is the velocity of the
same network under the null condition (classifier-free guidance, Ho & Salimans 2022, with s = 1 + w), or that of a smaller
or earlier network under the same condition (autoguidance, Karras et al. 2024), or that of the same network with token
dropout as in training (sparse guidance), or the second velocity that the network computes
from its early blocks (internal guidance, arXiv 2512.24176). An interval in the middle of the times costs less and keeps
variety (Kynkaanniemi et al. 2024).

NFE, the number of function evaluations, counts the evaluations of a network for each image: a guided one counts twice,
except for internal guidance, whose two velocities are of one evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lfm.types import Condition, Velocity

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""Velocity (B, C, h, w) at state (B, C, h, w), time (B,) and the condition of B images."""


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance."""

    scale: float = 1.0
    """Guidance scale; 1 means none."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance applies."""
    weak: Network | None = None
    """Weaker network, for autoguidance or sparse guidance; None for classifier-free or internal guidance."""
    internal: bool = False
    """Guide away from the velocity of the network's own early blocks."""


class CountedVelocity(Velocity, Protocol):
    """A velocity field that counts its evaluations."""

    @property
    def nfe(self) -> Tensor:
        """Network evaluations so far, int64 (B,), for each row of the batch."""


class NetworkVelocity:
    """The velocity field of a network under the conditions of one batch, without gradients.

    Args:
        network: the network.
        condition: of the B images of the batch.
        count: B.
        fill_to: number of rows of each evaluation of the network: where the solver asks for fewer, the last one is repeated
            and the surplus results are discarded. None to evaluate just the rows that the solver asks for.
    """

    def __init__(self, network: Network, condition: Condition, count: int, fill_to: int | None = None) -> None:
        self.network, self.condition, self.fill_to = network, condition, fill_to
        self.nfe = torch.zeros(count, dtype=torch.int64)

    @torch.no_grad()
    def __call__(self, state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        self.nfe = self.nfe.to(rows.device)
        self.nfe[rows] += 1
        state, time, filled_rows = (fill_up(values, self.fill_to) for values in (state, time, rows))
        return self.network(state, time, self.condition.rows(filled_rows))[: len(rows)]


class InternallyGuided:
    """A network's velocity, extrapolated from that of its early blocks while time is in `interval`.

    Args:
        network: called with `internal=True`; see `lfm.models.network.VelocityNetwork`.
        guidance: scale and interval.
    """

    def __init__(self, network: Callable[..., Tensor], guidance: Guidance) -> None:
        self.network, self.guidance = network, guidance

    def __call__(self, state: Tensor, time: Tensor, condition: Condition) -> Tensor:
        final, early = self.network(state, time, condition, internal=True)  # two of (B, C, h, w)
        low, high = _open_ends(self.guidance.interval)
        inside = (time >= low) & (time <= high)  # (B,)
        guided = early + self.guidance.scale * (final - early)
        return torch.where(inside[:, None, None, None], guided, final)


def _open_ends(interval: tuple[float, float]) -> tuple[float, float]:
    """Return an interval that is open where it ends at 0 or 1, since the last step of torchdiffeq goes beyond 0."""
    low, high = interval
    return low if low > 0 else -math.inf, high if high < 1 else math.inf


def fill_up(values: Tensor, size: int | None) -> Tensor:
    """Repeat the last row of `values` (B, ...) until there are `size` rows; None leaves them as they are."""
    missing = (size or 0) - len(values)
    return values if missing <= 0 else torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])


class AtNullClass:
    """A network at its null class, as a weaker model for one of other classes (domain guidance).

    Args:
        network: the weaker network.
        num_classes: its number of classes, which stands for the null class; None if it has none.
    """

    def __init__(self, network: Network, num_classes: int | None) -> None:
        self.network, self.num_classes = network, num_classes

    def __call__(self, state: Tensor, time: Tensor, condition: Condition) -> Tensor:
        index = None
        if self.num_classes is not None:
            index = torch.full((len(state),), self.num_classes, dtype=torch.int64, device=state.device)
        return self.network(state, time, replace(condition, class_index=index))


class GuidedVelocity:
    """Guidance: extrapolate from `weak` through `velocity` while time is in `interval`.

    At scale 1, and outside of the interval, `weak` is not evaluated.
    """

    def __init__(
        self,
        velocity: CountedVelocity,
        weak: CountedVelocity,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.velocity, self.weak, self.scale = velocity, weak, scale
        self.interval = _open_ends(interval)

    @property
    def nfe(self) -> Tensor:
        """Network evaluations of both fields, int64 (B,)."""
        return self.velocity.nfe + self.weak.nfe.to(self.velocity.nfe.device)

    def __call__(self, state: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        conditional = self.velocity(state, time, rows)  # (A, C, h, w)
        inside = (time >= self.interval[0]) & (time <= self.interval[1])  # (A,)
        if self.scale == 1 or not inside.any():
            return conditional
        weak = self.weak(state[inside], time[inside], rows[inside])  # (I, C, h, w)
        return conditional.index_put((inside,), weak + self.scale * (conditional[inside] - weak))
