"""A model in training under DeepSpeed ZeRO, with its averages: the only importer of deepspeed.

Under ZeRO each rank holds flat float32 partitions of the weights (the masters) and of the optimizer's moments; our averages
lie beside them, cut alike. What DeepSpeed's own checkpoints do not allow, to go on with another number of ranks or another
ZeRO stage, follows from one idea: DeepSpeed gives and takes the masters as whole tensors by name at every stage, so
whatever is cut like the masters is saved and loaded through their place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm.errors import CheckpointError, ConfigError, StorageError, on_one_line
from lfm.training.ema import Ema, temporarily_set
from lfm.training.step_guard import StepGuard
from lfm.world import World

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
BYTES_PER_PARAMETER = 12  # masters and moments, over all ranks; 4 more for each average


def start_processes(world: World, store: Any = None) -> Any:
    """Import deepspeed and make its process group; return the module.

    Args:
        world: this rank's place.
        store: the store that the ranks share already; by default they meet by MASTER_ADDR and MASTER_PORT.
    """
    logging.getLogger("xformers").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # The deprecated calls are DeepSpeed's, not ours.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # Its shared-memory collectives would be compiled for 50 s, and leak 69 MB of shared memory per rank and run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not torch.distributed.is_initialized():
        if world.size == 1:  # neither a launcher nor a port is needed
            store = torch.distributed.HashStore()
        if store is not None:
            torch.distributed.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
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
        averages: the names of the averages to keep.
        guard: which steps are left out, on all ranks alike.
        store: the store of `lfm.training.ranks.Ranks`, over which the ranks meet.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: dict[str, Any],
        world: World,
        averages: Sequence[str] = (),
        guard: StepGuard | None = None,
        store: Any = None,
    ) -> None:
        deepspeed = start_processes(world, store)
        self.world, self.guard = world, guard or StepGuard()
        try:
            self.engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        except (ValueError, TypeError, AssertionError, KeyError, ImportError) as error:
            raise ConfigError(f"deepspeed: refuses the configuration: {on_one_line(error)}") from error
        self.device = self.engine.device
        self.stage = self.engine.zero_optimization_stage()
        zero = self.engine.optimizer
        self.masters: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        self.averages = {name: Ema(self.masters) for name in averages}
        # The norm of the whole gradient is known by then. Torch's fused optimizers leave a step out where this is 1.
        zero.optimizer.register_step_pre_hook(self._drop_bad_step)

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward pass."""
        return self.engine(*inputs)

    def backward_and_step(self, loss: Tensor) -> None:
        """One micro-batch's backward pass; DeepSpeed steps after the last one of the global batch.

        A step that the guard refuses changes neither weights nor moments, on any rank.
        """
        self.engine.backward(loss)
        steps = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        if steps:
            self.guard.count(self.gradient_norm)

    def _drop_bad_step(self, optimizer: Any, *_: Any) -> None:
        norm = float(self.engine.optimizer._global_grad_norm)
        optimizer.found_inf = torch.tensor(float(self.guard.refuses(norm)), device=self.masters[0].device)

    @property
    def dtype(self) -> torch.dtype:
        """Which the model computes with."""
        return torch.bfloat16 if self.engine.bfloat16_enabled() else torch.float32

    @property
    def gradient_norm(self) -> float:
        """Of the last step, over all ranks, before clipping; infinite where it is not finite."""
        norm = self.engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    def set_learning_rate(self, learning_rate: float) -> None:
        """For the steps to come."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on every rank."""
        torch.distributed.all_reduce(value)
        return value

    def write_monitors(self, figures: dict[str, float], samples_seen: int) -> None:
        """Hand figures to the monitors (TensorBoard, W&B, CSV) of DeepSpeed's configuration."""
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events([(name, value, samples_seen) for name, value in figures.items()])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        torch.distributed.barrier()

    def close(self) -> None:
        """Leave together: without this, one of twenty runs dies at exit."""
        self.barrier()
        torch.distributed.destroy_process_group()

    @contextlib.contextmanager
    def averaged(self, name: str) -> Iterator[None]:
        """Within the block the model computes with an average's weights, in eval mode. All ranks must enter it."""
        training = self.engine.training
        self.engine.eval()
        with torch.no_grad(), self.averages[name].in_place():
            self._publish_masters()
            yield
        self._publish_masters()
        self.engine.train(training)

    def full(self, shares: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's whole tensor, float32, of what is cut like the masters. All ranks must go through it."""
        from deepspeed.utils import safe_get_full_fp32_param

        with temporarily_set(self.masters, shares):
            for name, parameter in self.engine.module.named_parameters():
                yield name, safe_get_full_fp32_param(parameter)

    def average_weights(self, name: str) -> dict[str, Tensor]:
        """An average of every parameter in float32, on the CPU of the main rank; empty elsewhere. All must call it."""
        shares = self.averages[name].average
        return {key: full.cpu().clone() for key, full in self.full(shares) if self.world.is_main}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Begin with these weights, whole tensors by name; the averages begin there too."""
        self._set_full(self.masters, weights)
        self._publish_masters()
        for average in self.averages.values():
            average.restart()

    def save(self, folder: Path) -> dict[str, Any]:
        """Write all that training goes on from into `folder`; all ranks must call it.

        Each rank writes its part of the parameters, as whole tensors: any number of ranks at any stage can read them. The
        files are complete when it returns, with the few numbers that belong to them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        rank, size = self.world.rank, self.world.size
        for kind, shares in self._carried().items():
            own = {
                name: whole.cpu().clone()
                for number, (name, whole) in enumerate(self.full(shares))
                if number % size == rank
            }
            try:
                save_file(own, folder / f"{kind}-{rank:05d}.safetensors")
            except (SafetensorError, OSError) as error:
                raise StorageError(
                    f"{folder}: cannot be written ({on_one_line(error)}); is there no space left?"
                ) from error
        self.barrier()
        return {"adam_steps": self._adam_steps, "guard": asdict(self.guard)}

    def load(self, folder: Path, numbers: dict[str, Any], samples_seen: int) -> None:
        """Go on from what `save` wrote and returned, under any number of ranks and any ZeRO stage.

        Raises:
            CheckpointError: it is of another model, or cannot be read.
        """
        optimizer = self.engine.optimizer.optimizer
        for master in self.masters:
            step = torch.tensor(float(numbers["adam_steps"]), device=master.device)
            moments = {kind: torch.zeros_like(master) for kind in MOMENTS}
            optimizer.state[master] = {"step": step, **moments}
        # Whatever goes through the masters' place before they are there themselves.
        for kind, shares in sorted(self._carried().items(), key=lambda item: item[0] == MASTER):
            self._set_full(shares, _read(folder, kind))
        self._publish_masters()
        self.guard = StepGuard(**numbers["guard"] | {"ratio": self.guard.ratio})
        self.engine.global_samples = samples_seen  # what DeepSpeed's monitors count by

    def _carried(self) -> dict[str, list[Tensor]]:
        """What is carried from step to step, by kind; each is cut like the masters."""
        state = self.engine.optimizer.optimizer.state
        moments = {kind: [state[master][kind] for master in self.masters] for kind in MOMENTS}
        averages = {name: average.average for name, average in self.averages.items()}
        return {MASTER: self.masters, **moments, **averages}

    @property
    def has_learned(self) -> bool:
        """Whether a step was taken, and not left out, since the start: before, there is nothing to save."""
        return MOMENTS[0] in self.engine.optimizer.optimizer.state.get(self.masters[0], {})

    @property
    def _adam_steps(self) -> int:
        return int(self.engine.optimizer.optimizer.state[self.masters[0]]["step"])

    @torch.no_grad()
    def _set_full(self, shares: list[Tensor], weights: dict[str, Tensor]) -> None:
        """Cut whole tensors by name into `shares`, by way of the masters, which then hold them too."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self.engine.module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if name not in weights or weights[name].shape != shape:
                raise CheckpointError(f"{name}: of another model: the weights have none, or one of another shape")
            whole = weights[name].float().to(self.device)
            if self.stage == 3:  # where DeepSpeed cannot set a whole tensor that does not divide by the ranks
                length = parameter.partition_numel()
                padded = nn.functional.pad(whole.flatten(), (0, length * self.world.size - whole.numel()))
                safe_set_local_fp32_param(parameter, padded[self.world.rank * length :][:length])
            else:
                safe_set_full_fp32_param(parameter, whole)
        torch._foreach_copy_(shares, self.masters)

    @torch.no_grad()
    def _publish_masters(self) -> None:
        """Make the masters what the model computes with, in its own precision, as DeepSpeed does after a step."""
        zero = self.engine.optimizer
        if self.stage == 3:
            zero._partition_all_parameters()
            for group in range(len(self.masters)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        else:
            from deepspeed.runtime.utils import all_gather_dp_groups

            for partitions, master in zip(zero.parallel_partitioned_bit16_groups, self.masters, strict=True):
                partitions[self.world.rank].copy_(master)
            all_gather_dp_groups(
                groups_flat=zero.bit16_groups_flat,
                partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
                dp_process_group=zero.real_dp_process_group,
                start_alignment_factor=zero.nccl_start_alignment_factor,
                allgather_bucket_size=zero.allgather_bucket_size,
            )


def _read(folder: Path, kind: str) -> dict[str, Tensor]:
    """Whole tensors by name, from however many ranks wrote them; mapped, so that only what is used is read."""
    tensors: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob(f"{kind}-[0-9]*.safetensors")):
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder}: cannot be read ({on_one_line(error)}); go on from the one before it"
        ) from error
    if not tensors:
        raise CheckpointError(f"{folder}: holds no {kind}; begin another run with --initialize-from")
    return tensors
