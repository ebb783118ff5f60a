"""From pictures to shards to batches."""
