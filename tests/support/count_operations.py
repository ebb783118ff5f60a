"""A process that counts the operations of a training step beyond those of a plain forward and backward pass.

    python -m tests.support.count_operations STAGE PRECISION

prints the number of operations for each parameter tensor: the slope between models of 20 and of 60 tensors. Views are left
out, since they launch nothing on a device.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lfm.training.engine import Engine
from lfm.training.step_guard import StepGuard
from lfm.world import World

WIDTH = 16
SIZES = (20, 60)


class OperationCounter(TorchDispatchMode):
    """Counts the operations that are dispatched within the block, views excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (operation.is_view or operation.name() in ("aten::detach", "aten::_unsafe_view"))
        return operation(*args, **(kwargs or {}))


class Scales(nn.Module):
    """A product with many small parameter tensors."""

    def __init__(self, num_tensors: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in range(num_tensors))

    def forward(self, values: Tensor) -> Tensor:
        for scale in self.scales:
            values = values * scale
        return values.sum()


def operations(num_tensors: int, stage: int, precision: str) -> int:
    """Return the number of operations of a step, averages included, less those of plain passes."""
    settings = {
        "zero_optimization": {"stage": stage},
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": True, "lr": 1e-3}},
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
    }
    engine = Engine(Scales(num_tensors), settings, World(), ("ema",), StepGuard(20.0))
    values = torch.ones(4, WIDTH, dtype=engine.dtype)
    for _ in range(3):  # the first steps also make buffers
        with OperationCounter() as step:
            engine.backward_and_step(engine(values))
            engine.averages["ema"].update(0.9)
    plain = Scales(num_tensors).to(engine.dtype)
    with OperationCounter() as passes:
        plain(values).backward()
    return step.count - passes.count


if __name__ == "__main__":
    few, many = (operations(size, int(sys.argv[1]), sys.argv[2]) for size in SIZES)
    print((many - few) / (SIZES[1] - SIZES[0]))
