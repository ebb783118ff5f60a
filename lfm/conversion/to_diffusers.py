"""Export of a DiT as a diffusers `DiTPipeline`, which computes the same without lfm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lfm.autoencoder import Autoencoder, import_diffusers
from lfm.conversion.published_checkpoints import CLASS_TABLE, TIME_FIRST_WEIGHT, TIME_LAST_BIAS
from lfm.errors import ConfigError
from lfm.models.config import ModelConfig
from lfm.models.dit_config import DiTConfig
from lfm.models.embeddings import MAX_PERIOD
from lfm.models.noise_prediction import NUM_DIFFUSION_STEPS
from lfm.weights_file import WeightsHeader

NULL_CLASS = 1000  # of diffusers' DiTPipeline, whatever the number of classes
PATH_TIMES = torch.linspace(0, 1, 2001)
STRIDE = (
    20  # of the diffusion steps at which an exported noise-predicting model is exact: 50 steps, the pipeline's default
)
_REPAIR = "export to safetensors instead"

# Fields of a DiTConfig that change the function and that DiTTransformer2DModel does not have.
_INEXPRESSIBLE = (
    "condition_channels",
    "num_labels",
    "mlp_ratio",
    "position",
    "norm",
    "mlp",
    "qk_norm",
    "value_residual",
)
# Modules of DiTTransformer2DModel and ours, with a weight and a bias each; those of a block once for each block.
_MODULES = {"pos_embed.proj": "patch_embedding", "proj_out_1": "final.modulation.1", "proj_out_2": "final.linear"}
_BLOCK_MODULES = {
    "norm1.linear": "modulation.1",
    "attn1.to_out.0": "attention.projection",
    "ff.net.0.proj": "mlp.0",
    "ff.net.2": "mlp.2",
}


def build_pipeline(weights: dict[str, Tensor], header: WeightsHeader, autoencoder: Autoencoder) -> Any:
    """Return a `DiTPipeline`: its steps are those of the solver euler, or of DDIM for a model that predicts noise.

    Raises:
        ConfigError: diffusers is too old, or cannot express the model or the autoencoder.
    """
    diffusers = import_diffusers()
    if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
        raise ConfigError("the export needs a diffusers with FlowMapEulerDiscreteScheduler; upgrade diffusers")
    if autoencoder.shift or type(autoencoder.model).__name__ != "AutoencoderKL":
        raise ConfigError(f"diffusers' DiTPipeline decodes with an AutoencoderKL without shift_factor; {_REPAIR}")
    config, predicts_noise = header.model, header.prediction == "noise"
    if not isinstance(config, DiTConfig) or config.time_scale % 1 or (predicts_noise and config.time_scale != 1):
        raise ConfigError(
            "diffusers' DiTPipeline needs a DiT with an integer time_scale, and 1 if it predicts noise; " + _REPAIR
        )
    times = torch.arange(0, NUM_DIFFUSION_STEPS, STRIDE) if predicts_noise else PATH_TIMES
    state, arguments = to_diffusers(weights, config, times)
    transformer = diffusers.DiTTransformer2DModel(**arguments)
    transformer.load_state_dict(state)
    if predicts_noise:
        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=NUM_DIFFUSION_STEPS, beta_start=1e-4, beta_end=0.02, clip_sample=False
        )
    else:
        scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=int(config.time_scale))
    return diffusers.DiTPipeline(transformer.eval(), autoencoder.model, scheduler)


def to_diffusers(
    weights: dict[str, Tensor], config: ModelConfig, times: Tensor = PATH_TIMES
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and the constructor arguments of a DiTTransformer2DModel that computes the same.

    Args:
        times: the times at which it must do so, before they are scaled.

    Raises:
        ConfigError: there is none; names the field of the configuration that it cannot express.
    """
    config = _require_expressible(config)
    table = torch.zeros(NULL_CLASS + 1, config.hidden_size)
    if config.num_classes is not None:
        table[: config.num_classes] = weights[CLASS_TABLE][: config.num_classes]
        if config.has_null_condition:
            table[NULL_CLASS] = weights[CLASS_TABLE][config.num_classes]
    embedding = {
        "timestep_embedder.linear_1.weight": _fit_frequencies(weights[TIME_FIRST_WEIGHT], config, times),
        "timestep_embedder.linear_1.bias": weights["time_embedding.mlp.0.bias"],
        "timestep_embedder.linear_2.weight": weights["time_embedding.mlp.2.weight"],
        "timestep_embedder.linear_2.bias": weights[TIME_LAST_BIAS],
        "class_embedder.embedding_table.weight": table,
    }
    modules, state = dict(_MODULES), {}
    for index in range(config.depth):
        block, our_block = f"transformer_blocks.{index}", f"blocks.{index}"
        for name, ours in _BLOCK_MODULES.items():
            modules[f"{block}.{name}"] = f"{our_block}.{ours}"
        for name, value in embedding.items():
            state[f"{block}.norm1.emb.{name}"] = value.clone()
        for kind in ("weight", "bias"):
            for name, value in zip("qkv", weights[f"{our_block}.attention.qkv.{kind}"].chunk(3), strict=True):
                state[f"{block}.attn1.to_{name}.{kind}"] = value.clone()
    for name, ours in modules.items():
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = weights[f"{ours}.{kind}"]
    arguments = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_layers": config.depth,
        "sample_size": config.latent_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": NULL_CLASS,
        "norm_eps": 1e-6,
    }
    return state, arguments


def _require_expressible(config: ModelConfig) -> DiTConfig:
    """Return the configuration if DiTTransformer2DModel can express it; raise ConfigError otherwise."""
    if not isinstance(config, DiTConfig):
        raise ConfigError(f"diffusers' DiTTransformer2DModel is another backbone; {_REPAIR}")
    for name in _INEXPRESSIBLE:
        value = getattr(config, name)
        if value != getattr(DiTConfig, name):
            raise ConfigError(f"{name} {value}: diffusers' DiTTransformer2DModel has no such part; {_REPAIR}")
    if (config.num_classes or 0) > NULL_CLASS:
        raise ConfigError(
            f"num_classes {config.num_classes}: diffusers' DiTPipeline takes at most {NULL_CLASS}; {_REPAIR}"
        )
    return config


def _fit_frequencies(weight: Tensor, config: DiTConfig, times: Tensor) -> Tensor:
    """Return the first weight (hidden, n) of the time embedding for the frequencies of diffusers, P^(-i/(n/2 - 1)).

    With a frequency shift of 1 they are the same. Otherwise the sines and cosines of one set of frequencies are, at `times`,
    linear combinations of those of the other, up to the precision of float32: at times in [0, 1] since every angle is small,
    and at 50 diffusion steps since they are fewer than the n combined functions.
    """
    if config.frequency_shift == 1:
        return weight
    if config.time_scale != 1:
        raise ConfigError(
            f"frequency_shift {config.frequency_shift}: diffusers' DiTTransformer2DModel has other time frequencies; "
            f"train with model.frequency_shift: 1, or {_REPAIR}"
        )
    half = weight.shape[1] // 2

    def waves(shift: int) -> Tensor:
        angles = times.double()[:, None] * MAX_PERIOD ** (-torch.arange(half, dtype=torch.float64) / (half - shift))
        return torch.cat([angles.cos(), angles.sin()], 1)  # (times, n)

    combination = torch.linalg.lstsq(
        waves(1), waves(0), rcond=1e-12, driver="gelsd"
    ).solution  # waves(1) @ it = waves(0)
    return (weight.double() @ combination.T).float()
