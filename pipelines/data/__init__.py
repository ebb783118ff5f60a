"""Stages that make and inspect data."""
