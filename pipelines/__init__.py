"""The stages of lfm, each with one public `run(config) -> result`, and the command line over them."""
