"""Exponential moving averages of a model's weights, in float32.

    average <- decay * average + (1 - decay) * weights,   after each step

The decay is constant, or that of the power function of Karras et al. 2023 (EDM2), whose width grows with the training time:

    decay at t = (1 - dt / t)^(g + 1)             Eq. 122; the average is the integral over [0, t] of
    p_t,g(x)   = (g + 1) x^g / t^(g + 1)          Eq. 121, times the weights at x
    width^2    = (g + 1) / ((g + 2)^2 (g + 3))    Eq. 123, relative to t; sigma_rel in the paper

t, dt in samples. An average of another width is computed afterwards, as the combination of stored averages whose profile is
closest to the target profile in the least-squares sense (Algorithm 3). It needs the inner products

    <p_t,g , p_u,h> = (g + 1)(h + 1) / (g + h + 1) * (m / t)^g (m / u)^h / max(t, u),     m = min(t, u)

An average has the layout of the flat float32 tensors that the optimizer updates. Under ZeRO these are each rank's
partitions of the masters, so the averages are partitioned, too: 4 bytes per parameter over all ranks, no communication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def decay_after(num_steps: int, decay: float) -> float:
    """Return the decay of step `num_steps` (from 1); it rises to `decay`, so that the initial weights are soon forgotten."""
    return min(decay, num_steps / (10 + num_steps))


def power_decay_after(num_steps: int, width: float) -> float:
    """Return the decay of step `num_steps` (from 1) for a power function of relative width `width`; rises from 0 to 1."""
    return (1 - 1 / num_steps) ** (exponent(width) + 1)


def exponent(width: float) -> float:
    """Return g for a relative width between 0 and 0.28: the largest root of Eq. 123."""
    assert 0 < width < 12**-0.5, f"width {width}"
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def combination(times: Sequence[float], widths: Sequence[float], time: float, width: float) -> tuple[np.ndarray, float]:
    """Fit the average of `width` at `time` by a combination of the averages of `widths` at `times`.

    Returns:
        The factor of each average, float64 (len(times),); and the distance between fitted and target profile, relative to
        the norm of the target profile.
    """
    t, g = np.asarray(times, np.float64), np.array([exponent(each) for each in widths])
    products = _inner(t[:, None], g[:, None], t, g)
    target_products = _inner(t, g, time, exponent(width))
    factors = np.linalg.lstsq(products, target_products, rcond=None)[0]
    target_norm = _inner(time, exponent(width), time, exponent(width))  # squared, as is the error
    error = target_norm - 2 * factors @ target_products + factors @ products @ factors
    return factors, float(np.sqrt(max(error, 0.0) / target_norm))


def _inner(t: np.ndarray | float, g: np.ndarray | float, u: np.ndarray | float, h: np.ndarray | float) -> np.ndarray:
    m = np.minimum(t, u)
    return (g + 1) * (h + 1) / (g + h + 1) * (m / t) ** g * (m / u) ** h / np.maximum(t, u)


class Ema:
    """An average of tensors that an optimizer updates.

    Args:
        masters: float32 tensors that the optimizer updates in place.
    """

    def __init__(self, masters: Sequence[Tensor]) -> None:
        self._masters = list(masters)
        self.average = [master.detach().clone() for master in self._masters]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the masters by 1 - decay."""
        torch._foreach_lerp_(self.average, self._masters, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to the present masters."""
        torch._foreach_copy_(self.average, self._masters)

    def in_place(self) -> contextlib.AbstractContextManager[None]:
        """Set the masters to the average within the block, and restore them bit for bit."""
        return temporarily_set(self._masters, self.average)


@contextlib.contextmanager
def temporarily_set(masters: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Set `masters` to `values` within the block, and restore them bit for bit."""
    with torch.no_grad():
        before = [master.detach().clone() for master in masters]
        torch._foreach_copy_(masters, values)
        try:
            yield
        finally:
            torch._foreach_copy_(masters, before)
