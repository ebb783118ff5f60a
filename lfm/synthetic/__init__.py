"""Synthetic data sets, drawn by code."""
