"""Embeddings of time, class, position and segmentation map.

    time       MLP([cos(a_1), ..., cos(a_n), sin(a_1), ..., sin(a_n)]),  a_i = scale t P^(-i/(n - shift)),  i = 0 .. n - 1
    class      one learned row per class, and one for the null class
    map        one learned row per label, and one for no label, then a convolution whose kernel and stride are the pixels
               of one latent element, which keeps the position of borders within it. It is a low-rank linear map of the
               one-hot map, with memory and weights that do not grow with the number of labels
    position   [e(column), e(row)],  e(p) = [sin(p w_0), ..., sin(p w_m), cos(p w_0), ..., cos(p w_m)],
               w_i = P^(-i/m),  m = width / 4 frequencies
    rotation   queries and keys rotated by the angles [row w_0, ..., row w_m, column w_0, ..., column w_m],
               m = head_dim / 4

P = 10000 is the longest period over 2 pi, and n is half the frequency size (Peebles & Xie 2022). The scale is ours: with
times of [0, 1] times 1000 most frequencies vary. The paper's own checkpoints were trained with a scale of 1. Their shift
is 0, and that of diffusers' DiT is 1. The rotation is that of Su et al. 2021 (RoPE) in two dimensions: the product of a
query and a key depends on their positions only through the difference of the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lfm.models.config import LABEL_CHANNELS

MAX_PERIOD = 10000.0


class TimeEmbedding(nn.Module):
    """Time (B,) -> (B, hidden_size), in the dtype of the weights; frequencies and angles are float32."""

    def __init__(self, hidden_size: int, frequency_size: int = 256, scale: float = 1000.0, shift: int = 0) -> None:
        super().__init__()
        assert frequency_size % 2 == 0, f"frequency_size {frequency_size}"
        self.frequency_size = frequency_size
        self.scale, self.shift = scale, shift
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def frequencies(self, time: Tensor) -> Tensor:
        """Return the cosines, then the sines of the angles of `time` (B,): float32 (B, frequency_size)."""
        half = self.frequency_size // 2
        exponent = torch.arange(half, dtype=torch.float32, device=time.device) / (half - self.shift)  # (half,)
        angles = self.scale * time.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponent)  # (B, half)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(self.frequencies(time).to(next(self.parameters()).dtype))  # (B, hidden_size)


class ClassEmbedding(nn.Module):
    """Class index int64 (B,) -> (B, hidden_size); with `with_null`, index `num_classes` is the null class."""

    def __init__(self, num_classes: int, hidden_size: int, with_null: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + int(with_null), hidden_size)

    def forward(self, class_index: Tensor) -> Tensor:
        return self.table(class_index)  # (B, hidden_size)


class SegmentationEmbedding(nn.Module):
    """Class ids int64 (B, H, W) -> (B, LABEL_CHANNELS, H / factor, W / factor).

    With `with_null`, id `num_labels` is no label.
    """

    def __init__(self, num_labels: int, factor: int, with_null: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(num_labels + int(with_null), LABEL_CHANNELS)
        self.shrink = nn.Conv2d(LABEL_CHANNELS, LABEL_CHANNELS, kernel_size=factor, stride=factor)

    def forward(self, segmentation: Tensor) -> Tensor:
        embedded = self.table(segmentation).movedim(-1, 1)  # (B, LABEL_CHANNELS, H, W)
        return self.shrink(embedded)  # (B, LABEL_CHANNELS, H / factor, W / factor)


def sincos_position_embedding(hidden_size: int, height: int, width: int) -> Tensor:
    """Return the embedding of the points of a grid, row by row: float32 (height * width, hidden_size), a multiple of 4."""
    assert hidden_size % 4 == 0, f"hidden_size {hidden_size}"
    count = hidden_size // 4
    frequencies = MAX_PERIOD ** (-torch.arange(count, dtype=torch.float64) / count)
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    angles = [coordinate.reshape(-1, 1) * frequencies for coordinate in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def grid_coordinates(height: int, width: int) -> Tensor:
    """Return row and column of the points of a grid, row by row: int64 (height * width, 2).

    As integers they keep their values when a model is converted to bfloat16.
    """
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


def rotation_of(coordinates: Tensor, head_dim: int) -> Tensor:
    """Return the cosines and sines with which `rotate` rotates heads at `coordinates` (tokens, 2).

    Returns:
        float32 (2, tokens, 1, head_dim / 2); head_dim is a multiple of 4.
    """
    assert head_dim % 4 == 0, f"head_dim {head_dim}"
    count = head_dim // 4
    frequencies = MAX_PERIOD ** (-torch.arange(count, dtype=torch.float32, device=coordinates.device) / count)
    angles = (coordinates[..., None] * frequencies).flatten(-2)  # (tokens, head_dim / 2)
    return torch.stack([angles.cos(), angles.sin()])[:, :, None]


def rotate(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair (i, i + head_dim / 2) of `vectors` (B, tokens, heads, head_dim) by its angle, in float32."""
    cos, sin = rotation  # (tokens, 1, head_dim / 2) or (B, tokens, 1, head_dim / 2)
    first, second = vectors.float().chunk(2, -1)  # (B, tokens, heads, head_dim / 2)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(vectors.dtype)
