"""Helpers for solvers of a batch whose rows may be at different times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lfm.errors import LfmError

StepCallback = Callable[[Tensor, Tensor, Tensor], None]
"""Called after each step with time (A,), state (A, ...) and the numbers of these rows in the batch, int64 (A,)."""


def no_callback(time: Tensor, state: Tensor, rows: Tensor) -> None:
    """No-op step callback."""


def by_row(times: Tensor, noise: Tensor) -> Tensor:
    """Repeat a grid of decreasing times (N + 1,) for each row of `noise` (B, ...): float64 (N + 1, B)."""
    assert noise.dtype in (torch.float32, torch.float64), f"noise {noise.dtype}"
    assert times.ndim == 1 and bool((times.diff() < 0).all()), "times must decrease"
    return times.to(noise.device, torch.float64)[:, None].expand(-1, len(noise))


def column(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one value per row (B,) to (B, 1, ...), in the dtype of `like` (B, ...) unless the values are bool."""
    values = values.view(-1, *[1] * (like.ndim - 1))
    return values if values.dtype == torch.bool else values.to(like.dtype)


def require_finite(state: Tensor, time: Tensor, rows: Tensor) -> None:
    """Raise LfmError, naming the row, if a step from `time` (B,) led to a `state` (B, ...) that is not finite."""
    broken = ~state.flatten(1).isfinite().all(1)
    if broken.any():
        first = int(broken.nonzero()[0])
        raise LfmError(
            f"row {int(rows[first])} is not finite in the step from time {float(time[first]):.4g}: "
            "the weights are damaged or diverged; check the loss of their training"
        )
