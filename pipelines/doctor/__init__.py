"""The check of an installation and its machine."""
