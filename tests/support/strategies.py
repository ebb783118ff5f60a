"""Hypothesis strategies that several tests draw from."""

from __future__ import annotations

from hypothesis import strategies as st

SEEDS = st.integers(0, 2**63 - 1)
NUMBERS = st.lists(st.integers(0, 2**62), min_size=1, max_size=8)  # of samples in the global order
