"""A model in training under DeepSpeed ZeRO, with its averages; the only module that imports deepspeed.

Under ZeRO each rank holds flat float32 partitions of the weights (the masters) and of the optimizer's moments; the averages
are partitioned in the same way. Checkpoints can be loaded by another number of ranks and at another ZeRO stage, which
DeepSpeed's own checkpoints do not allow: at every stage DeepSpeed reads and writes the masters as whole tensors by name, so
everything that is partitioned like the masters is saved and loaded by copying it to the masters for a moment.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm.errors import CheckpointError, ConfigError, on_one_line
from lfm.training.ema import Ema, temporarily_set
from lfm.training.muon import STATE, MuonWithAdamW, orthogonal_update
from lfm.training.parameter_groups import parameter_groups
from lfm.training.step_guard import StepGuard
from lfm.world import World

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
BYTES_PER_PARAMETER = 12  # of masters and moments, over all ranks; 4 more for each average


def start_processes(world: World, store: Any = None) -> Any:
    """Import deepspeed, start its process group, and return the module.

    Args:
        world: this process among the ranks.
        store: key-value store that the ranks share; by default they connect by MASTER_ADDR and MASTER_PORT.
    """
    logging.getLogger("xformers").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # The deprecated calls are DeepSpeed's.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # Its shared-memory collectives take 50 s to compile, and leak 69 MB of shared memory per rank and run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, device = "gloo", None
    if torch.cuda.is_available():  # NCCL guesses the device of each rank, with a warning, unless it is named
        backend, device = "nccl", torch.device("cuda", world.gpu_index(torch.cuda.device_count()))
    if not torch.distributed.is_initialized():
        if world.size == 1:  # neither a launcher nor a port is needed
            store = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, device_id=device
        )
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, rank=world.rank, world_size=world.size, verbose=False
    )
    return deepspeed


def _leave_skipping_to_the_guard() -> None:
    """Let DeepSpeed take no gradient norm for invalid, for which it would wait for the device in every step.

    `StepGuard` skips the steps whose norm is not finite, without waiting.
    """
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    stage3.is_invalid_grad_norm = stage_1_and_2.is_invalid_grad_norm = lambda norm: False


class HostBuffers:
    """Host memory for copies of tensors, pinned for those of a GPU, that is kept from one copy to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, key: str, tensor: Tensor) -> Tensor:
        """Copy a tensor to the buffer of `key`, and return it; the copy of a GPU's tensor may still be under way."""
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class StateCopy:
    """The state of training in host memory."""

    parts: dict[str, dict[str, Tensor]]  # this rank's whole tensors by kind and parameter name, for `write_parts`
    weights: dict[str, Tensor]  # an average by parameter name; empty on all ranks but the main one
    numbers: dict[str, Any]  # the rest of the state, for `Engine.load`; JSON can represent it


class Engine:
    """One rank's part of a model in training.

    Args:
        model: float32 model, the same on every rank; parameters without gradients are frozen, and no part of the state.
        settings: DeepSpeed's configuration, with ZeRO stage 1, 2 or 3.
        world: this process among the ranks.
        averages: names of the averages of the weights.
        guard: decides which steps are skipped, on all ranks alike.
        store: store of `lfm.training.ranks.Ranks`, by which the ranks connect.
        fixed: frozen weights that are saved with the averages, since the base of a part has not got them.
        hidden_matrices: names of the matrices that Muon updates, see `VelocityNetwork.hidden_matrices`; AdamW updates all
            other parameters, or all without any names.
        rate_factors: see `parameter_groups`; not with `hidden_matrices`.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: dict[str, Any],
        world: World,
        averages: Sequence[str] = (),
        guard: StepGuard | None = None,
        store: Any = None,
        hidden_matrices: Mapping[str, int] | None = None,
        rate_factors: Mapping[str, float] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.fixed = dict(fixed or {}) if world.is_main else {}
        deepspeed = start_processes(world, store)
        self.world, self.guard = world, guard or StepGuard()
        optimizer: MuonWithAdamW | None = None
        self._num_blocks: dict[nn.Parameter, int] = {}  # of the matrices that Muon updates
        try:
            weight_decay = settings["optimizer"]["params"].get("weight_decay", 0.0)
            groups = parameter_groups(model, weight_decay, hidden_matrices, rate_factors)
            if hidden_matrices:
                options = {**settings["optimizer"]["params"]}
                options.pop("torch_adam", None)  # an option of DeepSpeed
                optimizer = MuonWithAdamW(groups, **options)
                settings = {key: value for key, value in settings.items() if key != "optimizer"}
                settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
                self._num_blocks = {
                    parameter: hidden_matrices[name]
                    for name, parameter in model.named_parameters()
                    if name in hidden_matrices
                }
            self.engine, *_ = deepspeed.initialize(
                model=model, model_parameters=groups, optimizer=optimizer, config=settings
            )
        except (ValueError, TypeError, AssertionError, KeyError, ImportError) as error:
            raise ConfigError(f"deepspeed: refuses the configuration: {on_one_line(error)}") from error
        except Exception as error:
            if type(error).__module__.split(".")[0] != "wandb":  # an extra, whose errors cannot be named here
                raise
            raise ConfigError(
                f"deepspeed: wandb: cannot start: {on_one_line(error)} Set WANDB_MODE=offline to send the run later"
            ) from error
        self.device = self.engine.device
        self.stage = self.engine.zero_optimization_stage()
        zero = self.engine.optimizer
        self.masters: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        self.averages = {name: Ema(self.masters) for name in averages}
        _leave_skipping_to_the_guard()
        zero.get_grad_norm_direct = self._gradient_norm_of_partitions
        self._refused: Tensor | None = None  # the guard's decision on the current step
        if optimizer:
            optimizer.orthogonalize = self._orthogonalized
        # The hook runs when the norm of the whole gradient is known.
        zero.optimizer.register_step_pre_hook(self._drop_bad_step)

    def __call__(self, *inputs: Any) -> Any:
        """Run the model's forward pass."""
        return self.engine(*inputs)

    def backward_and_step(self, loss: Tensor) -> None:
        """Run the backward pass of one micro-batch; after the last one of the global batch, take an optimizer step.

        A step that the guard refuses changes neither weights nor moments, on any rank.
        """
        self.engine.backward(loss)
        is_step = self.engine.is_gradient_accumulation_boundary()
        self._refused = None
        self.engine.step()
        if is_step and self._refused is None:  # DeepSpeed itself left the step out, for a norm that is not finite
            self.guard.refuse(torch.tensor(math.inf))

    def _drop_bad_step(self, optimizer: Any, *_: Any) -> None:
        if self._refused is None:  # stage 3 takes the step in several parts
            norm = torch.as_tensor(self.engine.optimizer._global_grad_norm, device=self.masters[0].device)
            self._refused = self.guard.refuse(norm)
        optimizer.found_inf = self._refused  # torch's fused optimizers skip a step where it is 1

    def _orthogonalized(self, master: Tensor, update: Tensor) -> Tensor:
        """Return the orthogonalized updates of matrices, of which this rank has the partition `update` of one master.

        Each matrix is gathered, and one rank orthogonalizes it for all; all ranks must call it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = next(parameters for each, parameters in self._parameters() if each is master)
        with temporarily_set([master], [update]):
            for number, parameter in enumerate(parameters):
                whole = safe_get_full_fp32_param(parameter)
                owner = number % self.world.size
                if owner == self.world.rank:
                    whole = orthogonal_update(whole, self._num_blocks[parameter])
                torch.distributed.broadcast(whole := whole.contiguous(), owner)
                self._set_parameter(parameter, whole)
            return master.detach().clone()

    def _parameters(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """Return each master with the parameters of whose values it is a partition."""
        zero = self.engine.optimizer
        groups = zero.fp16_groups if self.stage == 3 else zero.bit16_groups
        return list(zip(self.masters, groups, strict=True))

    def _gradient_norm_of_partitions(self, gradients: list[Tensor], *_: Any) -> Tensor:
        """Return the norm over all ranks of this rank's gradients, in one operation in place of two for each tensor.

        Replaces DeepSpeed's `get_grad_norm_direct`, with the same result on the CPU; on a GPU it sums in float32.
        """
        parts = [part for part in gradients if not getattr(part, "_zero_padding", False)]
        dtype = torch.float32 if self.device.type == "cuda" else torch.float64
        square = torch.zeros((), dtype=dtype, device=self.device)
        if parts:
            square = torch.stack(torch._foreach_norm(parts, 2, dtype=dtype)).square().sum()
        if self.stage != 3:
            square = square.float()
        torch.distributed.all_reduce(square)
        return square.sqrt()

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the model computes in."""
        return torch.bfloat16 if self.engine.bfloat16_enabled() else torch.float32

    @property
    def gradient_norm(self) -> float:
        """Norm of the gradient of the last step over all ranks, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_factor", 1.0)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks, and return it; all ranks must call it."""
        torch.distributed.all_reduce(value)
        return value

    def write_monitors(self, figures: dict[str, float], samples_seen: int) -> None:
        """Write figures to the monitors (TensorBoard, W&B, CSV) of DeepSpeed's configuration."""
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events([(name, value, samples_seen) for name, value in figures.items()])

    def write_image(self, name: str, image: np.ndarray, samples_seen: int) -> None:
        """Write an image, uint8 (H, W, 3), to the monitors that show images (TensorBoard and W&B), on the main rank."""
        monitor = self.engine.monitor
        if monitor.tb_monitor:
            writer = monitor.tb_monitor.summary_writer
            writer.add_image(name, image, samples_seen, dataformats="HWC")
            writer.flush()
        if monitor.wandb_monitor:
            import wandb

            monitor.wandb_monitor.log({name: wandb.Image(image)}, step=samples_seen)

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        torch.distributed.barrier()

    def close(self) -> None:
        """Close the monitors, and end the process group on all ranks together; else one of twenty runs crashes at exit."""
        monitor = self.engine.monitor
        if monitor.tb_monitor:
            monitor.tb_monitor.summary_writer.close()
        if monitor.wandb_monitor:
            import wandb

            wandb.finish()
        self.barrier()
        torch.distributed.destroy_process_group()

    @contextlib.contextmanager
    def averaged(self, name: str) -> Iterator[None]:
        """Compute with an average's weights, in eval mode, within the block; all ranks must enter it."""
        training = self.engine.training
        self.engine.eval()
        with torch.no_grad(), self.averages[name].in_place():
            self._publish_masters()
            yield
        self._publish_masters()
        self.engine.train(training)

    def whole_tensors(self, partitions: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and whole float32 tensor of each parameter, of values that are partitioned like the masters.

        All ranks must iterate over all of it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        with temporarily_set(self.masters, partitions):
            for name, parameter in self._trained():
                yield name, safe_get_full_fp32_param(parameter)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that are not frozen, by name."""
        return [pair for pair in self.engine.module.named_parameters() if pair[1].requires_grad]

    def average_weights(self, name: str) -> dict[str, Tensor]:
        """Return an average by parameter name, float32 on the CPU; empty on all ranks but the main one.

        All ranks must call it.
        """
        tensors = self.whole_tensors(self.averages[name].average)
        return self.fixed | {key: whole.cpu().clone() for key, whole in tensors if self.world.is_main}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Set weights and averages to whole tensors by parameter name.

        Raises:
            CheckpointError: the weights are of another model.
        """
        self._set_whole(self.masters, weights)
        self._publish_masters()
        for average in self.averages.values():
            average.restart()

    def copy_state(self, buffers: HostBuffers, average: str) -> StateCopy:
        """Copy the state of training to host memory, so that it can be written while training goes on.

        All ranks must call it. Each rank copies a part of the parameters, as whole tensors, which any number of ranks at any
        ZeRO stage can read; the main rank also copies all of `average`.

        Args:
            buffers: memory of the copies, which are valid until it is used again.
            average: name of the average whose weights are part of the copy.
        """
        rank, size = self.world.rank, self.world.size
        parts: dict[str, dict[str, Tensor]] = {}
        weights: dict[str, Tensor] = {}
        for kind, partitions in self._state().items():
            parts[kind] = {}
            for number, (name, whole) in enumerate(self.whole_tensors(partitions)):
                is_own, is_weight = number % size == rank, kind == average and self.world.is_main
                if not (is_own or is_weight):
                    continue
                copy = buffers.copy(f"{kind}/{name}", whole)
                if is_own:
                    parts[kind][name] = copy
                if is_weight:
                    weights[name] = copy
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        weights |= self.fixed if self.world.is_main else {}
        return StateCopy(parts, weights, {"adam_steps": self._adam_steps, "guard": self.guard.state_dict()})

    def load(self, folder: Path, state: dict[str, Any], samples_seen: int) -> None:
        """Load a state of `copy_state` that `write_parts` wrote, under any number of ranks and any ZeRO stage.

        All ranks must call it.

        Raises:
            CheckpointError: the files are of another model, or cannot be read.
        """
        optimizer = self.engine.optimizer.optimizer
        muon_masters = [master for master, parameters in self._parameters() if parameters[0] in self._num_blocks]
        for master in self.masters:
            step = torch.tensor(float(state["adam_steps"]), device=master.device)
            if any(master is each for each in muon_masters):
                optimizer.state[master] = {STATE: torch.zeros_like(master)}
                continue
            moments = {kind: torch.zeros_like(master) for kind in MOMENTS}
            optimizer.state[master] = {"step": step, **moments}
        # The masters come last, since everything else is copied by way of them.
        for kind, partitions in sorted(self._state().items(), key=lambda item: item[0] == MASTER):
            self._set_whole(partitions, _read(folder, kind))
        self._publish_masters()
        self.guard.load_state_dict(state["guard"])
        self.engine.global_samples = samples_seen  # the clock of DeepSpeed's monitors

    def _state(self) -> dict[str, list[Tensor]]:
        """Return the partitions of masters, moments and averages, by kind; the second moments of Muon's matrices are 0."""
        state = self.engine.optimizer.optimizer.state
        moments = {
            kind: [
                state[master][kind] if kind in state[master] else torch.zeros_like(master) for master in self.masters
            ]
            for kind in MOMENTS
        }
        averages = {name: average.average for name, average in self.averages.items()}
        return {MASTER: self.masters, **moments, **averages}

    @property
    def has_learned(self) -> bool:
        """Whether any step was taken and not skipped; before that there is no optimizer state to save."""
        return self.guard.num_accepted > 0

    @property
    def _adam_steps(self) -> int:
        return int(self.engine.optimizer.optimizer.state[self.masters[0]]["step"])

    @torch.no_grad()
    def _set_whole(self, partitions: list[Tensor], tensors: dict[str, Tensor]) -> None:
        """Set partitions, and the masters with them, to whole tensors by parameter name."""
        for name, parameter in self._trained():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if name not in tensors or tensors[name].shape != shape:
                raise CheckpointError(f"{name}: of another model: the weights have none, or one of another shape")
            self._set_parameter(parameter, tensors[name].float().to(self.device))
        torch._foreach_copy_(partitions, self.masters)

    def _set_parameter(self, parameter: Any, whole: Tensor) -> None:
        """Set this rank's part of the master of a parameter to that of a whole float32 tensor."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.stage == 3:  # DeepSpeed cannot set a whole tensor whose size the ranks do not divide
            length = parameter.partition_numel()
            padded = nn.functional.pad(whole.flatten(), (0, length * self.world.size - whole.numel()))
            safe_set_local_fp32_param(parameter, padded[self.world.rank * length :][:length])
        else:
            safe_set_full_fp32_param(parameter, whole)

    @torch.no_grad()
    def _publish_masters(self) -> None:
        """Copy the masters to the weights that the model computes with, as DeepSpeed does after a step."""
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


def write_parts(folder: Path, rank: int, parts: dict[str, dict[str, Tensor]]) -> list[Path]:
    """Write one rank's part of a state into `folder`, and return the paths of its files.

    Raises:
        SafetensorError, OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{kind}-{rank:05d}.safetensors" for kind in parts}
    for kind, tensors in parts.items():
        save_file(tensors, paths[kind])
    return list(paths.values())


def _read(folder: Path, kind: str) -> dict[str, Tensor]:
    """Return whole tensors by name from the files of all ranks, memory-mapped."""
    tensors: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob(f"{kind}-[0-9]*.safetensors")):
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder}: cannot be read ({on_one_line(error)}); remove it to resume from the checkpoint before it"
        ) from error
    if not tensors:
        raise CheckpointError(
            f"{folder}: has no {kind}, as of a run without this average; start another run with `initialize_from`"
        )
    return tensors
