"""What launchers say of a process in its environment: torchrun, the deepspeed launcher and Slurm's srun."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lfm.errors import ConfigError
from lfm.world import World

TORCHRUN = {"rank": "RANK", "local_rank": "LOCAL_RANK", "size": "WORLD_SIZE"}
SLURM = {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID", "size": "SLURM_NTASKS"}


def world() -> World:
    """Return this process's rank, local rank and world size; a world of one process without a launcher.

    The variables of torchrun (also set by deepspeed) take precedence over those of Slurm.

    Raises:
        ConfigError: a variable is not a number, or the variables contradict each other.
    """
    names = _names(os.environ)
    texts = {key: os.environ.get(name, "1" if key == "size" else "0") for key, name in names.items()}
    for key, text in texts.items():
        if not text.isdecimal():
            raise ConfigError(f"{names[key]} {text}: must be a number; unset it, or use a launcher")
    place = World(**{key: int(text) for key, text in texts.items()})
    if place.rank >= place.size:
        raise ConfigError(
            f"{names['rank']} {place.rank}, {names['size']} {place.size}: contradict each other; "
            "unset them, or use a launcher"
        )
    return place


def is_launched() -> bool:
    """Return whether a launcher has started this process as one of several, or torchrun as the only one."""
    return "WORLD_SIZE" in os.environ or world().size > 1


def _names(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to read. In a batch script Slurm sets its own too, but only srun starts several processes."""
    if any(name in environment for name in TORCHRUN.values()) or "SLURM_PROCID" not in environment:
        return TORCHRUN
    in_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    return TORCHRUN if in_batch_script else SLURM
