"""The Inception network of the original FID, in torch, and the inception score of what it says.

It is Inception-v3 (Szegedy et al. 2016) as the graph of 2015-12-05 has it: 1,008 classes, average pools that leave the
padding out, and a max pool where the last block should average. Images come to 299 pixels by TensorFlow 1's bilinear
resize, whose corners, not centres, coincide, and to (level - 128) / 128. The names of the parameters are those of
`pt_inception-2015-12-05-6726825d.pth`, which pytorch-fid publishes.

    inception score = exp(mean over images of KL(p(y | x) || p(y)))        p(y), the mean over a split's images

(Salimans et al. 2016). Its logits are without the last layer's bias, as in the original.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 299
PUBLISHED = "6726825d"  # the sha256 of the published weights begins so
NUM_CLASSES = 1008

# A convolution: channels, kernel, stride. A list in a branch's last place is two of them side by side.
Kernel = int | tuple[int, int]
Branches = dict[str, list]


def _a(pool: int) -> Branches:
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pool, 1)],
    }


def _c(width: int) -> Branches:
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))],
        "branch_pool": [(192, 1)],
    }


_B: Branches = {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}
_D: Branches = {
    "branch3x3": [(192, 1), (320, 3, 2)],
    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
}
_E: Branches = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), [(384, (1, 3)), (384, (3, 1))]],
    "branch3x3dbl": [(448, 1), (384, 3), [(384, (1, 3)), (384, (3, 1))]],
    "branch_pool": [(192, 1)],
}
MIXED: dict[str, tuple[int, Branches]] = {  # channels in, and what is done to them side by side
    "Mixed_5b": (192, _a(32)),
    "Mixed_5c": (256, _a(64)),
    "Mixed_5d": (288, _a(64)),
    "Mixed_6a": (288, _B),
    "Mixed_6b": (768, _c(128)),
    "Mixed_6c": (768, _c(160)),
    "Mixed_6d": (768, _c(160)),
    "Mixed_6e": (768, _c(192)),
    "Mixed_7a": (768, _D),
    "Mixed_7b": (1280, _E),
    "Mixed_7c": (2048, _E),
}
SPATIAL = "Mixed_6d"  # TensorFlow's mixed_6, whose first branch's first 7 channels make sFID (Nash et al. 2021)
SPATIAL_CHANNELS = 7


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: Kernel, stride: int = 1, *, padded: bool = True) -> None:
        super().__init__()
        height, breadth = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, breadth // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side: (B, C, h, w) -> (B, C', h', w')."""

    def __init__(self, channels: int, branches: Branches, *, max_pool: bool) -> None:
        super().__init__()
        self.branches: dict[str, list[list[str]]] = {}
        self.max_pool = max_pool
        for branch, steps in branches.items():
            width = channels
            self.branches[branch] = []
            for number, step in enumerate(steps, 1):
                name = branch if len(steps) == 1 else f"{branch}_{number}"
                sides = (
                    dict(zip((f"{name}a", f"{name}b"), step, strict=True)) if isinstance(step, list) else {name: step}
                )
                for side, convolution in sides.items():
                    self.add_module(side, Convolution(width, *convolution))
                self.branches[branch].append(list(sides))
                width = next(iter(sides.values()))[0]

    def forward(self, x: Tensor) -> Tensor:
        parts = [part for branch, steps in self.branches.items() for part in self._branch(x, branch, steps)]
        if "branch_pool" not in self.branches:
            parts.append(functional.max_pool2d(x, 3, 2))
        return torch.cat(parts, 1)

    def _branch(self, x: Tensor, branch: str, steps: list[list[str]]) -> list[Tensor]:
        if branch == "branch_pool":
            average = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            x = functional.max_pool2d(x, 3, 1, 1) if self.max_pool else average
        parts = [x]
        for names in steps:
            parts = [self.get_submodule(name)(parts[0]) for name in names]
        return parts


class InceptionOutput(NamedTuple):
    """What the metrics take from the network."""

    pooled: Tensor  # float32 (B, 2048)
    spatial: Tensor  # float32 (B, 2023): 17 x 17 places of 7 channels
    probabilities: Tensor  # float32 (B, 1008)


class Inception(nn.Module):
    """Images uint8 (B, 3, H, W) of any size -> `InceptionOutput`."""

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

    def forward(self, images: Tensor) -> InceptionOutput:
        """Features and class probabilities of images uint8 (B, 3, H, W)."""
        x = (resize(images.float()) - 128) / 128  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = functional.max_pool2d(x, 3, 2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = functional.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        spatial = x
        for name in MIXED:
            x = self.get_submodule(name)(x)
            if name == SPATIAL:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # TensorFlow's order: channels last
        pooled = x.mean((2, 3))  # (B, 2048) of (B, 2048, 8, 8)
        return InceptionOutput(pooled, spatial, (pooled @ self.fc.weight.T).softmax(1))


def resize(images: Tensor) -> Tensor:
    """Float images (B, 3, H, W) at 299 x 299 pixels by TensorFlow 1's bilinear rule: place i is read at i H / 299."""
    rows, columns = (_interpolation(size).to(images) for size in images.shape[2:])
    return rows @ images @ columns.T


def _interpolation(size: int) -> Tensor:
    """The weights (299, size) of the pixels of a line in the places of a resized one."""
    places = torch.arange(SIZE, dtype=torch.float32) * (size / SIZE)
    lower = places.long()
    weight = (places - lower)[:, None]
    one_hot = functional.one_hot(torch.stack([lower, (lower + 1).clamp(max=size - 1)]), size)
    return (1 - weight) * one_hot[0] + weight * one_hot[1]


class InceptionScore(NamedTuple):
    """Mean and deviation over the splits."""

    mean: float
    deviation: float


def inception_score(probabilities: Iterable[Tensor], total: int, num_splits: int = 10) -> InceptionScore:
    """The score of `total` images whose class probabilities (n, K) come in blocks, in their order; no split is empty."""
    num_splits = min(num_splits, total)
    borders = list(pairwise(index * total // num_splits for index in range(num_splits + 1)))
    negative_entropy = torch.zeros(num_splits, dtype=torch.float64)
    sums: list[Tensor | float] = [0.0] * num_splits
    at = 0
    for block in probabilities:
        for split, (begin, end) in enumerate(borders):
            part = block[max(0, begin - at) : max(0, end - at)].double().cpu()
            negative_entropy[split] += torch.xlogy(part, part).sum()
            sums[split] = sums[split] + part.sum(0)
        at += len(block)
    scores = []
    for split, (begin, end) in enumerate(borders):
        mean = torch.as_tensor(sums[split]) / (end - begin)
        scores.append((negative_entropy[split] / (end - begin) - torch.xlogy(mean, mean).sum()).exp())
    values = torch.stack(scores)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)))
