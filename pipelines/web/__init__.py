"""The web page that makes images with trained models."""
