"""Velocity networks: the registry of backbones, their configurations, and the layers that they share."""
