"""Training a part of a network: which parameters are trained, and small layers beside frozen ones.

    low rank   W x + b + up down x,   up (out, r) zero at the start, down (r, in)     LoRA, Hu et al. 2021
    scales     s (W x + b),           s (out,) one at the start                       DiffFit, Xie et al. 2023

Both begin as the frozen layer, and both can be merged into it: W' = s (W + up down), b' = s b. A weights file of a part holds
only the tensors that differ from its base, under the names of the network, with `low_rank_down`, `low_rank_up` and `scale`
beside the weight that they change.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lfm.errors import ConfigError
from lfm.models.network import VelocityNetwork

GROUPS = ("all", "attention", "norms_and_biases", "conditions", "adapters", "scales")
_FACTORS = ("low_rank_down", "low_rank_up", "scale")


class AdaptedLinear(nn.Linear):
    """A linear layer with a product of low rank beside its weight, scales of its outputs, or both.

    Args:
        layer: the layer, whose weight and bias it takes over.
        rank: of the product; 0 means none.
        scaled: whether its outputs have scales.
    """

    def __init__(self, layer: nn.Linear, rank: int = 0, scaled: bool = False) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.low_rank_down = self.low_rank_up = self.scale = None
        if rank:
            self.low_rank_down = nn.Parameter(torch.empty(rank, layer.in_features))
            self.low_rank_up = nn.Parameter(torch.zeros(layer.out_features, rank))
            nn.init.kaiming_uniform_(self.low_rank_down, a=math.sqrt(5))
        if scaled:
            self.scale = nn.Parameter(torch.ones(layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        result = linear(x, self.weight, self.bias)
        if self.low_rank_up is not None and self.low_rank_down is not None:
            result = result + linear(linear(x, self.low_rank_down), self.low_rank_up)
        return result if self.scale is None else result * self.scale


def add_adapters(network: VelocityNetwork, trainable: Sequence[str], rank: int) -> None:
    """Replace the linear layers of the blocks by adapted ones, in place, for the groups `adapters` and `scales`.

    Raises:
        ConfigError: the network has no such layers.
    """
    with_rank, scaled = "adapters" in trainable, "scales" in trainable
    if not (with_rank or scaled):
        return
    layers = [
        name
        for name, module in network.named_modules()
        if type(module) is nn.Linear and (".attention." in name or ".mlp." in name) and "embedding" not in name
    ]
    if not layers:
        raise ConfigError(
            "train.trainable: the network has no linear layers in its blocks for adapters; train a pattern"
        )
    for name in layers:
        parent, _, child = name.rpartition(".")
        is_output = name.endswith(("attention.projection", "mlp.2"))
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if with_rank or is_output:
            adapted = AdaptedLinear(layer, rank if with_rank else 0, scaled and is_output)
            setattr(network.get_submodule(parent), child, adapted)


def freeze_others(network: VelocityNetwork, trainable: Sequence[str]) -> int:
    """Freeze all parameters but those of `trainable`, groups or patterns of names; return the number of trained values.

    Raises:
        ConfigError: a pattern is the name of no parameter.
    """
    for each in trainable:
        if not any(_matches(network, name, value, each) for name, value in network.named_parameters()):
            raise ConfigError(
                f"train.trainable {each}: no parameter has such a name; use {', '.join(GROUPS)}, or a pattern such as "
                "blocks.*.mlp.*"
            )
    for name, value in network.named_parameters():
        value.requires_grad_(any(_matches(network, name, value, each) for each in trainable))
    return sum(value.numel() for value in network.parameters() if value.requires_grad)


def _matches(network: VelocityNetwork, name: str, value: Tensor, selection: str) -> bool:
    factor = name.rpartition(".")[2]
    match selection:
        case "all":
            return True
        case "attention":
            return "attention." in name
        case "norms_and_biases":
            return value.ndim == 1 and factor != "scale"
        case "conditions":
            return name.startswith(("class_embedding", "segmentation_embedding", network.input_layer))
        case "adapters":
            return factor.startswith("low_rank_")
        case "scales":
            return factor == "scale"
    return fnmatch.fnmatchcase(name, selection)


def merge_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the network without adapters that computes the same."""
    merged = {name: value for name, value in weights.items() if name.rpartition(".")[2] not in _FACTORS}
    for name, up in weights.items():
        layer, _, factor = name.rpartition(".")
        if factor == "low_rank_up":
            product = up.double() @ weights[f"{layer}.low_rank_down"].double()
            merged[f"{layer}.weight"] = (merged[f"{layer}.weight"].double() + product).float()
    for name, scale in weights.items():
        layer, _, factor = name.rpartition(".")
        if factor == "scale":
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"] * scale[:, None]
            merged[f"{layer}.bias"] = merged[f"{layer}.bias"] * scale
    return merged
