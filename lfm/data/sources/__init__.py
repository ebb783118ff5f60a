"""Image collections as people have them, one module for each family of layouts."""
