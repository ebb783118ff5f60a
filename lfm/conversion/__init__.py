"""Published checkpoints to lfm weights, and lfm weights to other formats."""
