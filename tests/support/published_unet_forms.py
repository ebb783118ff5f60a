"""The two published forms of the ADM U-Net as plain functions of a state dict with their parameter names.

Written from the layer equations in float64, independently of `lfm.models.unet`: nothing here is shared with it.

    EDM              Karras et al. 2022, "DhariwalUNet": enc.32x32_block0.conv0.weight, map_layer0.weight, ...
    guided-diffusion Dhariwal & Nichol 2021: input_blocks.1.0.in_layers.2.weight, time_embed.0.weight, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What decides the published networks' layers."""

    size: int = 8
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    num_blocks: int = 2
    attention: tuple[int, ...] = (4,)  # latent sizes
    heads: int | None = None  # guided-diffusion's; EDM has one for each `head_channels` channels
    head_channels: int = 16
    num_classes: int = 0
    residual_resampling: bool = False  # guided-diffusion's resblock_updown


class Recorder:
    """Makes each weight at its first use, so that the forward pass itself says which weights there are."""

    def __init__(self, weights: Weights | None = None, seed: int = 0) -> None:
        self.weights: Weights = {} if weights is None else weights
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self.weights:
            fan_in = max(1, math.prod(shape[1:]))
            noise = torch.randn(*shape, generator=self.random, dtype=torch.float64)
            self.weights[name] = noise / math.sqrt(fan_in) if len(shape) > 1 else 0.3 * noise
        assert self.weights[name].shape == shape, f"{name}: {tuple(self.weights[name].shape)}, expected {shape}"
        return self.weights[name].double()


def sigmoid_linear(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def group_norm(w: Recorder, name: str, x: Tensor, groups: int) -> Tensor:
    channels = x.shape[1]
    grouped = x.reshape(len(x), groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped - mean).square().mean(2, keepdim=True)
    normed = ((grouped - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape)
    return normed * w(f"{name}.weight", channels)[:, None, None] + w(f"{name}.bias", channels)[:, None, None]


def convolution(w: Recorder, name: str, x: Tensor, out: int, kernel: int, stride: int = 1) -> Tensor:
    weight = w(f"{name}.weight", out, x.shape[1], kernel, kernel)
    return conv2d(x, weight, w(f"{name}.bias", out), stride=stride, padding=kernel // 2)


def linear(w: Recorder, name: str, x: Tensor, out: int) -> Tensor:
    return x @ w(f"{name}.weight", out, x.shape[-1]).T + w(f"{name}.bias", out)


def waves(time: Tensor, channels: int) -> Tensor:
    half = channels // 2
    frequencies = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    angles = time.double()[:, None] * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], 1)


def halve(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(B, heads, d, N) each -> (B, heads, d, N)."""
    logits = torch.einsum("bhdq,bhdk->bhqk", queries, keys) / math.sqrt(queries.shape[2])
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhdk->bhdq", weights, values)


# --- EDM -----------------------------------------------------------------------------------------------------------


def edm_groups(channels: int) -> int:
    return min(32, channels // 4)


def edm_block(
    w: Recorder,
    name: str,
    x: Tensor,
    signal: Tensor,
    out: int,
    shape: Shape,
    *,
    change: Callable[[Tensor], Tensor] | None = None,
    attend: bool = False,
) -> Tensor:
    original, change = x, change or (lambda value: value)
    hidden = change(sigmoid_linear(group_norm(w, f"{name}.norm0", x, edm_groups(x.shape[1]))))
    hidden = convolution(w, f"{name}.conv0", hidden, out, 3)
    scale, shift = linear(w, f"{name}.affine", signal, 2 * out)[:, :, None, None].chunk(2, 1)
    hidden = sigmoid_linear(shift + group_norm(w, f"{name}.norm1", hidden, edm_groups(out)) * (scale + 1))
    hidden = convolution(w, f"{name}.conv1", hidden, out, 3)
    original = change(original)
    if original.shape[1] != out:
        original = convolution(w, f"{name}.skip", original, out, 1)
    x = hidden + original
    if attend:
        batch, channels, height, width = x.shape
        heads = out // shape.head_channels
        qkv = convolution(w, f"{name}.qkv", group_norm(w, f"{name}.norm2", x, edm_groups(out)), 3 * out, 1)
        qkv = qkv.reshape(batch, heads, channels // heads, 3, height * width)  # channel, then query, key or value
        mixed = attention(qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]).reshape(x.shape)
        x = convolution(w, f"{name}.proj", mixed, out, 1) + x
    return x


def edm_forward(w: Recorder, shape: Shape, time: Tensor, x: Tensor, classes: Tensor | None = None) -> Tensor:
    """The EDM form at state x (B, in_channels, size, size) and time (B,); a class of -1 is dropped."""
    embedding = 4 * shape.model_channels
    signal = sigmoid_linear(linear(w, "map_layer0", waves(time, shape.model_channels), embedding))
    signal = linear(w, "map_layer1", signal, embedding)
    if classes is not None:
        hot = torch.zeros(len(classes), shape.num_classes, dtype=torch.float64)
        for row, index in enumerate(classes.tolist()):
            if index >= 0:
                hot[row, index] = 1
        signal = signal + hot @ w("map_label.weight", embedding, shape.num_classes).T
    signal = sigmoid_linear(signal)
    skips, x = [], x.double()
    for level, multiplier in enumerate(shape.multipliers):
        size, out = shape.size >> level, shape.model_channels * multiplier
        if level == 0:
            x = convolution(w, f"enc.{size}x{size}_conv", x, out, 3)
        else:
            x = edm_block(w, f"enc.{size}x{size}_down", x, signal, x.shape[1], shape, change=halve)
        skips.append(x)
        for index in range(shape.num_blocks):
            name = f"enc.{size}x{size}_block{index}"
            x = edm_block(w, name, x, signal, out, shape, attend=size in shape.attention)
            skips.append(x)
    for level in reversed(range(len(shape.multipliers))):
        size, out = shape.size >> level, shape.model_channels * shape.multipliers[level]
        if level == len(shape.multipliers) - 1:
            x = edm_block(w, f"dec.{size}x{size}_in0", x, signal, x.shape[1], shape, attend=True)
            x = edm_block(w, f"dec.{size}x{size}_in1", x, signal, x.shape[1], shape)
        else:
            x = edm_block(w, f"dec.{size}x{size}_up", x, signal, x.shape[1], shape, change=double)
        for index in range(shape.num_blocks + 1):
            x = torch.cat([x, skips.pop()], 1)
            name = f"dec.{size}x{size}_block{index}"
            x = edm_block(w, name, x, signal, out, shape, attend=size in shape.attention)
    x = sigmoid_linear(group_norm(w, "out_norm", x, edm_groups(x.shape[1])))
    return convolution(w, "out_conv", x, shape.out_channels, 3)


# --- guided-diffusion ------------------------------------------------------------------------------------------------


def guided_groups(channels: int) -> int:
    return min(32, channels // 4)  # 32 in the published code, whose narrowest layer has 128 channels or more


def guided_block(
    w: Recorder, name: str, x: Tensor, signal: Tensor, out: int, change: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    change = change or (lambda value: value)
    hidden = change(sigmoid_linear(group_norm(w, f"{name}.in_layers.0", x, guided_groups(x.shape[1]))))
    hidden = convolution(w, f"{name}.in_layers.2", hidden, out, 3)
    scale, shift = linear(w, f"{name}.emb_layers.1", sigmoid_linear(signal), 2 * out)[:, :, None, None].chunk(2, 1)
    hidden = group_norm(w, f"{name}.out_layers.0", hidden, guided_groups(out)) * (1 + scale) + shift
    hidden = convolution(w, f"{name}.out_layers.3", sigmoid_linear(hidden), out, 3)
    x = change(x)
    if x.shape[1] != out:
        x = convolution(w, f"{name}.skip_connection", x, out, 1)
    return x + hidden


def guided_attention(w: Recorder, name: str, x: Tensor, heads: int) -> Tensor:
    batch, channels = x.shape[:2]
    flat = group_norm(w, f"{name}.norm", x, guided_groups(channels)).reshape(batch, channels, -1)
    weight = w(f"{name}.qkv.weight", 3 * channels, channels, 1)[:, :, 0]
    qkv = torch.einsum("oc,bcn->bon", weight, flat) + w(f"{name}.qkv.bias", 3 * channels)[None, :, None]
    qkv = qkv.reshape(batch, heads, 3, channels // heads, -1)  # head, then query, key and value
    mixed = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(batch, channels, -1)
    weight = w(f"{name}.proj_out.weight", channels, channels, 1)[:, :, 0]
    out = torch.einsum("oc,bcn->bon", weight, mixed) + w(f"{name}.proj_out.bias", channels)[None, :, None]
    return x + out.reshape(x.shape)


def guided_forward(w: Recorder, shape: Shape, time: Tensor, x: Tensor, classes: Tensor | None = None) -> Tensor:
    """guided-diffusion's form at state x (B, in_channels, size, size) and time (B,)."""
    embedding, heads = 4 * shape.model_channels, shape.heads or 1
    signal = linear(w, "time_embed.0", waves(time, shape.model_channels), embedding)
    signal = linear(w, "time_embed.2", sigmoid_linear(signal), embedding)
    if classes is not None:
        signal = signal + w("label_emb.weight", shape.num_classes, embedding)[classes]
    number, last = 1, len(shape.multipliers) - 1
    x = convolution(w, "input_blocks.0.0", x.double(), shape.model_channels * shape.multipliers[0], 3)
    skips = [x]
    for level, multiplier in enumerate(shape.multipliers):
        size, out = shape.size >> level, shape.model_channels * multiplier
        for _ in range(shape.num_blocks):
            x = guided_block(w, f"input_blocks.{number}.0", x, signal, out)
            if size in shape.attention:
                x = guided_attention(w, f"input_blocks.{number}.1", x, heads)
            skips.append(x)
            number += 1
        if level != last:
            if shape.residual_resampling:
                x = guided_block(w, f"input_blocks.{number}.0", x, signal, out, halve)
            else:
                x = convolution(w, f"input_blocks.{number}.0.op", x, out, 3, stride=2)
            skips.append(x)
            number += 1
    x = guided_block(w, "middle_block.0", x, signal, x.shape[1])
    x = guided_attention(w, "middle_block.1", x, heads)
    x = guided_block(w, "middle_block.2", x, signal, x.shape[1])
    number = 0
    for level in range(last, -1, -1):
        size, out = shape.size >> level, shape.model_channels * shape.multipliers[level]
        for index in range(shape.num_blocks + 1):
            part = 1
            x = guided_block(w, f"output_blocks.{number}.0", torch.cat([x, skips.pop()], 1), signal, out)
            if size in shape.attention:
                x = guided_attention(w, f"output_blocks.{number}.{part}", x, heads)
                part += 1
            if level and index == shape.num_blocks:
                if shape.residual_resampling:
                    x = guided_block(w, f"output_blocks.{number}.{part}", x, signal, out, double)
                else:
                    x = convolution(w, f"output_blocks.{number}.{part}.conv", double(x), out, 3)
            number += 1
    x = sigmoid_linear(group_norm(w, "out.0", x, guided_groups(x.shape[1])))
    return convolution(w, "out.2", x, shape.out_channels, 3)
