"""The arithmetic precision of a network in inference.

    fp32    float32 throughout, as torch does by default
    tf32    float32, with matrix products of TensorFloat-32 inputs on a CUDA device; the same as fp32 elsewhere
    bf16    weights and activations in bfloat16, which is the arithmetic of training with train.precision bf16

Time, noise and the state of the solver are float32 in each of them, and the network returns a float32 velocity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lfm.errors import ConfigError

PRECISIONS = ("fp32", "tf32", "bf16")


def trained_precision(experiment: dict[str, Any]) -> str:
    """Return the precision that a resolved experiment was trained in; fp32 if it does not say."""
    return str(experiment.get("train", {}).get("precision", "fp32"))


def set_precision(network: nn.Module, precision: str) -> nn.Module:
    """Convert a float32 network in place, and return it.

    Raises:
        ConfigError: the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"`precision` {precision}: unknown; one of {', '.join(PRECISIONS)}")
    if precision == "bf16":
        network.bfloat16()
    if precision == "tf32":
        _use_tf32(network)
    return network


def _use_tf32(network: nn.Module) -> None:
    """Allow TF32 in the forward pass of `network`, and in nothing else of the process."""
    previous: list[str] = []

    def before(module: nn.Module, inputs: object) -> None:
        previous.append(torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("high")

    def after(module: nn.Module, inputs: object, outputs: object) -> None:
        torch.set_float32_matmul_precision(previous.pop())

    network.register_forward_pre_hook(before)
    network.register_forward_hook(after, always_call=True)
