"""The ADM U-Net of Dhariwal & Nichol 2021, as the second velocity network of Dao et al. 2023.

    e         = W2 silu(W1 waves(time)) + class embedding
    residual  h = conv(r(silu(n(x))));   h = n(h) (1 + a) + b,   (a, b) = W silu(e)
              x = skip(r(x)) + conv(dropout(silu(h)))
    attention x += W softmax(q k^T / sqrt(d)) v,   (q, k, v) = W n(x)
    encoder   residual blocks, halving height and width between levels; decoder the reverse, each block on its input and
              the output of the encoder's block of the same shape; velocity = conv(silu(n(x)))

n is a group norm; conv a 3 x 3 convolution; r resamples where a block changes the resolution: the mean of 2 x 2 elements,
or each element four times; skip a 1 x 1 convolution where the number of channels changes. The last convolution of each
branch and of the network is zero at the start, so every block begins as its skip connection and the first velocity is 0.

One network expresses both forms in the paper's code: that of Karras et al. 2022 (EDM) for its unconditional and
class-conditional models, and that of guided-diffusion for inpainting and semantic synthesis. They differ in the number of
heads, in how levels are connected and in the class embedding; see `lfm.models.unet_config`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, one_hot, silu
from torch.utils.checkpoint import checkpoint

from lfm.models.adaptation import (
    Adaptation,
    adapt_class_projection,
    adapt_class_table,
    adapt_input_channels,
    adapt_segmentation,
)
from lfm.models.attention import SelfAttention
from lfm.models.embeddings import ClassEmbedding, SegmentationEmbedding, TimeEmbedding
from lfm.models.network import VelocityNetwork
from lfm.models.unet_config import BlockShape, UNetConfig, num_groups
from lfm.types import Condition


class UNet(VelocityNetwork):
    """ADM U-Net; see the module and `VelocityNetwork`."""

    config: UNetConfig
    input_layer = "input"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        embedding, with_null = config.embedding_channels, config.has_null_condition
        self.time_embedding = TimeEmbedding(embedding, config.model_channels, config.time_scale, config.frequency_shift)
        self.class_embedding: nn.Module | None = None
        if config.num_classes is not None and config.class_embedding == "projection":
            self.class_embedding = ClassProjection(config.num_classes, embedding)
        elif config.num_classes is not None:
            self.class_embedding = ClassEmbedding(config.num_classes, embedding, with_null)
        self.segmentation_embedding = None
        if config.num_labels is not None:
            self.segmentation_embedding = SegmentationEmbedding(config.num_labels, config.downsample_factor, with_null)
        self.input = nn.Conv2d(config.input_channels, config.first_channels, 3, padding=1)
        self.encoder = nn.ModuleList(build_block(shape, config) for shape in config.encoder_blocks)
        self.middle = nn.ModuleList(build_block(shape, config) for shape in config.middle_blocks)
        self.decoder = nn.ModuleList(build_block(shape, config) for shape in config.decoder_blocks)
        self.output_norm = nn.GroupNorm(num_groups(config.first_channels), config.first_channels)
        self.output = nn.Conv2d(config.first_channels, config.latent_channels, 3, padding=1)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialize as both forms of the paper's code: the last layer of each branch and the output zero, rows of classes
        and labels standard normal, all else uniform within 1 / sqrt(fan in), torch's default.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("output.") or ".conv2." in name or ".attention.projection." in name:
                nn.init.zeros_(parameter)
            elif name.startswith("class_embedding") or name == "segmentation_embedding.table.weight":
                nn.init.normal_(parameter)

    def forward(
        self,
        state: Tensor,
        time: Tensor,
        condition: Condition,
        kept_tokens: Tensor | None = None,
        return_tokens: tuple[int, ...] = (),
        internal: bool = False,
        latent: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """See `VelocityNetwork.forward`."""
        assert kept_tokens is None and not internal and not latent, "the U-Net has no token dropout, and one velocity"
        self.check_inputs(state, condition)
        signal = self.time_embedding(time)  # (B, embedding)
        if self.class_embedding is not None:
            signal = signal + self.class_embedding(condition.class_index)  # (B, embedding)
        signal = silu(signal)  # (B, embedding)
        features = self.input(self._concatenate(state, condition))  # (B, first channels, h, w)
        skips = [features]
        outputs = []  # of each block: (B, channels, h / 2^level, w / 2^level)
        for block, shape in zip(self.encoder, self.config.encoder_blocks, strict=True):
            features = self._run(block, shape, features, signal)
            skips.append(features)
            outputs.append(features)
        for block, shape in zip(self.middle, self.config.middle_blocks, strict=True):
            features = self._run(block, shape, features, signal)
            outputs.append(features)
        for block, shape in zip(self.decoder, self.config.decoder_blocks, strict=True):
            if shape.skip_channels:
                features = torch.cat([features, skips.pop()], 1)  # (B, channels + skip channels, ...)
            features = self._run(block, shape, features, signal)
            outputs.append(features)
        velocity = self.output(silu(self.output_norm(features))).float()  # (B, C, h, w)
        if not return_tokens:
            return velocity
        return velocity, tuple(outputs[index].flatten(2).transpose(1, 2) for index in return_tokens)

    def compile_blocks(self, **options: Any) -> None:
        for block in [*self.encoder, *self.middle, *self.decoder]:
            block.compile(**options)

    def hidden_matrices(self) -> dict[str, int]:
        layers = ("conv", "conv1", "conv2", "skip", "attention.qkv", "attention.projection")
        names = [name for name, _ in self.named_parameters() if name.startswith(("encoder.", "middle.", "decoder."))]
        return {
            name: 3 if name.endswith(".qkv.weight") else 1
            for name in names
            if name.endswith(tuple(f".{layer}.weight" for layer in layers))
        }

    @staticmethod
    def adapt(adaptation: Adaptation) -> None:
        """See `VelocityNetwork.adapt`; the rules are those of input channels and of the class projection."""
        adapt_input_channels(adaptation, "input.weight")
        if "class_embedding.projection.weight" in {**adaptation.initial, **adaptation.weights}:
            adapt_class_projection(adaptation, "class_embedding.projection.weight")
        else:
            adapt_class_table(adaptation, "class_embedding.table.weight", "time_embedding.mlp.2.bias")
        adapt_segmentation(adaptation, "segmentation_embedding")
        if adaptation.config.latent_size != adaptation.source.latent_size:
            adaptation.note(
                "size",
                f"convolutions over {adaptation.config.latent_size} elements in place of "
                f"{adaptation.source.latent_size}",
            )

    def _concatenate(self, state: Tensor, condition: Condition) -> Tensor:
        """Concatenate the state and the conditions that lie over it: (B, input channels, h, w)."""
        inputs = [state]
        if condition.spatial is not None:
            inputs.append(condition.spatial)  # (B, K, h, w)
        if self.segmentation_embedding is not None:
            inputs.append(self.segmentation_embedding(condition.segmentation))  # (B, label channels, h, w)
        joined = torch.cat(inputs, 1).to(self.input.weight.dtype)
        return joined.contiguous(memory_format=torch.channels_last) if self.config.channels_last else joined

    def _run(self, block: nn.Module, shape: BlockShape, features: Tensor, signal: Tensor) -> Tensor:
        if shape.level < self.config.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, features, signal, use_reentrant=False)
        return block(features, signal)


def build_block(shape: BlockShape, config: UNetConfig) -> nn.Module:
    """Build the block of a shape: a residual block, or a convolution that resamples."""
    if shape.resample and config.resampling == "convolution":
        return ResamplingConvolution(shape)
    return ResidualBlock(shape, config)


class ResidualBlock(nn.Module):
    """A residual block with an optional change of resolution, and optional attention after it."""

    def __init__(self, shape: BlockShape, config: UNetConfig) -> None:
        super().__init__()
        self.shape, self.scale_shift_norm = shape, config.scale_shift_norm
        inputs, outputs = shape.in_channels, shape.out_channels
        self.norm1 = nn.GroupNorm(num_groups(inputs), inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(config.embedding_channels, outputs * (2 if config.scale_shift_norm else 1))
        self.norm2 = nn.GroupNorm(num_groups(outputs), outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.attention_norm = self.attention = None
        if shape.attention:
            self.attention_norm = nn.GroupNorm(num_groups(outputs), outputs)
            self.attention = SelfAttention(outputs, config.heads_of(outputs), config.attention)

    def forward(self, features: Tensor, signal: Tensor) -> Tensor:
        """Return features (B, out, h', w') of features (B, in, h, w) and the embedded time and class, (B, width)."""
        hidden = resample(silu(self.norm1(features)), self.shape)  # (B, in, h', w')
        hidden = self.conv1(hidden)  # (B, out, h', w')
        modulation = self.modulation(signal)[:, :, None, None]  # (B, out or 2 out, 1, 1)
        if self.scale_shift_norm:
            scale, shift = modulation.chunk(2, 1)  # (B, out, 1, 1)
            hidden = self.norm2(hidden) * (1 + scale) + shift  # (B, out, h', w')
        else:
            hidden = self.norm2(hidden + modulation)  # (B, out, h', w')
        hidden = self.conv2(self.dropout(silu(hidden)))  # (B, out, h', w')
        features = self.skip(resample(features, self.shape)) + hidden  # (B, out, h', w')
        if self.attention is None or self.attention_norm is None:
            return features
        tokens = self.attention_norm(features).flatten(2).transpose(1, 2)  # (B, h' w', out)
        mixed = self.attention(tokens).transpose(1, 2)  # (B, out, h' w')
        return features + mixed.reshape(features.shape)


class ResamplingConvolution(nn.Module):
    """A 3 x 3 convolution that halves height and width, or follows their doubling."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        stride = 2 if shape.resample == "down" else 1
        self.conv = nn.Conv2d(shape.in_channels, shape.out_channels, 3, stride=stride, padding=1)

    def forward(self, features: Tensor, signal: Tensor) -> Tensor:
        if self.shape.resample == "up":
            features = resample(features, self.shape)  # (B, channels, 2h, 2w)
        return self.conv(features)


class ClassProjection(nn.Module):
    """Class index int64 (B,) -> (B, channels): a projection of the one-hot class; index `num_classes`, the null class,
    is 0 and has no weights (Karras et al. 2022).
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(num_classes, channels, bias=False)

    def forward(self, class_index: Tensor) -> Tensor:
        num_classes = self.projection.in_features
        classes = one_hot(class_index, num_classes + 1)[:, :num_classes]  # (B, num_classes)
        return self.projection(classes.to(self.projection.weight.dtype))


def resample(features: Tensor, shape: BlockShape) -> Tensor:
    """Change the resolution of (B, channels, h, w) as a block does: halve it by the mean, double it by repetition, or not."""
    if shape.resample == "down":
        return avg_pool2d(features, 2)
    if shape.resample == "up":
        return interpolate(features, scale_factor=2.0, mode="nearest")
    return features
