"""The exponential moving average of a model's weights, in float32.

    average <- decay * average + (1 - decay) * weights,   after each step

It is kept beside whatever flat float32 tensors the optimizer updates. Under ZeRO these are each rank's partitions of the
masters, so the average is sharded as they are: 4 bytes per parameter over all ranks, and no communication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def decay_after(num_steps: int, decay: float) -> float:
    """The decay of step `num_steps` (from 1): it rises to `decay`, so that the initial weights are soon forgotten."""
    return min(decay, num_steps / (10 + num_steps))


class Ema:
    """The average of `masters`, which stay the optimizer's own.

    Args:
        masters: float32 tensors that the optimizer updates in place.
    """

    def __init__(self, masters: Sequence[Tensor]) -> None:
        self._masters = list(masters)
        self._average = [master.detach().clone() for master in self._masters]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the masters by 1 - decay."""
        torch._foreach_lerp_(self._average, self._masters, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to what the masters are now."""
        torch._foreach_copy_(self._average, self._masters)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the masters hold the average; then they are again, bit for bit, what they were."""
        with torch.no_grad():
            before = [master.detach().clone() for master in self._masters]
            torch._foreach_copy_(self._masters, self._average)
            try:
                yield
            finally:
                torch._foreach_copy_(self._masters, before)
