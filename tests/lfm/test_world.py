"""Every thing belongs to exactly one rank."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lfm.world import World


@given(size=st.integers(1, 64), total=st.integers(0, 10**12))
def test_the_parts_cover_each_thing_once_and_differ_by_one_at_most(size: int, total: int) -> None:
    parts = [World(rank, 0, size).slice_of(total) for rank in range(size)]
    assert parts[0].start == 0 and parts[-1].stop == total
    assert all(before.stop == after.start for before, after in pairwise(parts))
    lengths = {part.stop - part.start for part in parts}
    assert max(lengths) - min(lengths) <= 1 and min(lengths) >= 0


def test_one_rank_is_the_main_one_and_alone_by_default() -> None:
    assert [World(rank, rank, 4).is_main for rank in range(4)] == [True, False, False, False]
    assert World() == World(0, 0, 1)


def test_a_process_that_sees_one_gpu_uses_it() -> None:
    assert [World(rank, rank, 4).gpu_index(4) for rank in range(4)] == [0, 1, 2, 3]
    assert [World(rank, rank, 4).gpu_index(1) for rank in range(4)] == [0, 0, 0, 0]
