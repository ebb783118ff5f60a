"""Forecasts of the memory of a training, from the shapes of its tensors alone.

Bytes of one of N ranks, for P parameters of which T are trained, b bytes each (4 in float32, 2 in bfloat16), and A averages:

                      ZeRO 1 and 2      ZeRO 3
    weights           b P               b P / N, and b P while they are gathered in a pass
    gradients         b U + 4 T / N     2 b U + 4 T / N,    U = min(T, reduce_bucket_size), on a GPU reduce_bucket_size
    masters           4 T / N           4 T / N
    moments           8 T / N           8 T / N
    averages          4 A T / N         4 A T / N
    activations       the most bytes that the tensors of a forward and a backward pass take at once, besides weights and
                      gradients: the passes are run on tensors that have a shape and no memory (torch's FakeTensorMode)
    checkpoint copy   (12 + 4 A) T / N, and on the main rank 4 T (1 - 1 / N) more, in the memory of the host

A gradient is held twice: in the bucket in which DeepSpeed sums it over the ranks, and as this rank's part of the sum. How many
buckets there are was found by measuring; the rest is by construction.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lfm.models.config import ModelConfig
from lfm.training.loss_terms import TrainingLoss
from lfm.types import Condition, LatentBatch

REDUCE_BUCKET_SIZE = 500_000_000  # DeepSpeed's default, in gradients


@dataclass(frozen=True)
class TrainedNetwork:
    """What decides how much memory the state of a training takes."""

    num_parameters: int
    num_trained: int  # of the parameters; the others are frozen
    num_averages: int
    dtype: torch.dtype  # of weights and activations
    num_with_momentum: int = 0  # of the trained parameters, those of which Muon keeps one moment in place of two


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the main rank, the largest one, by part."""

    device: dict[str, int]  # in the memory of the device, on a CPU in that of the process
    host: dict[str, int]  # in the memory of the host, beside a GPU; empty on a CPU


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations within the block make, for as long as they exist.

    Args:
        existing: tensors that are not counted.

    Attributes:
        peak: the most bytes at once.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = self._num_bytes = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(
        self, operation: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        self.peak = max(self.peak, self._num_bytes)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self._num_bytes += size
            weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self._num_bytes -= size


def example_batch(config: ModelConfig, num_samples: int, device: torch.device | str = "cpu") -> LatentBatch:
    """Return a batch of noise with the shapes and conditions that a network is trained with."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(num_samples, *shape, device=device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(num_samples, *shape, dtype=torch.int64, device=device)

    num_kept = config.num_kept_tokens
    return LatentBatch(
        sample_numbers=zeros(),
        latents=noise(*config.latent_shape),
        noise=noise(*config.latent_shape),
        uniform=torch.full((num_samples,), 0.5, device=device),
        condition=Condition(
            zeros() if config.num_classes is not None else None,
            noise(config.condition_channels, *config.latent_shape[1:]) if config.condition_channels else None,
            zeros(config.segmentation_size, config.segmentation_size) if config.num_labels else None,
        ),
        kept_tokens=zeros(num_kept) + torch.arange(num_kept, device=device) if num_kept < config.num_tokens else None,
    )


def activation_bytes(
    build: Callable[[], nn.Module], config: ModelConfig, loss: TrainingLoss, num_samples: int, dtype: torch.dtype
) -> int:
    """Return the most bytes of activations and temporary tensors of a forward and a backward pass.

    Nothing is computed and no such memory is taken, however large the network is. Attention is that of torch's fused kernels,
    which keep no products of queries and keys. Compiled blocks need less.

    Args:
        build: makes the network, with frozen parameters if only a part is trained.
        config: of the network.
        loss: of the training.
        num_samples: samples of one forward pass.
        dtype: of weights and activations.
    """
    with FakeTensorMode(), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradients of this kind of tensor warn as they are released
        network = build()
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_release_gradient)
        batch = example_batch(config, num_samples)
        with TensorMemory([*network.parameters(), *network.buffers()]) as memory:
            loss(network, batch, batch.uniform)[0].backward()
    return memory.peak


def _release_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def rank_memory(
    network: TrainedNetwork, settings: Mapping[str, Any], num_ranks: int, activations: int, *, on_gpu: bool
) -> RankMemory:
    """Return the memory of the main rank; see the module.

    Args:
        network: the network in training.
        settings: DeepSpeed's configuration.
        num_ranks: number of ranks.
        activations: returned by `activation_bytes`.
        on_gpu: whether the ranks compute on GPUs.
    """
    zero = settings["zero_optimization"]
    size, trained = network.dtype.itemsize, network.num_trained
    share = -(-trained // num_ranks)  # parameters whose optimizer state is this rank's
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE))
    gathers = zero["stage"] == 3
    num_weights = -(-network.num_parameters // num_ranks) if gathers else network.num_parameters
    weights = {"weights": size * num_weights}
    states = {
        "masters": 4 * share,
        "moments": 8 * share - 4 * network.num_with_momentum // num_ranks,
        "averages": 4 * network.num_averages * share,
    }
    passes = {
        "gathered weights": size * network.num_parameters if gathers else 0,
        "gradients": size * (1 + gathers) * (bucket if on_gpu else min(trained, bucket)) + 4 * share,
        "activations": activations,
    }
    copy = {"checkpoint copy": (12 + 4 * network.num_averages) * share + 4 * (trained - share)}
    if not on_gpu:
        return RankMemory(weights | states | passes | copy, {})
    device, host = dict(passes), dict(copy)
    (host if "offload_param" in zero else device).update(weights)
    (host if "offload_optimizer" in zero else device).update(states)
    return RankMemory(device, host)
