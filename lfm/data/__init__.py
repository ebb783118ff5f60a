"""Data sets: raw and latent shards, their manifests, transforms of images, and the training stream."""
