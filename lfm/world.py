"""The rank of this process and the number of processes: a value that is passed in, never read from the environment here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size` processes; `local_rank` counts those of this machine and selects the device."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files that must be written once."""
        return self.rank == 0

    def gpu_index(self, num_visible: int) -> int:
        """Return the number of this process's GPU among those that it sees: Slurm may show it its own only, as number 0."""
        return 0 if num_visible == 1 else self.local_rank

    def slice_of(self, total: int) -> slice:
        """Return this rank's contiguous part of `total` items; parts cover each item once and differ by one at most."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)
