"""Which optimizer steps are skipped because they would ruin the weights.

    a step is taken if    norm <= ratio * mean        mean: running mean of the norms of taken steps, over about 100

The norm is that of the whole gradient before clipping. It is the same on every rank, so all ranks decide alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MEMORY = 100  # steps


@dataclass
class StepGuard:
    """Refuses steps whose gradient norm is not finite or far above the running mean.

    Args:
        ratio: largest norm in multiples of the running mean; 0 accepts every finite norm.
    """

    ratio: float = 0.0
    mean: float = 0.0  # of the norms of accepted steps
    num_accepted: int = 0
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0  # since the last accepted step

    def refuses(self, norm: float) -> bool:
        """Return whether to skip a step of this norm; the first 100 may have any finite norm."""
        return not math.isfinite(norm) or (self.num_accepted >= MEMORY and 0 < self.ratio * self.mean < norm)

    def count(self, norm: float) -> None:
        """Record the norm of a step, accepted or skipped."""
        if self.refuses(norm):
            self.num_skipped += 1
            self.num_skipped_in_a_row += 1
        else:
            self.num_accepted += 1
            self.num_skipped_in_a_row = 0
            self.mean += (norm - self.mean) / min(self.num_accepted, MEMORY)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "ratio": self.ratio,
            "mean": self.mean,
            "taken": self.num_accepted,
            "skipped": self.num_skipped,
            "in_a_row": self.num_skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`, except for the ratio, which is a setting."""
        self.mean, self.num_accepted = state["mean"], state["taken"]
        self.num_skipped, self.num_skipped_in_a_row = state["skipped"], state["in_a_row"]
