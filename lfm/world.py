"""The processes that work together, and this one's place among them: a value that is passed in, never detected here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size` processes; `local_rank` counts on this machine and names its device."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes what must be written once."""
        return self.rank == 0

    def slice_of(self, total: int) -> slice:
        """This rank's contiguous part of `total` things: parts differ by one at most and cover each thing once."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)
