"""The Inception network of the original FID in PyTorch.

Inception-v3 (Szegedy et al. 2016) as in the TensorFlow graph of 2015-12-05. It differs from torchvision's in five ways:
1,008 classes; average pools that exclude the padding; a max pool instead of an average pool in the last block; images
resized to 299 pixels by TensorFlow 1's bilinear rule, which aligns corners instead of centres; and logits without the bias
of the last layer. Parameter names are those of `pt_inception-2015-12-05-6726825d.pth`, published by pytorch-fid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 299
PUBLISHED = "6726825d"  # first digits of the sha256 of the published weights
NUM_CLASSES = 1008

# A branch: parameter name -> channels, kernel size and, unless it is 1, stride of each convolution. Convolutions whose
# names end in `a` and `b` read the same input, and their outputs are concatenated.
Branch = dict[str, tuple]


def _block_a(pool_channels: int) -> list[Branch]:
    return [
        {"branch1x1": (64, 1)},
        {"branch5x5_1": (48, 1), "branch5x5_2": (64, 5)},
        {"branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3)},
        {"branch_pool": (pool_channels, 1)},
    ]


def _block_c(width: int) -> list[Branch]:
    return [
        {"branch1x1": (192, 1)},
        {"branch7x7_1": (width, 1), "branch7x7_2": (width, (1, 7)), "branch7x7_3": (192, (7, 1))},
        {
            "branch7x7dbl_1": (width, 1),
            "branch7x7dbl_2": (width, (7, 1)),
            "branch7x7dbl_3": (width, (1, 7)),
            "branch7x7dbl_4": (width, (7, 1)),
            "branch7x7dbl_5": (192, (1, 7)),
        },
        {"branch_pool": (192, 1)},
    ]


_BLOCK_B: list[Branch] = [
    {"branch3x3": (384, 3, 2)},
    {"branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3, 2)},
]
_BLOCK_D: list[Branch] = [
    {"branch3x3_1": (192, 1), "branch3x3_2": (320, 3, 2)},
    {
        "branch7x7x3_1": (192, 1),
        "branch7x7x3_2": (192, (1, 7)),
        "branch7x7x3_3": (192, (7, 1)),
        "branch7x7x3_4": (192, 3, 2),
    },
]
_BLOCK_E: list[Branch] = [
    {"branch1x1": (320, 1)},
    {"branch3x3_1": (384, 1), "branch3x3_2a": (384, (1, 3)), "branch3x3_2b": (384, (3, 1))},
    {
        "branch3x3dbl_1": (448, 1),
        "branch3x3dbl_2": (384, 3),
        "branch3x3dbl_3a": (384, (1, 3)),
        "branch3x3dbl_3b": (384, (3, 1)),
    },
    {"branch_pool": (192, 1)},
]
MIXED: dict[str, tuple[int, list[Branch]]] = {  # input channels and branches of each block
    "Mixed_5b": (192, _block_a(32)),
    "Mixed_5c": (256, _block_a(64)),
    "Mixed_5d": (288, _block_a(64)),
    "Mixed_6a": (288, _BLOCK_B),
    "Mixed_6b": (768, _block_c(128)),
    "Mixed_6c": (768, _block_c(160)),
    "Mixed_6d": (768, _block_c(160)),
    "Mixed_6e": (768, _block_c(192)),
    "Mixed_7a": (768, _BLOCK_D),
    "Mixed_7b": (1280, _BLOCK_E),
    "Mixed_7c": (2048, _BLOCK_E),
}
# sFID uses the first 7 channels of the first branch of TensorFlow's mixed_6 (Nash et al. 2021).
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, channels: int, width: int, kernel: int | tuple[int, int], stride: int = 1, *, padded: bool = True
    ) -> None:
        super().__init__()
        height, breadth = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, breadth // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches (B, C, h, w) -> (B, C', h', w'). A block without `branch_pool` halves the size by a max pool."""

    def __init__(self, channels: int, branches: list[Branch], *, max_pool: bool) -> None:
        super().__init__()
        self.branches = [list(branch) for branch in branches]
        self.max_pool = max_pool
        for branch in branches:
            width = channels
            for name, convolution in branch.items():
                self.add_module(name, Convolution(width, *convolution))
                width = convolution[0]

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self._branch(x, names) for names in self.branches]
        if ["branch_pool"] not in self.branches:
            outputs.append(functional.max_pool2d(x, 3, 2))
        return torch.cat(outputs, 1)

    def _branch(self, x: Tensor, names: list[str]) -> Tensor:
        if names == ["branch_pool"] and self.max_pool:
            x = functional.max_pool2d(x, 3, 1, 1)
        elif names == ["branch_pool"]:
            x = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        sides = [name for name in names if name[-1] in "ab"]
        for name in names[: len(names) - len(sides)]:
            x = self.get_submodule(name)(x)
        return torch.cat([self.get_submodule(name)(x) for name in sides], 1) if sides else x


class Inception(nn.Module):
    """Images uint8 (B, 3, H, W) of any size -> features and class probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padded=False)
        for name, (channels, branches) in MIXED.items():
            self.add_module(name, Mixed(channels, branches, max_pool=name == "Mixed_7c"))
        self.fc = nn.Linear(2048, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return float32 features of images uint8 (B, 3, H, W).

        Returns:
            Pooled features (B, 2048), spatial features (B, 2023) of 17 x 17 positions and 7 channels, and class
            probabilities (B, 1008).
        """
        x = (resize(images.float()) - 128) / 128  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = functional.max_pool2d(x, 3, 2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = functional.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        spatial = x
        for name in MIXED:
            x = self.get_submodule(name)(x)
            if name == SPATIAL_BLOCK:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # TensorFlow's order: channels last
        pooled = x.mean((2, 3))  # (B, 2048) of (B, 2048, 8, 8)
        return pooled, spatial, (pooled @ self.fc.weight.T).softmax(1)


def resize(images: Tensor) -> Tensor:
    """Resize float images (B, 3, H, W) to 299 x 299 pixels by TensorFlow 1's bilinear rule.

    Output row i samples the input at i H / 299, columns likewise.
    """
    rows, columns = (_interpolation(size).to(images) for size in images.shape[2:])
    return rows @ images @ columns.T


def _interpolation(size: int) -> Tensor:
    """Return the matrix (299, size) that resamples a line of `size` pixels."""
    positions = torch.arange(SIZE, dtype=torch.float32) * (size / SIZE)
    lower = positions.long()
    weight = (positions - lower)[:, None]
    one_hot = functional.one_hot(torch.stack([lower, (lower + 1).clamp(max=size - 1)]), size)
    return (1 - weight) * one_hot[0] + weight * one_hot[1]
