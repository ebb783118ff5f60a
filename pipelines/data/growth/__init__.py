"""Data sets that grow and lose samples: what `lfm shard` and `lfm encode` add, and what `lfm data drop` withdraws."""
