"""The paper's ADM U-Nets as weights of `lfm.models.unet`: the published state dicts of both forms.

    EDM               enc.32x32_block0.conv0.weight, map_layer0.weight, ...: unconditional and class-conditional models
    guided-diffusion  input_blocks.1.0.in_layers.2.weight, time_embed.0.weight, ...: inpainting and semantic synthesis

Both compute what `lfm.models.unet` computes. Names differ, and the order of the rows of the attention's projection: ours are
queries, keys and values, each by heads; EDM's are heads, channels, then query, key and value; guided-diffusion's are heads,
then query, key and value, then channels. Their time is ours, unscaled.

Semantic synthesis takes four channels more: the one-hot segmentation, averaged over the pixels of each latent element and
projected without bias. This rescaler, whose weights the paper's code leaves as they were initialized, is in a file of its own.
It is an embedding of labels in four of our channels, and a convolution that takes their mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from lfm.errors import CheckpointError, ConfigError
from lfm.models.config import LABEL_CHANNELS
from lfm.models.unet_config import BlockShape, UNetConfig

EDM_CLASSES = "map_label.weight"
EDM_KEY, GUIDED_KEY = "map_layer0.weight", "time_embed.0.weight"
EDM_HEAD_CHANNELS = 64  # of each attention head, in the published code
GUIDED_NUM_HEADS = 4  # the published code's default
GUIDED_CLASSES = "label_emb.weight"
GUIDED_INPUT = "input_blocks.0.0.weight"
GUIDED_TIME_BIAS = "time_embed.2.bias"
RESCALER = "channel_mapper.weight"  # (channels, labels, 1, 1)

_EDM_ENDS = {
    "map_layer0": "time_embedding.mlp.0",
    "map_layer1": "time_embedding.mlp.2",
    "out_norm": "output_norm",
    "out_conv": "output",
}
_EDM_BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "modulation",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "skip",
    "norm2": "attention_norm",
    "qkv": "attention.qkv",
    "proj": "attention.projection",
}
_GUIDED_ENDS = {
    "time_embed.0": "time_embedding.mlp.0",
    "time_embed.2": "time_embedding.mlp.2",
    "input_blocks.0.0": "input",
    "out.0": "output_norm",
    "out.2": "output",
}
_GUIDED_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "modulation",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
}
_GUIDED_ATTENTION = {"norm": "attention_norm", "qkv": "attention.qkv", "proj_out": "attention.projection"}
_GUIDED_RESAMPLING = {"op": "conv", "conv": "conv"}


def is_unet(state: dict[str, Tensor]) -> bool:
    """Return whether a state dict, without the prefix `module.`, is that of one of the two forms."""
    return EDM_KEY in state or GUIDED_KEY in state


def unet_from_state_dict(
    state: dict[str, Tensor],
    *,
    latent_size: int | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    downsample_factor: int = 8,
) -> tuple[dict[str, Tensor], UNetConfig]:
    """Convert a published state dict to weights and configuration of a `lfm.models.unet.UNet`.

    Args:
        state: parameters by their published names, without the prefix `module.`; for semantic synthesis with those of the
            rescaler, or else its four channels are a condition that the caller computes.
        latent_size: height and width of the latents; needed for guided-diffusion's form, whose names do not tell it.
        num_heads: attention heads, where they are not the published code's: one for every 64 channels in EDM's form, 4 in
            guided-diffusion's.
        num_classes: by default as in the checkpoint; 0 makes the model unconditional, which needs a null class, or one class.
        downsample_factor: pixels per latent element along each side, of segmentations.

    Returns:
        weights by our names, float32, and the configuration. Channels of the input beyond those of the output are
        condition channels.

    Raises:
        CheckpointError: a parameter is missing.
        ConfigError: `latent_size` is needed, or contradicts the names, or `num_classes` does not fit.
    """
    state = _without_classes(state, num_classes)
    form = _EdmForm(state, latent_size) if EDM_KEY in state else _GuidedForm(state, latent_size)
    config = form.config(num_heads)
    if num_classes not in (None, config.num_classes or 0):
        raise ConfigError(f"`num_classes` {num_classes}: the checkpoint has {config.num_classes or 'no'} classes")
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    if RESCALER in state:
        config = replace(config, num_labels=state[RESCALER].shape[1], downsample_factor=downsample_factor)
        weights |= _segmentation_embedding(state[RESCALER].float(), downsample_factor)
        used.add(RESCALER)
    for theirs, ours in form.names(config):
        for kind in ("weight", "bias"):
            name = f"{theirs}.{kind}"
            if name in state:
                value = state[name].float()
                if ours.endswith("attention.qkv"):
                    channels = len(value) // 3
                    value = form.order_qkv(value, config.heads_of(channels))
                if ours.endswith(("attention.qkv", "attention.projection")) and kind == "weight":
                    value = value.flatten(1)  # a 1 x 1 convolution as a linear layer
                if f"{ours}.{kind}" == "input.weight" and config.num_labels:  # our other channels of a label are 0
                    value = functional.pad(value, (0, 0, 0, 0, 0, config.input_channels - value.shape[1]))
                weights[f"{ours}.{kind}"] = value
                used.add(name)
    ignored = {name for name in state if name.endswith("resample_filter")}
    if unknown := sorted(set(state) - used - ignored):
        raise CheckpointError(f"{unknown[0]}: no such parameter in the paper's ADM U-Nets")
    return weights, config


def _without_classes(state: dict[str, Tensor], num_classes: int | None) -> dict[str, Tensor]:
    """Return the state dict without its classes, if `num_classes` is 0, or if its only class is no condition."""
    if num_classes == 0 and EDM_CLASSES in state:  # the null class is 0
        return {name: value for name, value in state.items() if name != EDM_CLASSES}
    if not num_classes and GUIDED_CLASSES in state and len(state[GUIDED_CLASSES]) == 1:
        rest = {name: value for name, value in state.items() if name != GUIDED_CLASSES}
        return rest | {GUIDED_TIME_BIAS: state[GUIDED_TIME_BIAS] + state[GUIDED_CLASSES][0]}
    return state


def _segmentation_embedding(rescaler: Tensor, factor: int) -> dict[str, Tensor]:
    """Return the weights of a `SegmentationEmbedding` that computes what a rescaler (channels, labels, 1, 1) does."""
    table = functional.pad(rescaler[:, :, 0, 0].T, (0, LABEL_CHANNELS - len(rescaler)))  # (labels, LABEL_CHANNELS)
    mean = torch.eye(LABEL_CHANNELS)[:, :, None, None].repeat(1, 1, factor, factor) / factor**2
    return {
        "segmentation_embedding.table.weight": table.contiguous(),
        "segmentation_embedding.shrink.weight": mean,
        "segmentation_embedding.shrink.bias": torch.zeros(LABEL_CHANNELS),
    }


class _EdmForm:
    """The names and shapes of EDM's form, whose names tell the resolution of each block."""

    def __init__(self, state: dict[str, Tensor], latent_size: int | None) -> None:
        self.state = state
        sizes = {int(match[1]) for name in state if (match := re.match(r"enc\.(\d+)x\d+_", name))}
        if not sizes:
            raise CheckpointError("enc.*: missing parameters")
        self.sizes = sorted(sizes, reverse=True)
        if latent_size not in (None, self.sizes[0]):
            raise ConfigError(f"`latent_size` {latent_size}: the checkpoint's names say {self.sizes[0]}")

    def config(self, num_heads: int | None) -> UNetConfig:
        """Return the configuration that names and shapes of the weights tell; `num_heads` where they do not."""
        channels = _get(self.state, EDM_KEY).shape[1]
        blocks = [_get(self.state, f"enc.{size}x{size}_block0.conv0.weight") for size in self.sizes]
        first = _get(self.state, f"enc.{self.sizes[0]}x{self.sizes[0]}_conv.weight")
        latent_channels = len(_get(self.state, "out_conv.weight"))
        labels = self.state.get(EDM_CLASSES)
        pattern = rf"enc\.{self.sizes[0]}x\d+_block(\d+)\.conv0\.weight"
        return UNetConfig(
            latent_channels,
            self.sizes[0],
            model_channels=channels,
            channel_multipliers=tuple(len(weight) // channels for weight in blocks),
            num_blocks=sum(1 for name in self.state if re.fullmatch(pattern, name)),
            attention_resolutions=tuple(
                size for size in self.sizes if f"enc.{size}x{size}_block0.qkv.weight" in self.state
            ),
            num_heads=num_heads,
            head_channels=None if num_heads else EDM_HEAD_CHANNELS,
            condition_channels=first.shape[1] - latent_channels,
            num_classes=None if labels is None else labels.shape[1],
            condition_dropout=0.0 if labels is None else 0.1,  # the null class is 0 in this form, trained or not
            class_embedding="projection",
            time_scale=1.0,
        )

    def names(self, config: UNetConfig) -> Iterator[tuple[str, str]]:
        """Yield the published and our name of each layer."""
        size = config.latent_size
        yield f"enc.{size}x{size}_conv", "input"
        yield "map_label", "class_embedding.projection"
        yield from _EDM_ENDS.items()
        sections = (
            ("enc", "encoder", config.encoder_blocks),
            ("dec", "middle", config.middle_blocks),
            ("dec", "decoder", config.decoder_blocks),
        )
        for theirs, ours, blocks in sections:
            numbers = dict.fromkeys(self.sizes, 0)
            for index, shape in enumerate(blocks):
                block = str(shape.resample)
                if not shape.resample:
                    block = f"{'in' if ours == 'middle' else 'block'}{numbers[shape.size]}"
                    numbers[shape.size] += 1
                for layer, our_layer in _EDM_BLOCK.items():
                    yield f"{theirs}.{shape.size}x{shape.size}_{block}.{layer}", f"{ours}.{index}.{our_layer}"

    @staticmethod
    def order_qkv(value: Tensor, heads: int) -> Tensor:
        """(heads, channels, 3) -> (3, heads, channels) in the first axis."""
        return value.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)


class _GuidedForm:
    """The names and shapes of guided-diffusion's form, whose blocks are numbered."""

    def __init__(self, state: dict[str, Tensor], latent_size: int | None) -> None:
        self.state = state
        if latent_size is None:
            raise ConfigError("set `latent_size`: the checkpoint does not tell the size of its latents")
        self.latent_size = latent_size

    def config(self, num_heads: int | None) -> UNetConfig:
        """Return the network that names and shapes of the tensors belong to, as `_EdmForm.config` does."""
        state = self.state
        channels = _get(state, GUIDED_KEY).shape[1]
        latent_channels = len(_get(state, "out.2.weight"))
        labels = state.get(GUIDED_CLASSES)
        rescaled = len(state[RESCALER]) if RESCALER in state else 0
        num_blocks, num_levels = self._blocks_and_levels()
        first_blocks = [f"input_blocks.{1 + level * (num_blocks + 1)}" for level in range(num_levels)]
        widths = [len(_get(state, f"{block}.0.in_layers.2.weight")) for block in first_blocks]
        strided = any(name.endswith(".0.op.weight") for name in state)
        return UNetConfig(
            latent_channels,
            self.latent_size,
            model_channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            num_blocks=num_blocks,
            attention_resolutions=tuple(
                self.latent_size >> level
                for level, block in enumerate(first_blocks)
                if f"{block}.1.qkv.weight" in state
            ),
            num_heads=num_heads or GUIDED_NUM_HEADS,
            resampling="convolution" if strided else "residual",
            scale_shift_norm=len(_get(state, "input_blocks.1.0.emb_layers.1.weight")) == 2 * widths[0],
            condition_channels=_get(state, GUIDED_INPUT).shape[1] - latent_channels - rescaled,
            num_classes=None if labels is None else len(labels),
            time_scale=1.0,
        )

    def _blocks_and_levels(self) -> tuple[int, int]:
        """Return the number of encoder blocks of a level, and of levels.

        Each level of the decoder has one block more than the encoder's, and the last of them is followed by upsampling.
        """
        upsampling = [
            int(match[1])
            for name in self.state
            if (match := re.fullmatch(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.2)\.weight", name))
        ]
        outputs = {int(match[1]) for name in self.state if (match := re.match(r"output_blocks\.(\d+)\.", name))}
        num_blocks = min(upsampling, default=len(outputs) - 1)
        return num_blocks, len(outputs) // (num_blocks + 1)

    def names(self, config: UNetConfig) -> Iterator[tuple[str, str]]:
        """Yield the published and our name of each layer."""
        yield "label_emb", "class_embedding.table"
        yield from _GUIDED_ENDS.items()
        for index, shape in enumerate(config.encoder_blocks):
            yield from _guided_block(f"input_blocks.{index + 1}", f"encoder.{index}", shape)
        yield from _layers("middle_block.0", "middle.0", _GUIDED_RESIDUAL)
        yield from _layers("middle_block.1", "middle.0", _GUIDED_ATTENTION)
        yield from _layers("middle_block.2", "middle.1", _GUIDED_RESIDUAL)
        number = -1
        attention = False  # of the block before
        for index, shape in enumerate(config.decoder_blocks):
            ours = f"decoder.{index}"
            if shape.resample:  # the last layer of the block before
                theirs = f"output_blocks.{number}.{2 if attention else 1}"
                yield from _layers(theirs, ours, _GUIDED_RESIDUAL | _GUIDED_RESAMPLING)
            else:
                number, attention = number + 1, shape.attention
                yield from _guided_block(f"output_blocks.{number}", ours, shape)

    @staticmethod
    def order_qkv(value: Tensor, heads: int) -> Tensor:
        """(heads, 3, channels) -> (3, heads, channels) in the first axis."""
        return value.unflatten(0, (heads, 3, -1)).movedim(1, 0).flatten(0, 2)


def _guided_block(theirs: str, ours: str, shape: BlockShape) -> Iterator[tuple[str, str]]:
    yield from _layers(f"{theirs}.0", ours, _GUIDED_RESIDUAL | _GUIDED_RESAMPLING)
    if shape.attention:
        yield from _layers(f"{theirs}.1", ours, _GUIDED_ATTENTION)


def _layers(theirs: str, ours: str, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    for their_layer, our_layer in names.items():
        yield f"{theirs}.{their_layer}", f"{ours}.{our_layer}"


def _get(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CheckpointError(f"{name}: missing; not one of the paper's ADM U-Nets")
    return state[name]
