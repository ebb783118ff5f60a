"""A model in training under DeepSpeed ZeRO, with its EMA: the only importer of deepspeed.

What DeepSpeed does not do by itself: the EMA beside its masters, consolidated weights, and checkpoints that are either
complete or not there.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfm.ema import Ema
from lfm.errors import CheckpointError, ConfigError, StorageError
from lfm.world import World


def start_processes(world: World) -> Any:
    """Import deepspeed and begin to communicate; returns the module."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # DeepSpeed's calls into torch, not ours, are what it warns of.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # Its shared-memory collectives would be compiled for 50 s, and leak 69 MB of shared memory per rank and run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if world.size == 1 and not torch.distributed.is_initialized():  # no launcher is needed, and no port
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, rank=world.rank, world_size=world.size, verbose=False
    )
    return deepspeed


class Engine:
    """One rank's share of a model in training.

    Args:
        model: in float32, the same on every rank.
        settings: DeepSpeed's configuration; ZeRO stage 1, 2 or 3.
        world: this rank's place.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any], world: World) -> None:
        deepspeed = start_processes(world)
        self.world = world
        try:
            self.engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        except (ValueError, TypeError, AssertionError, KeyError) as error:
            raise ConfigError(f"deepspeed: refuses the configuration: {_short(error)}") from error
        self.device = self.engine.device
        stage = self.engine.zero_optimization_stage()
        optimizer = self.engine.optimizer
        self.ema = Ema(
            optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        )

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward pass."""
        return self.engine(*inputs)

    def backward_and_step(self, loss: Tensor) -> None:
        """One micro-batch's backward pass; DeepSpeed steps after the last one of the global batch."""
        self.engine.backward(loss)
        self.engine.step()

    @property
    def gradient_norm(self) -> float:
        """Of the last step, over all ranks, before clipping."""
        return float(self.engine.get_global_grad_norm() or 0.0)

    def set_learning_rate(self, learning_rate: float) -> None:
        """For the steps to come."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on every rank."""
        torch.distributed.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait until every rank is here."""
        torch.distributed.barrier()

    def close(self) -> None:
        """Leave together: without this, one of twenty runs dies at exit."""
        self.barrier()
        torch.distributed.destroy_process_group()

    def ema_weights(self) -> dict[str, Tensor]:
        """The EMA of every parameter in float32, on the CPU of the main rank; empty elsewhere. All ranks must call it."""
        with self.ema.in_place():
            weights = {name: full.cpu().clone() for name, full in self._full_masters() if self.world.is_main}
        return weights

    def _full_masters(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.engine.module.named_parameters():
            yield name, safe_get_full_fp32_param(parameter)

    def save(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's files to `folder`/`tag`; all ranks must call it, and the files are complete when it returns."""
        try:
            self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        except RuntimeError as error:  # what torch makes of a write that the disk refuses
            raise StorageError(
                f"{folder / tag}: cannot be written ({_short(error)}); is there no space left?"
            ) from error
        self.barrier()

    def load(self, checkpoint: Path, ema: dict[str, Tensor]) -> None:
        """Go on from a checkpoint of the same number of ranks and the same ZeRO stage.

        Raises:
            CheckpointError: it is of another number of ranks or stage, or cannot be read.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        try:
            # The EMA first: setting the masters may touch the parameters, and loading sets both right.
            for name, parameter in self.engine.module.named_parameters():
                safe_set_full_fp32_param(parameter, ema[name].to(self.device))
            self.ema.restart()
            loaded, _ = self.engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        except Exception as error:  # DeepSpeed and pickle raise anything
            raise CheckpointError(f"{checkpoint}: DeepSpeed cannot go on from it: {_short(error)}") from error
        if loaded is None:
            raise CheckpointError(
                f"{checkpoint}: DeepSpeed finds nothing there; remove that folder to go on from the one before"
            )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
