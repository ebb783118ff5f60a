"""Each part of the ADM U-Net against its equations in float64, as both published forms compute it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, silu

from lfm.models.embeddings import ClassEmbedding, TimeEmbedding
from lfm.models.unet import ClassProjection, ResamplingConvolution, ResidualBlock, UNet
from lfm.models.unet_config import BlockShape, UNetConfig
from lfm.types import Condition
from tests.support import published_unet_forms as published
from tests.support.published_unet_forms import Recorder, Shape

CONFIG = UNetConfig(4, 8, model_channels=16, channel_multipliers=(1, 2), attention_resolutions=(), head_channels=16)
EXACT = {"atol": 1e-5, "rtol": 1e-5}
EDM_LAYERS = {
    "norm1": "norm0",
    "conv1": "conv0",
    "modulation": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "skip": "skip",
}
EDM_ATTENTION = {"attention_norm": "norm2", "attention.qkv": "qkv", "attention.projection": "proj"}
GUIDED_LAYERS = {
    "norm1": "0.in_layers.0",
    "conv1": "0.in_layers.2",
    "modulation": "0.emb_layers.1",
    "norm2": "0.out_layers.0",
    "conv2": "0.out_layers.3",
    "skip": "0.skip_connection",
}
GUIDED_ATTENTION = {"attention_norm": "1.norm", "attention.qkv": "1.qkv", "attention.projection": "1.proj_out"}
RESAMPLINGS = {None: None, "down": published.halve, "up": published.double}


def block_inputs(channels: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Return features (3, channels, size, size) and an embedding of time and class (3, 64), before its SiLU."""
    random = torch.Generator().manual_seed(3)
    features = torch.randn(3, channels, size, size, generator=random, dtype=torch.float64)
    return features, torch.randn(3, CONFIG.embedding_channels, generator=random, dtype=torch.float64)


def block_with(shape: BlockShape, config: UNetConfig, recorder: Recorder, layers: dict[str, str]) -> ResidualBlock:
    """Return a block with recorded weights; `layers` are their names by ours."""
    block = ResidualBlock(shape, config).double()
    weights = {
        f"{ours}.{kind}": recorder.weights[f"{theirs}.{kind}"].double()
        for ours, theirs in layers.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in recorder.weights
    }
    for name, parameter in block.named_parameters():
        weights[name] = weights[name].reshape(parameter.shape)
    block.load_state_dict(weights)
    return block


@pytest.mark.parametrize("resample", RESAMPLINGS)
@pytest.mark.parametrize("outputs", [32, 48])
def test_a_residual_block_of_both_forms(resample: str | None, outputs: int) -> None:
    features, embedding = block_inputs(32)
    size = {None: 8, "down": 4, "up": 16}[resample]
    shape = BlockShape(32, outputs, size, 0, resample=resample)
    change = RESAMPLINGS[resample]
    edm, guided = Recorder(), Recorder()
    expected = published.edm_block(edm, "b", features, silu(embedding), outputs, Shape(), change=change)
    block = block_with(shape, CONFIG, edm, {ours: f"b.{theirs}" for ours, theirs in EDM_LAYERS.items()})
    torch.testing.assert_close(block(features, silu(embedding)), expected, **EXACT)
    expected = published.guided_block(guided, "b.0", features, embedding, outputs, change)
    block = block_with(shape, CONFIG, guided, {ours: f"b.{theirs}" for ours, theirs in GUIDED_LAYERS.items()})
    torch.testing.assert_close(block(features, silu(embedding)), expected, **EXACT)


def test_a_residual_block_that_adds_time_and_class() -> None:
    features, embedding = block_inputs(32)
    config = replace(CONFIG, scale_shift_norm=False)
    block = ResidualBlock(BlockShape(32, 32, 8, 0), config).double()
    weights = {name: value.detach() for name, value in block.named_parameters()}
    recorder = Recorder({f"b.{name}": value for name, value in weights.items()})
    hidden = silu(published.group_norm(recorder, "b.norm1", features, 8))
    hidden = published.convolution(recorder, "b.conv1", hidden, 32, 3)
    hidden = hidden + published.linear(recorder, "b.modulation", embedding, 32)[:, :, None, None]
    hidden = silu(published.group_norm(recorder, "b.norm2", hidden, 8))
    expected = features + published.convolution(recorder, "b.conv2", hidden, 32, 3)
    torch.testing.assert_close(block(features, embedding), expected, **EXACT)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_of_both_forms(heads: int) -> None:
    features, embedding = block_inputs(32, size=4)
    shape = BlockShape(32, 32, 4, 0, attention=True)
    config = replace(CONFIG, num_heads=heads, head_channels=None)
    edm, guided = Recorder(), Recorder()
    form = Shape(head_channels=32 // heads)
    expected = published.edm_block(edm, "b", features, silu(embedding), 32, form, attend=True)
    for kind in (
        "weight",
        "bias",
    ):  # (heads, channels, query or key or value) -> (query or key or value, heads, channels)
        rows = edm.weights[f"b.qkv.{kind}"]
        edm.weights[f"b.qkv.{kind}"] = rows.reshape(heads, 32 // heads, 3, -1).permute(2, 0, 1, 3).reshape(rows.shape)
    layers = EDM_LAYERS | EDM_ATTENTION
    block = block_with(shape, config, edm, {ours: f"b.{theirs}" for ours, theirs in layers.items()})
    torch.testing.assert_close(block(features, silu(embedding)), expected, **EXACT)
    expected = published.guided_block(guided, "b.0", features, embedding, 32)
    expected = published.guided_attention(guided, "b.1", expected, heads)
    for kind in ("weight", "bias"):  # (heads, query or key or value, channels)
        rows = guided.weights[f"b.1.qkv.{kind}"]
        moved = rows.reshape(heads, 3, 32 // heads, -1).permute(1, 0, 2, 3)
        guided.weights[f"b.1.qkv.{kind}"] = moved.reshape(rows.shape)
    layers = GUIDED_LAYERS | GUIDED_ATTENTION
    block = block_with(shape, config, guided, {ours: f"b.{theirs}" for ours, theirs in layers.items()})
    torch.testing.assert_close(block(features, silu(embedding)), expected, **EXACT)


@pytest.mark.parametrize("resample", ["down", "up"])
def test_convolutions_that_resample(resample: str) -> None:
    features, embedding = block_inputs(8)
    layer = ResamplingConvolution(BlockShape(8, 8, 4 if resample == "down" else 16, 1, resample=resample)).double()
    weight, bias = layer.conv.weight, layer.conv.bias
    if resample == "down":
        expected = conv2d(features, weight, bias, padding=1)[:, :, ::2, ::2]
    else:
        expected = conv2d(published.double(features), weight, bias, padding=1)
    torch.testing.assert_close(layer(features, embedding), expected, **EXACT)


def test_the_time_embedding_of_both_forms() -> None:
    time = torch.tensor([0.0, 0.37, 1.0])
    for form in (("map_layer0", "map_layer1"), ("time_embed.0", "time_embed.2")):
        recorder = Recorder()
        hidden = silu(published.linear(recorder, form[0], published.waves(time, 16), 64))
        expected = published.linear(recorder, form[1], hidden, 64)
        embedding = TimeEmbedding(64, 16, scale=1.0, shift=0).double()
        names = (("mlp.0", form[0]), ("mlp.2", form[1]))
        weights = {
            f"{ours}.{k}": recorder.weights[f"{theirs}.{k}"] for ours, theirs in names for k in ("weight", "bias")
        }
        embedding.load_state_dict(weights)
        torch.testing.assert_close(embedding(time), expected, **EXACT)


def test_the_class_embedding_of_both_forms() -> None:
    weight = torch.randn(64, 5, dtype=torch.float64)
    classes = torch.tensor([0, 4, 5])
    projection = ClassProjection(5, 64).double()
    projection.load_state_dict({"projection.weight": weight})
    expected = torch.stack([weight[:, 0], weight[:, 4], torch.zeros(64, dtype=torch.float64)])
    torch.testing.assert_close(projection(classes), expected, **EXACT)
    table = ClassEmbedding(5, 64, with_null=False).double()
    table.load_state_dict({"table.weight": weight.T})
    torch.testing.assert_close(table(classes[:2]), expected[:2], **EXACT)


def test_conditions_are_channels_after_those_of_the_state() -> None:
    network = UNet(replace(CONFIG, condition_channels=5, num_labels=3, downsample_factor=2)).double()
    state, spatial = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 5, 8, 8, dtype=torch.float64)
    labels = torch.randint(3, (2, 16, 16))
    joined = network._concatenate(state, Condition(spatial=spatial, segmentation=labels))
    embedding = network.segmentation_embedding
    assert embedding is not None
    of_pixels = embedding.table.weight[labels].permute(0, 3, 1, 2)  # (2, 8, 16, 16)
    elements = of_pixels.unfold(2, 2, 2).unfold(3, 2, 2)  # (2, 8, 8, 8, 2, 2)
    embedded = torch.einsum("bcijyx,dcyx->bdij", elements, embedding.shrink.weight)
    embedded = embedded + embedding.shrink.bias[:, None, None]
    torch.testing.assert_close(joined, torch.cat([state, spatial, embedded], 1), **EXACT)
