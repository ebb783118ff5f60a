"""Measures of images against references."""
