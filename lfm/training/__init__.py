"""Training under DeepSpeed ZeRO: engine, averages, run folder."""
