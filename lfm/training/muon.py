"""Muon for the hidden matrices of a network, and AdamW for all other parameters.

    B <- mu B + (1 - mu) G                            G the gradient of a matrix W (m, n), mu = 0.95
    O  = orthogonalized((1 - mu) G + mu B)            Nesterov's form of the momentum
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(m, n)) O

    orthogonalized(X):  X <- X / |X|;  five times  A = X X^T,  X <- a X + (b A + c A^2) X

Jordan et al. 2024. The iteration brings all singular values of X near 1, so that an update changes all directions of a matrix
alike. The factor 0.2 sqrt(max(m, n)) gives the update the root mean square of AdamW's, so that both share one learning rate
(Liu et al. 2025, Moonlight). Momentum is the only state: 4 bytes per parameter in place of AdamW's 8.

The kernels of a convolution (m, channels, height, width) are the rows of a matrix (m, channels height width).

An update needs the whole gradient of a matrix, of which a rank has a part under ZeRO. The optimizer therefore updates the
momentum of its partition, and leaves the orthogonalization to a function of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
NUM_ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
RMS_OF_ADAMW = 0.2
STATE = "exp_avg"  # name of the momentum, as of AdamW's first moment


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return a matrix (m, n) with the same singular vectors and singular values between about 0.7 and 1.2, float32.

    Products are computed in bfloat16 on a GPU, which the iteration tolerates, and in float32 on a CPU.
    """
    assert matrix.ndim == 2, f"shape {tuple(matrix.shape)}"
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    is_tall = matrix.shape[0] > matrix.shape[1]
    if is_tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).float()


def orthogonal_update(update: Tensor, num_blocks: int = 1) -> Tensor:
    """Return the orthogonalized update of a weight matrix, scaled to the root mean square of AdamW's updates.

    Args:
        update: float32 (m, n), or (m, ...) of a convolution, whose kernels are rows.
        num_blocks: number of matrices that are stacked in the rows of the weight, such as 3 of query, key and value. Each is
            orthogonalized alone.
    """
    matrices = update.flatten(1).chunk(num_blocks)
    blocks = [orthogonalized(matrix) * RMS_OF_ADAMW * max(matrix.shape) ** 0.5 for matrix in matrices]
    return torch.cat(blocks).view_as(update)


class MuonWithAdamW(torch.optim.AdamW):
    """Muon for the groups whose `muon` is true, and AdamW for the others.

    Steps at which `found_inf` is 1 change nothing, as with torch's fused optimizers.

    Args:
        groups: parameter groups, each with a value `muon`. Parameters of Muon's groups may be partitions of matrices.
        options: of torch.optim.AdamW.

    Attributes:
        orthogonalize: function of a parameter of Muon's groups and its update, of the same shape, that returns the
            orthogonalized update.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        # Until the engine sets it: DeepSpeed takes a step with zero gradients to allocate the state.
        self.orthogonalize: Callable[[Tensor, Tensor], Tensor] = lambda parameter, update: update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "not supported"
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                for parameter in group["params"]:
                    self._update(parameter, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, parameter: Tensor, learning_rate: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if STATE not in state:
            state[STATE] = torch.zeros_like(parameter)
        momentum = state[STATE].lerp(gradient, 1 - MOMENTUM)
        update = self.orthogonalize(parameter, gradient.lerp(momentum, MOMENTUM))
        changed = parameter * (1 - learning_rate * weight_decay) - learning_rate * update
        skipped = getattr(self, "found_inf", None)
        if skipped is not None:
            is_skipped = skipped.to(parameter.device) > 0
            momentum = torch.where(is_skipped, state[STATE], momentum)
            changed = torch.where(is_skipped, parameter, changed)
        state[STATE].copy_(momentum)
        parameter.copy_(changed)
