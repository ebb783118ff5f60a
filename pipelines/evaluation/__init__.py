"""Stages that measure images and models."""
