"""The probability path, times, coupling, guidance and likelihood of flow matching."""
