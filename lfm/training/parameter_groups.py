"""The parameter groups of the optimizer: which have weight decay, are updated by Muon, or have a rate of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    hidden_matrices: Mapping[str, int] | None = None,
    rate_factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: weight decay for matrices and kernels; none for biases, norms, embeddings.

    Without weight decay all parameters are one group. Frozen parameters are in none.

    Args:
        model: the network.
        weight_decay: of matrices and kernels.
        hidden_matrices: names of the parameters that Muon updates; they are the last group, and each group then has a value
            `muon`.
        rate_factors: factors of the learning rate of parameters by name; groups of a factor other than 1 have a value
            `rate_factor`.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if rate_factors:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            by_factor.setdefault(rate_factors.get(name, 1.0), []).append(parameter)
        return [
            group | {"rate_factor": factor}
            for factor, parameters in by_factor.items()
            for group in _decay_groups(model, parameters, weight_decay)
        ]
    if hidden_matrices:
        matrices = [trained.pop(name) for name in hidden_matrices]
        groups = _decay_groups(model, list(trained.values()), weight_decay)
        groups = [group | {"muon": False} for group in groups]
        return [*groups, {"params": matrices, "weight_decay": weight_decay, "muon": True}]
    return _decay_groups(model, list(trained.values()), weight_decay)


def _decay_groups(model: nn.Module, parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    if weight_decay == 0:
        return [{"params": parameters}]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with_decay: list[nn.Parameter] = []
    without: list[nn.Parameter] = []
    for parameter in parameters:
        is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        (with_decay if is_matrix else without).append(parameter)
    groups = [{"params": with_decay, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
