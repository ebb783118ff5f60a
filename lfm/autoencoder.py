"""Autoencoders of diffusers: pixels -> posterior -> latents -> pixels.

The posterior is stored unscaled. The model is trained on latents = (sample - shift) * scale_factor, with both numbers from
the configuration of the autoencoder (Rombach et al., 2022). An autoencoder is identified by a hash of its weights.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm import storage
from lfm.data.manifest import AutoencoderRecord
from lfm.errors import ConfigError, DataError, on_one_line
from lfm.precision import float32_arithmetic, precision_on, weights_dtype
from lfm.types import Posterior

EMBEDDED = "embedded"
LARGEST_FLOAT16 = 60_000.0
# Keys under which autoencoders list the levels of the encoder, each at half the resolution of the one before.
LARGEST_NUMBER, MOST_VALUES = 65_536, 16  # in config.json
STATISTICS = ("latents_mean", "latents_std")  # which have a value for each channel
BLOCKS = ("block_out_channels", "down_block_out_channels", "encoder_block_out_channels")


def embedded_path() -> Path:
    """Return the folder of the autoencoder that is installed with the package."""
    return Path(str(files("lfm") / "assets" / "autoencoder"))


class Autoencoder:
    """A frozen diffusers autoencoder in eval mode.

    Args:
        model: AutoencoderKL or another diffusers autoencoder with `encode` and `decode`.
        name: embedded, a path or a hub id.
        precision: fp32, tf32 or bf16; that of the weights of `model`.
    """

    def __init__(self, model: Any, name: str, precision: str = "fp32") -> None:
        self.model, self.name, self.precision = model.eval().requires_grad_(False), name, precision
        config = model.config
        if "latent_channels" not in config or not any(key in config for key in BLOCKS):
            raise ConfigError(f"autoencoder {name}: is a {type(model).__name__}, not an autoencoder")
        self.scale_factor = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.latent_channels = int(config["latent_channels"])
        blocks = next(config[key] for key in BLOCKS if key in config)
        self.downsample_factor = 2 ** (len(blocks) - 1)
        self.content_hash = content_hash(model, self.scale_factor, self.shift)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    def latent_size(self, image_size: int) -> int:
        """Return the height and width of the latents of images of this size.

        Raises:
            ConfigError: the size is not divisible by the downsample factor.
        """
        if image_size % self.downsample_factor:
            raise ConfigError(
                f"`image_size` {image_size}: not divisible by the autoencoder's downsample factor "
                f"{self.downsample_factor}; choose another"
            )
        return image_size // self.downsample_factor

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Posterior:
        """Return the posterior of uint8 images (B, 3, H, W), on the device of the autoencoder."""
        with float32_arithmetic(self.precision, self.device):
            encoded = self.model.encode(to_unit_range(images.to(self.device)).to(self.model.dtype))
        if hasattr(encoded, "latent_dist"):
            return Posterior(encoded.latent_dist.mean.float(), encoded.latent_dist.std.float())
        latent = (encoded.latent if hasattr(encoded, "latent") else encoded.latents).float()
        return Posterior(latent, torch.zeros_like(latent))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to uint8 images (B, 3, H, W), rounded to the nearest level."""
        return to_levels(self.pixels(latents))

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to pixels (B, 3, H, W) of about [-1, 1], with gradients."""
        unscaled = latents.to(self.device) / self.scale_factor + self.shift
        with float32_arithmetic(self.precision, self.device):
            return self.model.decode(unscaled.to(self.model.dtype)).sample


def to_unit_range(images: Tensor) -> Tensor:
    """Return uint8 levels as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_levels(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as uint8 levels, rounded, since truncation would darken every image by half a level."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def content_hash(model: torch.nn.Module, scale_factor: float, shift: float) -> str:
    """Return a SHA-256 over name, shape and float32 values of every weight, and over scale factor and shift."""
    sha256 = hashlib.sha256(f"{type(model).__name__} {scale_factor!r} {shift!r}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha256.update(f"{name} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return sha256.hexdigest()


def load(
    name: str, device: torch.device | str = "cpu", precision: str = "fp32", *, may_download: bool = True
) -> Autoencoder:
    """Load an autoencoder by path or hub id, the one named embedded, or the `vae` of a whole diffusers pipeline.

    Args:
        name: embedded, a path or a hub id.
        device: for the weights.
        precision: fp32, tf32 or bf16.
        may_download: whether `name` comes from the user, so that the Hub may be asked for it. Otherwise only what is on this
            machine is loaded, and only from safetensors.

    Raises:
        ConfigError: the precision is unknown, or there is no such autoencoder, or not all of its weights match, which
            diffusers itself only logs.
    """
    precision = precision_on(device, precision)
    location = str(embedded_path()) if name == EMBEDDED else name
    subfolder = {"subfolder": "vae"} if (Path(location) / "vae" / "config.json").is_file() else {}
    options = {} if may_download else {"local_files_only": True, "use_safetensors": True}
    if "/" not in location and not Path(location).exists():
        raise ConfigError(
            f"autoencoder {name}: no such folder; name one, or an id of the Hub, which has the form USER/NAME, or {EMBEDDED}"
        )
    diffusers = import_diffusers()
    try:
        config = diffusers.AutoencoderKL.load_config(location, **subfolder, local_files_only=not may_download)
        if not isinstance(config, dict):
            raise ConfigError(f"autoencoder {name}: its config.json is not a mapping")
        model_class: Any = getattr(diffusers, str(config.get("_class_name")), None)
        if diffusers.ModelMixin not in getattr(model_class, "__mro__", ()):
            raise ConfigError(f"autoencoder {name}: its config.json names no model of diffusers")
        _check_config(config, name)
        _check_integers(model_class, config, name)
        _check_size(model_class, config, Path(location) / subfolder.get("subfolder", ""), name)
        model, info = model_class.from_pretrained(
            location, **subfolder, **options, low_cpu_mem_usage=False, output_loading_info=True
        )
    except ConfigError:
        raise
    except Exception as error:  # diffusers documents no exception types
        missing = (
            "" if Path(name).exists() else " (there is no such folder, and as an id of the Hub it needs a network)"
        )
        raise ConfigError(f"autoencoder {name}: cannot be loaded{missing}: {on_one_line(error)}") from error
    wrong = {kind: keys for kind, keys in info.items() if keys and kind != "error_msgs"}
    if wrong:
        counts = ", ".join(f"{len(keys)} {kind.replace('_', ' ')}" for kind, keys in wrong.items())
        example = next(iter(next(iter(wrong.values()))))
        raise ConfigError(f"autoencoder {name}: its weights do not match its config.json: {counts}, such as {example}")
    loaded = Autoencoder(model, name, precision)  # before the cast, since the hash is of float32 weights
    # The `to` of diffusers warns of every cast. Channels last, since convolutions are a third faster that way.
    torch.nn.Module.to(  # type: ignore[call-overload]
        model, device, weights_dtype(precision), memory_format=torch.channels_last
    )
    return loaded


def _check_config(config: dict[str, Any], name: str) -> None:
    """Raise ConfigError, naming the key, if a number of config.json is out of any sensible range."""
    for key, value in config.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            limit = 100 if key.startswith("layers_per") else LARGEST_NUMBER
            if isinstance(number, int | float) and not 0 <= abs(number) <= limit:
                raise ConfigError(f"autoencoder {name}: config.json: {key} {number}: out of range")
        if isinstance(value, list | tuple) and len(value) > MOST_VALUES and key not in STATISTICS:
            raise ConfigError(f"autoencoder {name}: config.json: {key}: {len(value)} values, more than {MOST_VALUES}")
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    if not isinstance(scale, int | float) or not scale > 0:
        raise ConfigError(f"autoencoder {name}: config.json: scaling_factor {scale}: must be above 0")
    if not isinstance(shift, int | float):
        raise ConfigError(f"autoencoder {name}: config.json: shift_factor {shift}: must be a number")


def _check_integers(model_class: Any, config: dict[str, Any], name: str) -> None:
    """Raise ConfigError, naming the key, if diffusers builds a network of the numbers, but cannot run it on images.

    Numbers that are counts must be integers: a GroupNorm of 0.5 groups is built and fails when it runs.
    """
    for key, parameter in inspect.signature(model_class.__init__).parameters.items():
        defaults = parameter.default if isinstance(parameter.default, tuple) else (parameter.default,)
        if key not in config or not all(type(default) is int for default in defaults):
            continue
        for value in config[key] if isinstance(config[key], list | tuple) else [config[key]]:
            if not (value is None or type(value) is int):
                raise ConfigError(f"autoencoder {name}: config.json: {key} {value}: must be an integer")
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise ConfigError(f"autoencoder {name}: config.json: {key} {config[key]}: must be 3, since images are RGB")


def _check_size(model_class: Any, config: dict[str, Any], folder: Path, name: str) -> None:
    """Raise ConfigError if a local folder's files cannot hold the weights that config.json describes."""
    sizes = storage.sizes(str(folder)) if folder.is_dir() else {}
    if not sizes:
        return
    with torch.device("meta"):
        model = model_class.from_config(config)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    if num_weights > sum(sizes.values()):  # at least a byte each
        raise ConfigError(
            f"autoencoder {name}: its weights do not match its config.json: that describes {num_weights:,}, more than its "
            "files hold"
        )


def _is_on_this_machine(name: str) -> bool:
    """Return whether a name from a file is a folder, or a Hub id in the local cache; no URL is asked."""
    if Path(name).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "vae/config.json"))
    except HFValidationError:
        return False


def load_recorded(
    record: AutoencoderRecord, name: str | None, device: torch.device | str, user: str, precision: str = "fp32"
) -> Autoencoder:
    """Load the autoencoder of a record.

    Args:
        record: from a manifest or a weights file; its name is looked up on this machine only, never downloaded.
        name: path or hub id, if the autoencoder has moved.
        device: for the weights.
        user: owner of the latents, for the message.
        precision: fp32, tf32 or bf16.

    Raises:
        ConfigError: the autoencoder is not that of the record.
    """
    if name is None and record.name != EMBEDDED and not _is_on_this_machine(record.name):
        raise ConfigError(
            f"{user}: its latents are of the autoencoder {record.name} ({record.content_hash[:12]}), which is not on this "
            "machine; name it with `autoencoder`"
        )
    autoencoder = load(name or record.name, device, precision, may_download=name is not None)
    if autoencoder.content_hash != record.content_hash:
        raise ConfigError(
            f"autoencoder {autoencoder.name} ({autoencoder.content_hash[:12]}): the latents of {user} are of "
            f"{record.name} ({record.content_hash[:12]}); name that one with `autoencoder`"
        )
    return autoencoder


def import_diffusers() -> Any:
    """Import diffusers without the warning of the xformers that it imports, which has no CPU operators."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    import diffusers

    return diffusers


def check_storable(posterior: Posterior, keys: list[str]) -> None:
    """Raise DataError, naming the first image, if its posterior is beyond the range of float16."""
    magnitude = torch.maximum(posterior.mean.abs(), posterior.std).flatten(1).amax(1)
    bad = torch.nonzero(~(magnitude < LARGEST_FLOAT16)).flatten().tolist()
    if bad:
        raise DataError(
            f"sample {keys[bad[0]]}: its latent reaches {magnitude[bad[0]].item():.3g}, more than float16 holds; "
            "encode in another precision or with another autoencoder"
        )
