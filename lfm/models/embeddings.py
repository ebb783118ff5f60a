"""Numbers as vectors of the network's width: time and class; position, as such a vector or as a rotation; a map of class
ids as channels of the latent.

    time       MLP([cos(a_1), ..., cos(a_n), sin(a_1), ..., sin(a_n)]),  a_i = scale t P^(-i/(n - shift)),  i = 0 .. n - 1
    class      one learned row per class, and one more for the null class
    map        one learned row per label, and one more for no label, then a convolution whose kernel and stride are the
               pixels of one latent: where in its cell a border runs is heard. It is a linear map of the one-hot map,
               of low rank, at a cost in memory and weights that does not grow with the number of labels
    position   [e(column), e(row)],  e(p) = [sin(p w_0), ..., sin(p w_m), cos(p w_0), ..., cos(p w_m)],
               w_i = P^(-i/m),  m = width / 4 frequencies
    rotation   queries and keys turned by the angles [row w_0, ..., row w_m, column w_0, ..., column w_m], m = head_dim / 4

P = 10000, the longest period over 2 pi; n = half the frequency size. Peebles & Xie 2022; the scale is ours: a time in
[0, 1] times 1000 lets most frequencies vary, while 1 is what the paper's own checkpoints were trained with. Their shift is
0, and that of diffusers' DiT 1. The rotation is that of Su et al. 2021 (RoPE) in two dimensions: the product of a query and
a key depends on their positions through the difference of these alone.
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
        """cos, then sin, of the angles of `time` (B,): float32 (B, frequency_size)."""
        half = self.frequency_size // 2
        exponent = torch.arange(half, dtype=torch.float32, device=time.device) / (half - self.shift)
        angles = self.scale * time.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponent)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(self.frequencies(time).to(next(self.parameters()).dtype))


class ClassEmbedding(nn.Module):
    """Class index int64 (B,) -> (B, hidden_size); index `num_classes` is the null class, where `with_null`."""

    def __init__(self, num_classes: int, hidden_size: int, with_null: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + int(with_null), hidden_size)

    def forward(self, class_index: Tensor) -> Tensor:
        return self.table(class_index)


class SegmentationEmbedding(nn.Module):
    """Class ids int64 (B, H, W) -> (B, LABEL_CHANNELS, H / factor, W / factor); id `num_labels` is none, `with_null`."""

    def __init__(self, num_labels: int, factor: int, with_null: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(num_labels + int(with_null), LABEL_CHANNELS)
        self.shrink = nn.Conv2d(LABEL_CHANNELS, LABEL_CHANNELS, kernel_size=factor, stride=factor)

    def forward(self, segmentation: Tensor) -> Tensor:
        return self.shrink(self.table(segmentation).movedim(-1, 1))


def sincos_position_embedding(hidden_size: int, height: int, width: int) -> Tensor:
    """The embedding of a grid's points, row by row: float32 (height * width, hidden_size), a multiple of 4."""
    assert hidden_size % 4 == 0, f"hidden_size {hidden_size}"
    count = hidden_size // 4
    frequencies = MAX_PERIOD ** (-torch.arange(count, dtype=torch.float64) / count)
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def grid_coordinates(height: int, width: int) -> Tensor:
    """Row and column of a grid's points, row by row: int64 (height * width, 2). Integers keep their values in a bf16 model."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


def rotation_of(coordinates: Tensor, head_dim: int) -> Tensor:
    """Cosine and sine by which `rotate` turns heads at `coordinates` (tokens, 2): float32 (2, tokens, 1, head_dim / 2).

    head_dim is a multiple of 4.
    """
    assert head_dim % 4 == 0, f"head_dim {head_dim}"
    count = head_dim // 4
    frequencies = MAX_PERIOD ** (-torch.arange(count, dtype=torch.float32, device=coordinates.device) / count)
    angles = (coordinates[..., None] * frequencies).flatten(-2)  # (tokens, head_dim / 2)
    return torch.stack([angles.cos(), angles.sin()])[:, :, None]


def rotate(vectors: Tensor, rotation: Tensor) -> Tensor:
    """`vectors` (B, tokens, heads, head_dim), each pair (i, i + head_dim / 2) turned by its angle, in float32."""
    cos, sin = rotation  # (tokens, 1, head_dim / 2) or (B, tokens, 1, head_dim / 2)
    first, second = vectors.float().chunk(2, -1)  # (B, tokens, heads, head_dim / 2)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(vectors.dtype)
