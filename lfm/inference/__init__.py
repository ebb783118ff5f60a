"""The trained model as an object, and its condition inputs."""
