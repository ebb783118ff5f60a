"""The training input: latent batches in an order that is a function of seed and sample number."""
