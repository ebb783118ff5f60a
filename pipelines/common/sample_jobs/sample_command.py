"""The `lfm sample` command to print as the next one, with the conditions that a model needs."""

from __future__ import annotations

from lfm.weights_file import WeightsHeader

MASKS_AND_MAPS = " --shards RAW_SHARDS"


def sample_command(weights: str, header: WeightsHeader, out: str = "DIR") -> str:
    """Return the command that samples with weights; words in capitals stand for what the user must name.

    Masks and maps come from raw shards: latents lack the known pixels that inpainting puts back.
    """
    needs_shards = bool(header.model.condition_channels or header.model.num_labels)
    return f"lfm sample {weights} --out {out}{MASKS_AND_MAPS if needs_shards else ''}"
