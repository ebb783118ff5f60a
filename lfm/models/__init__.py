"""The networks that learn the velocity."""
