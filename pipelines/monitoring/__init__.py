"""Look at a run from outside, while it trains and afterwards."""
