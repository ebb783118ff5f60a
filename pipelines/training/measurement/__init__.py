"""What is measured of the EMA weights during training: validation loss, distances, task scores."""
