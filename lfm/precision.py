"""The arithmetic precision of networks: one setting with one meaning in every command.

    fp32    float32 throughout
    tf32    float32, with products and convolutions of TensorFloat-32 inputs on a CUDA device; the same as fp32 elsewhere
    bf16    weights and activations in bfloat16

Time, noise, the state of the solver and its error estimates are float32 in each of them, and the network returns a float32
velocity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from lfm.errors import ConfigError

Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def trained_precision(experiment: dict[str, Any]) -> str:
    """Return the precision that a resolved experiment was trained in; fp32 if it does not say."""
    train = experiment.get("train")
    return str((isinstance(train, dict) and train.get("precision")) or "fp32")


def weights_dtype(precision: str) -> torch.dtype:
    """Return the dtype of weights and activations.

    Raises:
        ConfigError: the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"`precision` {precision}: unknown; one of {', '.join(PRECISIONS)}")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def precision_on(device: torch.device | str, precision: str) -> Precision:
    """Return the precision that `precision` means on this device: tf32 is fp32 without CUDA.

    Raises:
        ConfigError: the precision is unknown.
    """
    weights_dtype(precision)
    return "fp32" if precision == "tf32" and torch.device(device).type != "cuda" else cast(Precision, precision)


@contextmanager
def float32_arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Compute float32 products and convolutions on a CUDA device with TF32 inputs if `precision` is tf32, else without.

    Torch's own default allows TF32 in convolutions alone. Other devices have no TF32, and nothing is changed for them.
    """
    if device.type != "cuda":
        yield
        return
    previous = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _allow_tf32("high" if precision == "tf32" else "highest", precision == "tf32")
    try:
        yield
    finally:
        _allow_tf32(*previous)


def _allow_tf32(matmul_precision: str, in_convolutions: bool) -> None:
    torch.set_float32_matmul_precision(matmul_precision)
    torch.backends.cudnn.allow_tf32 = in_convolutions


def set_precision(network: nn.Module, precision: str) -> nn.Module:
    """Convert a float32 network in place, and return it; its forward pass alone uses `float32_arithmetic`.

    Raises:
        ConfigError: the precision is unknown.
    """
    if weights_dtype(precision) != torch.float32:
        network.bfloat16()
    active: list[AbstractContextManager[None]] = []

    def before(module: nn.Module, inputs: object) -> None:
        active.append(float32_arithmetic(precision, next(module.parameters()).device))
        active[-1].__enter__()

    def after(module: nn.Module, inputs: object, outputs: object) -> None:
        active.pop().__exit__(None, None, None)

    network.register_forward_pre_hook(before)
    network.register_forward_hook(after, always_call=True)
    return network
