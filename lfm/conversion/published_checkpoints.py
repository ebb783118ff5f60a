"""Conversion of published DiT checkpoints to weights of `lfm.models.dit.DiT`.

    lfm    the paper's DiT: the same network with other names, and time that is not scaled
    dit    facebookresearch/DiT: predicts the noise of a diffusion, and a variance, which is dropped. The prediction is
           converted to a velocity while sampling (`lfm.models.noise_prediction`).
    sit    facebookresearch/SiT: predicts a variance too, which is dropped. Its time is 0 at noise, and its velocity points
           to data. With t' = 1 - t, cos(w t') = cos w cos wt + sin w sin wt, and likewise for the sine. So a rotation of
           each pair of weights of the first layer of the time embedding, and the opposite sign of the last layer, convert
           it exactly.

To add a family of checkpoints, add a line to `SOURCES`.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lfm.conversion.published_unets import is_unet, unet_from_state_dict
from lfm.errors import CheckpointError, ConfigError, on_one_line
from lfm.models.config import ModelConfig
from lfm.models.dit_config import DIT_SIZES, DiTConfig
from lfm.models.embeddings import MAX_PERIOD

# Applied in this order; the first occurrence of each key in a name is replaced.
NAMES = {
    "module.": "",
    "x_embedder.proj": "patch_embedding",
    "t_embedder": "time_embedding",
    "y_embedder.embedding_table": "class_embedding.table",
    "attn.proj": "attention.projection",
    "attn.qkv": "attention.qkv",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "adaLN_modulation": "modulation",
    "final_layer": "final",
}
PATCH_EMBEDDING = "patch_embedding.weight"
CLASS_TABLE = "class_embedding.table.weight"
TIME_FIRST_WEIGHT = "time_embedding.mlp.0.weight"
TIME_LAST_BIAS = "time_embedding.mlp.2.bias"
LAST_WEIGHT, LAST_BIAS = "final.linear.weight", "final.linear.bias"
_REQUIRED = (PATCH_EMBEDDING, TIME_FIRST_WEIGHT, LAST_WEIGHT, "blocks.0.attention.qkv.weight", "blocks.0.mlp.0.weight")

# Keys under which training scripts store the weights, in order of preference.
_STATE_KEYS = ("ema", "model", "state_dict")
# The checkpoints do not record with which dropout their null class was trained; this is the usual one.
_USUAL_DROPOUT = 0.1


def _reverse_time(weights: dict[str, Tensor]) -> None:
    """Convert a network of time 1 - t and velocity -v, in place, to one of time t and velocity v."""
    half = weights[TIME_FIRST_WEIGHT].shape[1] // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float64) / half)
    cosine, sine = frequencies.cos(), frequencies.sin()
    of_cosine, of_sine = weights[TIME_FIRST_WEIGHT].double().split(half, dim=1)  # two of (hidden, half)
    rotated = [of_cosine * cosine + of_sine * sine, of_cosine * sine - of_sine * cosine]
    weights[TIME_FIRST_WEIGHT] = torch.cat(rotated, 1).float()
    for name in (LAST_WEIGHT, LAST_BIAS):
        weights[name] = -weights[name]


@dataclass(frozen=True)
class CheckpointSource:
    """A family of published checkpoints."""

    prediction: str = "velocity"
    """Output of the converted network: velocity or noise."""
    convert: Callable[[dict[str, Tensor]], None] = lambda weights: None
    """Converts renamed weights in place."""


SOURCES = {
    "lfm": CheckpointSource(),
    "dit": CheckpointSource(prediction="noise"),
    "sit": CheckpointSource(convert=_reverse_time),
}


def our_name(name: str) -> str:
    """Return our name of a parameter of a published checkpoint."""
    for published, ours in NAMES.items():
        name = name.replace(published, ours, 1)
    return name


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint on the local disk, of one GPU or several; the EMA if it has one.

    Raises:
        CheckpointError: it cannot be read without running code of the file, or it holds no tensors by name.
    """
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such file; name the file of a checkpoint")
    try:
        content: Any = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, and reading it would run its code; name the file of the weights alone"
        ) from error
    except Exception as error:  # the reader of torch raises anything on files that are not its own
        raise CheckpointError(f"{path}: cannot be read ({on_one_line(error)}); is it a complete checkpoint?") from error
    if isinstance(content, dict):
        content = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no weights by name")
    return content


def from_state_dict(
    state: dict[str, Tensor],
    source: str,
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    latent_size: int | None = None,
    downsample_factor: int = 8,
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Return the weights and the configuration of a network from a checkpoint: a DiT, or one of the paper's ADM U-Nets.

    Args:
        state: the tensors as the training script saved them, of one GPU or several.
        source: a key of SOURCES.
        num_heads: required if width and depth are not those of a published model.
        num_classes: by default one less than the rows of the class table, whose last row is the null class. 0 makes the
            model unconditional: the null class becomes part of the time embedding.
        latent_size: height and width of the latents, for U-Nets whose checkpoint does not tell it.
        downsample_factor: pixels per latent element along each side, for U-Nets of semantic synthesis.

    Raises:
        CheckpointError: it is not such a checkpoint; names what is missing or wrong.
        ConfigError: `num_heads` or `latent_size` is required, or `num_classes` does not fit.
    """
    bare = {name.removeprefix("module."): value for name, value in state.items()}
    if source == "lfm" and is_unet(bare):
        return unet_from_state_dict(
            bare,
            latent_size=latent_size,
            num_heads=num_heads,
            num_classes=num_classes,
            downsample_factor=downsample_factor,
        )
    position = next((value for name, value in state.items() if name.endswith("pos_embed")), None)
    weights = {our_name(name): value.float() for name, value in state.items() if not name.endswith("pos_embed")}
    if missing := [name for name in _REQUIRED if name not in weights]:
        raise CheckpointError(f"missing weight {missing[0]}: not a checkpoint of {source}")
    if position is None:
        raise CheckpointError("missing weight pos_embed, which has the size of the latents")
    width, channels, patch, _ = weights[PATCH_EMBEDDING].shape
    depth = 1 + max(int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", name) for name in weights) if match)
    classes, dropout = _convert_classes(weights, num_classes)
    _drop_variance(weights, channels, patch, source)
    SOURCES[source].convert(weights)
    config = DiTConfig(
        latent_channels=channels,
        latent_size=math.isqrt(position.shape[1]) * patch,
        patch_size=patch,
        hidden_size=width,
        depth=depth,
        num_heads=num_heads or _published_num_heads(width, depth),
        mlp_ratio=weights["blocks.0.mlp.0.weight"].shape[0] / width,
        num_classes=classes,
        condition_dropout=dropout,
        time_scale=1.0,
    )
    return weights, config


def _drop_variance(weights: dict[str, Tensor], channels: int, patch: int, source: str) -> None:
    """Remove the outputs of the last layer that predict a variance, in place."""
    outputs = weights[LAST_WEIGHT].shape[0] // patch**2
    if outputs == channels:
        return
    if outputs != 2 * channels:
        raise CheckpointError(f"it predicts {outputs} channels from {channels}: not a checkpoint of {source}")
    for name in (LAST_WEIGHT, LAST_BIAS):
        means = weights[name].unflatten(0, (patch, patch, outputs))[:, :, :channels]  # (p, p, C, ...)
        weights[name] = means.flatten(0, 2).contiguous()


def _convert_classes(weights: dict[str, Tensor], num_classes: int | None) -> tuple[int | None, float]:
    """Return number of classes and condition dropout; for `num_classes` 0, move the null class into the time, in place."""
    rows = len(weights[CLASS_TABLE]) if CLASS_TABLE in weights else 0
    if rows == 0:
        if num_classes:
            raise ConfigError(f"`num_classes` {num_classes}: the checkpoint has no classes; leave it out")
        return None, 0.0
    if num_classes == 0 or (num_classes is None and rows == 1):  # one class without a null class is no condition
        weights[TIME_LAST_BIAS] = weights[TIME_LAST_BIAS] + weights.pop(CLASS_TABLE)[-1]
        return None, 0.0
    if num_classes not in (None, rows, rows - 1):
        raise ConfigError(
            f"`num_classes` {num_classes}: the class table of the checkpoint has {rows} rows, with the null class"
        )
    return (rows, 0.0) if num_classes == rows else (rows - 1, _USUAL_DROPOUT)


def _published_num_heads(width: int, depth: int) -> int:
    """Return the number of heads of the published model of this width and depth."""
    for hidden_size, layers, num_heads in DIT_SIZES.values():
        if (hidden_size, layers) == (width, depth):
            return num_heads
    raise ConfigError(f"`num_heads`: no published model has width {width} and depth {depth}; set it")
