"""Conversion of published checkpoints to lfm weights, and of lfm weights to diffusers. Both are formats of the DiT."""
