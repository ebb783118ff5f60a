"""What all solvers need of a batch whose rows may each be at another time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lfm.errors import LfmError

StepCallback = Callable[
    [Tensor, Tensor, Tensor], None
]  # is told time (A,), state (A, ...) and rows int64 (A,) after a step


def no_callback(time: Tensor, state: Tensor, rows: Tensor) -> None:
    """A watch that looks away."""


def by_row(times: Tensor, noise: Tensor) -> Tensor:
    """A grid of decreasing times (N + 1,) for each row of `noise` (B, ...): float64 (N + 1, B)."""
    assert noise.dtype in (torch.float32, torch.float64), f"noise {noise.dtype}"
    assert times.ndim == 1 and bool((times.diff() < 0).all()), "times must decrease"
    return times.to(noise.device, torch.float64)[:, None].expand(-1, len(noise))


def column(values: Tensor, like: Tensor) -> Tensor:
    """One value for each row (B,), in the shape (B, 1, ...) and, unless bool, the dtype of `like` (B, ...)."""
    values = values.view(-1, *[1] * (like.ndim - 1))
    return values if values.dtype == torch.bool else values.to(like.dtype)


def require_finite(state: Tensor, time: Tensor, rows: Tensor) -> None:
    """Raise LfmError, naming the row, where a step from `time` (B,) led to a `state` (B, ...) that is not finite."""
    broken = ~state.flatten(1).isfinite().all(1)
    if broken.any():
        first = int(broken.nonzero()[0])
        raise LfmError(
            f"row {int(rows[first])} is not finite in the step from time {float(time[first]):.4g}: "
            "the weights are damaged or diverged, look at the loss of the run they come from"
        )
