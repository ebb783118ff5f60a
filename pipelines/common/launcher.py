"""The processes of a training: how stages start them, and what launchers say of a process in its environment.

The launchers are torchrun, the deepspeed launcher and Slurm's srun.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lfm.errors import ConfigError
from lfm.world import World
from pipelines.common.experiment.shipped_experiments import LAUNCH_FILE

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


def training_command(
    config: str,
    overrides: Sequence[str],
    num_ranks: int | None,
    *,
    arguments: Sequence[str] = (),
    deepspeed_options: Sequence[str] = (),
) -> list[str]:
    """Return the command that trains an experiment.

    Args:
        config: YAML file.
        overrides: KEY=VALUE for `--set`.
        num_ranks: number of processes that the deepspeed launcher starts on this machine; None for one process without it.
        arguments: other arguments of the launch file.
        deepspeed_options: options of the deepspeed launcher, which is used if there are any.

    Raises:
        ConfigError: the launch file does not exist.
    """
    if not LAUNCH_FILE.exists():
        raise ConfigError(f"{LAUNCH_FILE}: no such file; install lfm again")
    program = [sys.executable]
    if num_ranks is not None or deepspeed_options:
        program = [str(Path(sys.executable).parent / "deepspeed")]
        program += ["--num_gpus", str(num_ranks)] if num_ranks is not None else []
        # Options of the user may name other machines, on which a free port of this one means nothing.
        program += deepspeed_options or ["--master_port", str(_free_port()), "--log_level", "error"]
    settings = [argument for override in overrides for argument in ("--set", override)]
    return [*program, str(LAUNCH_FILE), "--config", config, *settings, *arguments]


def environment(num_processes: int) -> dict[str, str]:
    """Return the environment of a stage that this process starts with `num_processes` processes on this machine.

    Each of them uses its part of the cores, and idle threads sleep instead of spinning.
    """
    import torch

    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu",
        **os.environ,
    }


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
