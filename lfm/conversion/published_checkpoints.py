"""Other people's checkpoints as weights that sample here, and ours as diffusers' DiT.

lfm    the paper's DiT: as ours, but for names and a time that is not scaled
dit    facebookresearch/DiT: it predicts the noise of a diffusion, and a variance that is dropped; its prediction is
       converted as it samples (lfm.models.noise_prediction)
sit    facebookresearch/SiT: a variance that is dropped; its time is 0 at noise and its velocity points to data. With
       t' = 1 - t, cos(w t') = cos w cos wt + sin w sin wt, and alike the sine, so turning each pair of weights of the
       time's first layer, and the sign of the last layer, makes it ours exactly
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor

from lfm.errors import CheckpointError, ConfigError
from lfm.models.config import ModelConfig
from lfm.models.dit_config import DIT_SIZES, DiTConfig
from lfm.models.embeddings import MAX_PERIOD

SOURCES = ("lfm", "dit", "sit")
# In this order; the first part of a name that is found is replaced.
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
TABLE, FIRST, BIAS = "class_embedding.table.weight", "time_embedding.mlp.0.weight", "time_embedding.mlp.2.bias"


def our_name(name: str) -> str:
    """Our name of a parameter of theirs."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours, 1)
    return name


def from_state_dict(
    state: dict[str, Tensor], source: str, *, num_heads: int | None = None, num_classes: int | None = None
) -> tuple[dict[str, Tensor], DiTConfig]:
    """Weights and shape of a DiT from a checkpoint of `source`.

    Args:
        state: as its training script saved it, of one GPU or several.
        source: one of SOURCES.
        num_heads: where the width and depth are none of the published ones.
        num_classes: by default one less than the rows of the class table, whose last is the null class. 0 makes it
            unconditional: the null class becomes a part of the time's embedding.

    Raises:
        CheckpointError: it is no such checkpoint; names what is missing or wrong.
        ConfigError: `num_heads` is needed, or `num_classes` does not fit.
    """
    position = next((value for name, value in state.items() if name.endswith("pos_embed")), None)
    weights = {our_name(name): value.float() for name, value in state.items() if not name.endswith("pos_embed")}
    needed = ("patch_embedding.weight", FIRST, "final.linear.weight", "blocks.0.attention.qkv.weight")
    if missing := [name for name in needed if name not in weights]:
        raise CheckpointError(f"it has no {missing[0]}, by any name: it is no DiT of --from {source}")
    if position is None:
        raise CheckpointError("it has no pos_embed, which tells the size of its latents")
    width, channels, patch, _ = weights["patch_embedding.weight"].shape
    depth = 1 + max(int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", name) for name in weights) if match)
    rows = len(weights[TABLE]) if TABLE in weights else 0
    classes, dropout = _classes(weights, rows, num_classes)
    outputs = weights["final.linear.weight"].shape[0] // patch**2
    if outputs == 2 * channels:
        for name in ("final.linear.weight", "final.linear.bias"):
            kept = weights[name].unflatten(0, (patch, patch, outputs))[:, :, :channels]
            weights[name] = kept.flatten(0, 2).contiguous()
    elif outputs != channels:
        raise CheckpointError(f"it makes {outputs} channels of {channels}: it is no DiT of --from {source}")
    if source == "sit":
        _turn_time(weights)
    config = DiTConfig(
        latent_channels=channels,
        latent_size=math.isqrt(position.shape[1]) * patch,
        patch_size=patch,
        hidden_size=width,
        depth=depth,
        num_heads=num_heads or _num_heads(width, depth),
        mlp_ratio=weights["blocks.0.mlp.0.weight"].shape[0] / width,
        num_classes=classes,
        condition_dropout=dropout,
        time_scale=1.0,
    )
    return weights, config


def _classes(weights: dict[str, Tensor], rows: int, wanted: int | None) -> tuple[int | None, float]:
    """The number of classes and, where there is a null class, the usual dropout: what it was is not in the file."""
    if rows == 0:
        if wanted:
            raise ConfigError(f"--num-classes {wanted}: the checkpoint has no classes; leave it out")
        return None, 0.0
    if wanted == 0:
        weights[BIAS] = weights[BIAS] + weights.pop(TABLE)[-1]
        return None, 0.0
    if wanted not in (None, rows, rows - 1):
        raise ConfigError(f"--num-classes {wanted}: the checkpoint's class table has {rows} rows, with the null class")
    return (rows, 0.0) if wanted == rows else (rows - 1, 0.1)


def _num_heads(width: int, depth: int) -> int:
    for hidden_size, layers, num_heads in DIT_SIZES.values():
        if (hidden_size, layers) == (width, depth):
            return num_heads
    raise ConfigError(f"a DiT of width {width} and depth {depth} is none of the published ones: give --num-heads")


def _turn_time(weights: dict[str, Tensor]) -> None:
    """Of a network of time 1 - t and velocity -v make, in place, one of t and v."""
    half = weights[FIRST].shape[1] // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float64) / half)
    cosine, sine = frequencies.cos(), frequencies.sin()
    of_cosine, of_sine = weights[FIRST].double().split(half, dim=1)
    turned = [of_cosine * cosine + of_sine * sine, of_cosine * sine - of_sine * cosine]
    weights[FIRST] = torch.cat(turned, 1).float()
    for name in ("final.linear.weight", "final.linear.bias"):
        weights[name] = -weights[name]


# --- to diffusers ------------------------------------------------------------------------------------------------

DIFFUSERS_NULL = 1000  # the null class of diffusers' DiTPipeline, whatever the number of classes
_EXPRESSIBLE = {
    *(
        "latent_channels",
        "latent_size",
        "patch_size",
        "hidden_size",
        "depth",
        "num_heads",
        "num_classes",
        "condition_dropout",
    ),
    *("time_scale", "frequency_shift", "attention", "activation_checkpointing", "token_dropout", "downsample_factor"),
}


def expressible(config: ModelConfig) -> DiTConfig:
    """Return `config` if it is of the backbone that diffusers' DiTTransformer2DModel can be.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(config, DiTConfig):
        raise ConfigError("diffusers' DiTPipeline has no such backbone; use --to safetensors")
    return config


def to_diffusers(weights: dict[str, Tensor], config: DiTConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and arguments of diffusers' DiTTransformer2DModel that computes the same.

    Raises:
        ConfigError: it cannot; names the key.
    """
    for field in dataclasses.fields(DiTConfig):
        value = getattr(config, field.name)
        if field.name not in _EXPRESSIBLE and value != field.default:
            raise ConfigError(
                f"{field.name} {value}: diffusers' DiTTransformer2DModel has no such part; use --to safetensors"
            )
    if (config.num_classes or 0) > DIFFUSERS_NULL:
        raise ConfigError(f"num_classes {config.num_classes}: diffusers' DiTPipeline knows at most {DIFFUSERS_NULL}")
    first = _refitted(weights[FIRST], config)
    table = torch.zeros(DIFFUSERS_NULL + 1, config.hidden_size)
    if config.num_classes is not None:
        table[: config.num_classes] = weights[TABLE][: config.num_classes]
        if config.condition_dropout:
            table[DIFFUSERS_NULL] = weights[TABLE][config.num_classes]
    embedding = {
        "timestep_embedder.linear_1.weight": first,
        "timestep_embedder.linear_1.bias": weights["time_embedding.mlp.0.bias"],
        "timestep_embedder.linear_2.weight": weights["time_embedding.mlp.2.weight"],
        "timestep_embedder.linear_2.bias": weights[BIAS],
        "class_embedder.embedding_table.weight": table,
    }
    pairs = [
        ("pos_embed.proj", "patch_embedding"),
        ("proj_out_1", "final.modulation.1"),
        ("proj_out_2", "final.linear"),
    ]
    theirs: dict[str, Tensor] = {}
    for index in range(config.depth):
        block, ours = f"transformer_blocks.{index}", f"blocks.{index}"
        theirs |= {f"{block}.norm1.emb.{name}": value.clone() for name, value in embedding.items()}
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", weights[f"{ours}.attention.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{block}.attn1.to_{name}.{kind}"] = part.clone()
        pairs += [
            (f"{block}.norm1.linear", f"{ours}.modulation.1"),
            (f"{block}.attn1.to_out.0", f"{ours}.attention.projection"),
            (f"{block}.ff.net.0.proj", f"{ours}.mlp.0"),
            (f"{block}.ff.net.2", f"{ours}.mlp.2"),
        ]
    theirs |= {f"{their}.{kind}": weights[f"{our}.{kind}"] for their, our in pairs for kind in ("weight", "bias")}
    arguments = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_layers": config.depth,
        "sample_size": config.latent_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": DIFFUSERS_NULL,
        "norm_eps": 1e-6,
    }
    return theirs, arguments


def _refitted(first: Tensor, config: DiTConfig) -> Tensor:
    """The time's first layer for diffusers' frequencies, P^(-i/(n - 1)).

    With a frequency shift of 1 they are ours. With times that are not scaled every angle is in [0, 1], where the waves of
    one set are linear combinations of the other's to the last bit of float32. Else they are not.
    """
    if config.frequency_shift == 1:
        return first
    if config.time_scale != 1:
        raise ConfigError(
            f"frequency_shift {config.frequency_shift}: diffusers' DiTTransformer2DModel has other time frequencies; "
            "train with model.frequency_shift: 1, or use --to safetensors"
        )
    half, times = first.shape[1] // 2, torch.linspace(0, 1, 2001, dtype=torch.float64)

    def waves(shift: int) -> Tensor:
        angles = times[:, None] * MAX_PERIOD ** (-torch.arange(half, dtype=torch.float64) / (half - shift))
        return torch.cat([angles.cos(), angles.sin()], 1)

    combine = torch.linalg.lstsq(
        waves(1), waves(0), rcond=1e-12, driver="gelsd"
    ).solution  # waves(1) combine = waves(0)
    return (first.double() @ combine.T).float()
