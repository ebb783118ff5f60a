"""Pixels -> Posterior -> latents -> pixels, by any diffusers autoencoder.

The posterior is stored unscaled; the model sees latents = (sample - shift) * scale_factor, with both numbers from the
autoencoder's own configuration (Rombach et al., 2022). Which autoencoder it is, is known by the hash of its weights.
"""

from __future__ import annotations

import hashlib
import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm.data.manifest import AutoencoderRecord
from lfm.errors import ConfigError, DataError
from lfm.types import Posterior

EMBEDDED = "embedded"
LARGEST_FLOAT16 = 60_000.0
# Where the classes' configurations list the encoder's levels, each half as large as the one before.
BLOCKS = ("block_out_channels", "down_block_out_channels", "encoder_block_out_channels")


def embedded_path() -> Path:
    """The folder of the autoencoder that comes with the package."""
    return Path(str(files("lfm") / "assets" / "autoencoder"))


class Autoencoder:
    """A frozen diffusers autoencoder in eval mode.

    Args:
        model: AutoencoderKL or another diffusers autoencoder with `encode` and `decode`.
        name: `embedded`, a path or a hub id: how it is found again.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model.eval().requires_grad_(False), name
        config = model.config
        if "latent_channels" not in config or not any(key in config for key in BLOCKS):
            raise ConfigError(f"autoencoder {name}: is a {type(model).__name__}, which is no autoencoder")
        self.scale_factor = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.latent_channels = int(config["latent_channels"])
        blocks = next(config[key] for key in BLOCKS if key in config)
        self.downsample_factor = 2 ** (len(blocks) - 1)
        self.content_hash = content_hash(model, self.scale_factor, self.shift)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    def latent_size(self, image_size: int) -> int:
        """The height and width of the latents of images of this size.

        Raises:
            ConfigError: the size is not divisible by the downsample factor.
        """
        if image_size % self.downsample_factor:
            raise ConfigError(
                f"image size {image_size}: not divisible by the autoencoder's downsample factor "
                f"{self.downsample_factor}; choose another --image-size"
            )
        return image_size // self.downsample_factor

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Posterior:
        """The posterior of uint8 images (B, 3, H, W), on this autoencoder's device."""
        encoded = self.model.encode(to_unit_range(images.to(self.device)).to(self.model.dtype))
        if hasattr(encoded, "latent_dist"):
            return Posterior(encoded.latent_dist.mean.float(), encoded.latent_dist.std.float())
        latent = (encoded.latent if hasattr(encoded, "latent") else encoded.latents).float()
        return Posterior(latent, torch.zeros_like(latent))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) as uint8 images (B, 3, H, W), rounded to the nearest level."""
        return to_levels(self.pixels(latents))

    def pixels(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) as pixels (B, 3, H, W) about [-1, 1]; gradients go through."""
        unscaled = latents.to(self.device) / self.scale_factor + self.shift
        return self.model.decode(unscaled.to(self.model.dtype)).sample


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 levels as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_levels(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as uint8 levels, rounded: truncation would darken every image by half a level."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def content_hash(model: torch.nn.Module, scale_factor: float, shift: float) -> str:
    """A sha256 over every weight's name, shape and float32 value, and over scale factor and shift."""
    sha256 = hashlib.sha256(f"{type(model).__name__} {scale_factor!r} {shift!r}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha256.update(f"{name} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return sha256.hexdigest()


def load(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The autoencoder of a path, a hub id or `embedded`; of a whole diffusers pipeline, its `vae`.

    Raises:
        ConfigError: there is none, or not all of its weights match: diffusers itself would only log that, and decode
            rubbish.
    """
    location = str(embedded_path()) if name == EMBEDDED else name
    subfolder = {"subfolder": "vae"} if (Path(location) / "vae" / "config.json").is_file() else {}
    diffusers = import_diffusers()
    try:
        config = diffusers.AutoencoderKL.load_config(location, **subfolder)
        if not isinstance(config, dict):
            raise ConfigError(f"autoencoder {name}: its config.json holds no keys and values")
        model_class = getattr(diffusers, config.get("_class_name", ""), None)
        if model_class is None:
            raise ConfigError(f"autoencoder {name}: its config.json names no autoencoder that diffusers knows")
        model, info = model_class.from_pretrained(
            location, **subfolder, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"autoencoder {name}: cannot be loaded: {reason}") from error
    wrong = {kind: keys for kind, keys in info.items() if keys and kind != "error_msgs"}
    if wrong:
        counts = ", ".join(f"{len(keys)} {kind.replace('_', ' ')}" for kind, keys in wrong.items())
        example = next(iter(next(iter(wrong.values()))))
        raise ConfigError(f"autoencoder {name}: its weights do not match its config.json: {counts}, such as {example}")
    loaded = Autoencoder(model, name)  # its hash is of the float32 weights, whatever it computes in
    # diffusers' own `to` warns of every cast; channels last, since convolutions are a third faster so
    torch.nn.Module.to(model, device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return loaded


def load_recorded(record: AutoencoderRecord, name: str | None, device: torch.device | str, user: str) -> Autoencoder:
    """The autoencoder of a record, found under `name` if it has moved, and no other.

    Raises:
        ConfigError: it is another one; names both, and whose latents `user` has.
    """
    found = load(name or record.name, device)
    if found.content_hash != record.content_hash:
        raise ConfigError(
            f"autoencoder {found.name} ({found.content_hash[:12]}): the latents of {user} are of {record.name} "
            f"({record.content_hash[:12]}); name that one with --autoencoder"
        )
    return found


def import_diffusers() -> Any:
    """diffusers, without the warning of the xformers that it imports on its own and that has no CPU operators."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    import diffusers

    return diffusers


def check_storable(posterior: Posterior, keys: list[str]) -> None:
    """Refuse latents that float16 cannot hold.

    Raises:
        DataError: names the first such image.
    """
    magnitude = torch.maximum(posterior.mean.abs(), posterior.std).flatten(1).amax(1)
    bad = torch.nonzero(~(magnitude < LARGEST_FLOAT16)).flatten().tolist()
    if bad:
        raise DataError(
            f"sample {keys[bad[0]]}: its latent reaches {magnitude[bad[0]].item():.3g}, more than float16 holds; "
            "encode in another precision or with another autoencoder"
        )
