"""The trained model as an object, its precision and its condition inputs."""
