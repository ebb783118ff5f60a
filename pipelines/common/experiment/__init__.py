"""An experiment: the schema of its YAML file, its reader, and the checks of keys that contradict each other."""
