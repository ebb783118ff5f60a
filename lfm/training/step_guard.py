"""Which optimizer steps are left out: those that would ruin the weights.

    taken while    norm <= ratio * mean        mean, of the norms of the steps taken, over about the last 100

norm, of the whole gradient before clipping: one number, the same on every rank, so that all decide alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 100  # steps


@dataclass
class StepGuard:
    """Which steps are left out: those whose gradient norm is not finite, or many times the usual one.

    Args:
        ratio: a norm more than so many times the running mean of norms is refused; 0 refuses none that is finite.
    """

    ratio: float = 0.0
    mean: float = 0.0  # of the norms of steps that were taken
    taken: int = 0
    skipped: int = 0
    in_a_row: int = 0  # skipped since the last that was taken

    def refuses(self, norm: float) -> bool:
        """Whether a step of this norm is to be left out; the first 100 may be of any finite norm."""
        return not math.isfinite(norm) or (self.taken >= MEMORY and 0 < self.ratio * self.mean < norm)

    def count(self, norm: float) -> None:
        """Take note of a step of this norm, taken or not."""
        if self.refuses(norm):
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        else:
            self.taken, self.in_a_row = self.taken + 1, 0
            self.mean += (norm - self.mean) / min(self.taken, MEMORY)
