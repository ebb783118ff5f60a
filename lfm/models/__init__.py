"""Backbones, and the layers they share."""
