"""Stages that import and export weights."""
