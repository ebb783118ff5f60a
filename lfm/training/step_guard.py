"""Which optimizer steps are skipped because they would ruin the weights.

    a step is taken if    norm <= ratio * mean        mean: running mean of the norms of taken steps, over about 100

The norm is that of the whole gradient before clipping. It is the same on every rank, so all ranks decide alike. The decision
is made on the device that computes the norm, so that the host need not wait for it in every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MEMORY = 100  # steps
MOST_SKIPPED_IN_A_ROW = 5  # more mean that training has diverged


class StepGuard:
    """Refuses steps whose gradient norm is not finite or far above the running mean.

    After `MOST_SKIPPED_IN_A_ROW` refusals in a row training has diverged, and every further step is refused. Reading a
    property waits for the device.

    Args:
        ratio: largest norm in multiples of the running mean; 0 accepts every finite norm.
    """

    def __init__(self, ratio: float = 0.0) -> None:
        self.ratio = ratio
        self._state = torch.zeros(4, dtype=torch.float64)  # mean, accepted, skipped, skipped in a row

    def refuse(self, norm: Tensor) -> Tensor:
        """Decide on a step and record it.

        Args:
            norm: norm of its gradient, a scalar; the first 100 accepted ones may have any finite value.

        Returns:
            1 to skip the step, else 0: a float32 scalar on the device of `norm`.
        """
        norm = norm.double()
        mean, num_accepted, num_skipped, in_a_row = self._state.to(norm.device).unbind()
        limit = self.ratio * mean
        refused = (~norm.isfinite()) | (in_a_row > MOST_SKIPPED_IN_A_ROW)
        refused = refused | ((num_accepted >= MEMORY) & (limit > 0) & (norm > limit))
        count = refused.double()
        moved = mean + (norm - mean) / (num_accepted + 1).clamp(max=MEMORY)
        self._state = torch.stack(
            [
                torch.where(refused, mean, moved),
                num_accepted + (1 - count),
                num_skipped + count,
                (in_a_row + 1) * count,
            ]
        )
        return refused.float()

    @property
    def mean(self) -> float:
        """Running mean of the norms of accepted steps."""
        return float(self._state[0])

    @property
    def num_accepted(self) -> int:
        """Number of accepted steps."""
        return int(self._state[1])

    @property
    def num_skipped(self) -> int:
        """Number of skipped steps."""
        return int(self._state[2])

    @property
    def skipped_in_a_row(self) -> Tensor:
        """Number of steps skipped since the last accepted one, float64 scalar on the device."""
        return self._state[3]

    @property
    def num_skipped_in_a_row(self) -> int:
        """Number of steps skipped since the last accepted one."""
        return int(self._state[3])

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
        values = [state[name] for name in ("mean", "taken", "skipped", "in_a_row")]
        self._state = torch.tensor(values, dtype=torch.float64)
