"""Exponential moving averages of a model's weights, in float32.

    average <- decay * average + (1 - decay) * weights,   after each step

Constant decay d, or the power function of Karras et al. 2023 (EDM2), whose width is a share of the training so far:

    decay at t = (1 - dt / t)^(g + 1)         Eq. 122; so the average is the integral over [0, t] of
    p_t,g(x)   = (g + 1) x^g / t^(g + 1)      Eq. 121, times the weights at x
    width^2    = (g + 1) / ((g + 2)^2 (g + 3))    Eq. 123, relative to t; sigma_rel there

t, dt in samples. An average of any other width is made afterwards as the combination of stored ones whose profile is
nearest to the wanted one in the least-squares sense (their Algorithm 3); it needs the inner products

    <p_t,g , p_u,h> = (g + 1)(h + 1) / (g + h + 1) * (m / t)^g (m / u)^h / max(t, u),     m = min(t, u)

An average is kept beside whatever flat float32 tensors the optimizer updates. Under ZeRO these are each rank's partitions
of the masters, so it is sharded as they are: 4 bytes per parameter over all ranks, and no communication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def decay_after(num_steps: int, decay: float) -> float:
    """The decay of step `num_steps` (from 1): it rises to `decay`, so that the initial weights are soon forgotten."""
    return min(decay, num_steps / (10 + num_steps))


def power_decay_after(num_steps: int, width: float) -> float:
    """The decay of step `num_steps` (from 1) of the power function of this width: 0 at first, then ever nearer to 1."""
    return (1 - 1 / num_steps) ** (exponent(width) + 1)


def exponent(width: float) -> float:
    """g of a relative width, which must lie between 0 and 0.28: the largest root of Eq. 123."""
    assert 0 < width < 12**-0.5, f"width {width}"
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def combination(times: Sequence[float], widths: Sequence[float], time: float, width: float) -> tuple[np.ndarray, float]:
    """How to make the average of `width` at `time` from those of `widths` at `times`.

    Returns:
        The factor of each, float64 (len(times),), and the distance of the profile that they make from the wanted one,
        as a share of the latter's norm.
    """
    t, g = np.asarray(times, np.float64), np.array([exponent(each) for each in widths])
    among = _inner(t[:, None], g[:, None], t, g)
    towards = _inner(t, g, time, exponent(width))
    factors = np.linalg.lstsq(among, towards, rcond=None)[0]
    whole = _inner(time, exponent(width), time, exponent(width))
    missed = whole - 2 * factors @ towards + factors @ among @ factors
    return factors, float(np.sqrt(max(missed, 0.0) / whole))


def _inner(t: np.ndarray | float, g: np.ndarray | float, u: np.ndarray | float, h: np.ndarray | float) -> np.ndarray:
    least = np.minimum(t, u)
    return (g + 1) * (h + 1) / (g + h + 1) * (least / t) ** g * (least / u) ** h / np.maximum(t, u)


class Ema:
    """The average of `masters`, which stay the optimizer's own.

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
        """Set the average to what the masters are now."""
        torch._foreach_copy_(self.average, self._masters)

    def in_place(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the masters hold the average; then they are again, bit for bit, what they were."""
        return temporarily_set(self._masters, self.average)


@contextlib.contextmanager
def temporarily_set(masters: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Within the block `masters` hold `values`; then they are again, bit for bit, what they were."""
    with torch.no_grad():
        before = [master.detach().clone() for master in masters]
        torch._foreach_copy_(masters, values)
        try:
            yield
        finally:
            torch._foreach_copy_(masters, before)
