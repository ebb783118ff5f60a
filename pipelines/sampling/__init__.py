"""The sampling stage."""
