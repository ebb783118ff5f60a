"""`lfm autoencoder`: train or fine-tune a diffusers AutoencoderKL on raw shards (Kingma and Welling, 2014).

    loss = |x - y| + 2 (x - y)^2 + kl_weight KL(posterior || standard normal)

x, the image in [-1, 1]; y, the reconstruction of one draw from its posterior; all means over their elements. The
weights that are kept are an exponential moving average. The scale factor is what gives the latents unit deviation.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfm import storage
from lfm.autoencoder import import_diffusers, to_levels, to_unit_range
from lfm.autoencoder import load as load_autoencoder
from lfm.data import manifest as manifests
from lfm.data.latent_shards import read_raw
from lfm.data.stream.sample_order import Order
from lfm.errors import CheckpointError, ConfigError, DataError
from lfm.storage.cache import Cache
from lfm.training.ema import Ema, decay_after
from lfm.world import World
from pipelines.common import factory
from pipelines.common.progress import Progress
from pipelines.data.data_options import AutoencoderConfig

STATE = "training.pt"
CONFIG = "config.json"
FILES = r"training\.pt|config\.json|recipe\.json|diffusion_pytorch_model\.safetensors"
SCALE_IMAGES = 512  # that the scale factor is measured on


@dataclass(frozen=True)
class AutoencoderResult:
    """What was made; the PSNR is None where nothing was left to do, and after a dry run."""

    plan: str
    psnr: float | None


def run(config: AutoencoderConfig, world: World) -> AutoencoderResult:
    """Train to `num_steps`, from where a killed run of the same command stopped, and write DEST in diffusers' format.

    Raises:
        ConfigError, DataError, CheckpointError: before training, wherever it can be known before.
    """
    if not storage.is_local(config.dest):
        raise ConfigError(f"{config.dest}: an autoencoder is written to a local folder; copy it afterwards")
    if config.batch_size % len(config.raws):
        raise ConfigError(
            f"--batch-size {config.batch_size}: must be a multiple of the {len(config.raws)} sets of shards"
        )
    if config.precision not in factory.DTYPES:
        raise ConfigError(f"--precision {config.precision}: unknown; one of {', '.join(factory.DTYPES)}")
    images = [ShardImages(raw, config.seed, factory.cache(config.cache)) for raw in config.raws]
    if len({source.manifest.image_size for source in images}) > 1:
        raise ConfigError(f"{', '.join(config.raws)}: are of different image sizes; shard them at one")
    model = _model(config, images[0].manifest.image_size)
    count = sum(parameter.numel() for parameter in model.parameters())
    plan = (
        f"{config.num_steps:,} steps of {config.batch_size} images from {', '.join(config.raws)}, {count:,} parameters, "
        f"{'new' if config.initialize_from is None else config.initialize_from} -> {config.dest}"
    )
    if config.dry_run:
        return AutoencoderResult(plan, None)
    manifests.claim(config.dest, _recipe(config, images), overwrite=config.overwrite, owned=FILES)
    if storage.exists(storage.join(config.dest, CONFIG)):
        return AutoencoderResult(f"{plan}: is there already", None)
    trainer = Trainer(config, model, images, factory.device(world))
    psnr = trainer.run()
    trainer.export()
    return AutoencoderResult(plan, psnr)


class ShardImages:
    """The images of raw shards in the order of `Order`: any position can be asked for."""

    def __init__(self, folder: str, seed: int, cache: Cache) -> None:
        self.folder, self.cache = folder, cache
        self.manifest = manifests.load(folder, "raw")
        self.order = Order([shard.samples for shard in self.manifest.shards], seed, window=1)
        self._decoded = lru_cache(maxsize=2)(self._decode)

    def at(self, position: int, count: int) -> Tensor:
        """uint8 (count, 3, H, W)."""
        shards, rows = self.order.at(position, count)
        images = np.stack([self._decoded(int(shard))[row] for shard, row in zip(shards, rows, strict=True)])
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def _decode(self, index: int) -> np.ndarray:
        """All images of a shard: uint8 (samples, H, W, 3)."""
        shard = self.manifest.shards[index]
        path = storage.join(self.folder, shard.name)
        with self.cache.fetch(path, shard.bytes, shard.crc32, verify_local=True).open("rb") as stream:
            return np.stack([sample.image for sample in read_raw(stream, path)])


class Trainer:
    """The optimization, resumable."""

    def __init__(
        self, config: AutoencoderConfig, model: Any, images: Sequence[ShardImages], device: torch.device
    ) -> None:
        self.config, self.model, self.images, self.device = config, model.to(device).train(), images, device
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
        self.ema = Ema(self.parameters)
        self.step = 0
        self.state_path = Path(config.dest) / STATE
        if self.state_path.exists():
            self._resume()

    def run(self) -> float | None:
        """Train; returns the PSNR of the last images in dB, or None where no step was left to do."""
        psnr = None
        with Progress("autoencoder", self.config.num_steps, "steps", done=self.step) as bar:
            while self.step < self.config.num_steps:
                psnr = self._train_step(self._batch(self.step))
                self.step += 1
                if self.step % self.config.save_every == 0:
                    self._save()
                bar.advance(1, psnr=f"{psnr:.2f} dB")
        return psnr

    def export(self) -> None:
        """Write the averaged weights, with the scale factor that they need."""
        with self.ema.in_place():
            model = copy.deepcopy(self.model).eval()
        total = squares = values = 0.0
        with torch.inference_mode():
            for start in range(0, SCALE_IMAGES, self.config.batch_size):
                mean = model.encode(self._batch(start // self.config.batch_size)).latent_dist.mean.double()
                total, squares, values = total + mean.sum(), squares + (mean**2).sum(), values + mean.numel()
        deviation = math.sqrt(squares / values - (total / values) ** 2)
        model.register_to_config(scaling_factor=round(1 / deviation, 5))
        storage.sweep(self.config.dest)
        with tempfile.TemporaryDirectory(dir=self.config.dest, prefix=storage.TEMPORARY_PREFIX) as folder:
            model.save_pretrained(folder)
            written = sorted(
                Path(folder).iterdir(), key=lambda path: path.name == CONFIG
            )  # what makes it complete, last
            for path in written:
                path.chmod(0o644)  # safetensors writes for the owner alone
                path.replace(Path(self.config.dest, path.name))
        self.state_path.unlink(missing_ok=True)

    def _batch(self, step: int) -> Tensor:
        """The images of a step, float32 (B, 3, H, W) in [-1, 1]."""
        share = self.config.batch_size // len(self.images)
        images = torch.cat([source.at(step * share, share) for source in self.images])
        return to_unit_range(images.to(self.device))

    def _train_step(self, images: Tensor) -> float:
        warmup, progress = min(1.0, (self.step + 1) / 50), self.step / self.config.num_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        generator = torch.Generator().manual_seed((self.config.seed << 32) + self.step)
        precision = factory.DTYPES[self.config.precision]
        with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
            posterior = self.model.encode(images).latent_dist
            mean, std, log_variance = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator).to(self.device)
            reconstruction = self.model.decode(mean + std * noise).sample
        error = reconstruction.float() - images
        divergence = 0.5 * (mean**2 + std**2 - 1 - log_variance).mean()
        loss = error.abs().mean() + 2 * (error**2).mean() + self.config.kl_weight * divergence
        if not math.isfinite(loss.item()):
            raise DataError(
                f"{self.config.dest}: the loss is {loss.item()} at step {self.step}; lower --learning-rate or --kl-weight, "
                "and give --overwrite"
            )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.update(decay_after(self.step + 1, self.config.ema_decay))
        levels = to_levels(reconstruction.detach()).float() - to_levels(images).float()
        return 10 * math.log10(255**2 / max((levels**2).mean().item(), 1e-9))

    def _save(self) -> None:
        with self.ema.in_place():
            average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": average,
            "optimizer": self.optimizer.state_dict(),
        }
        with storage.writing(str(self.state_path)) as temporary:
            torch.save(state, temporary)

    def _resume(self) -> None:
        try:
            state = torch.load(self.state_path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["average"])
            self.ema.restart()
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        except Exception as error:  # pickle raises anything
            raise CheckpointError(f"{self.state_path}: cannot be read; remove it to begin again") from error


def _recipe(config: AutoencoderConfig, images: Sequence[ShardImages]) -> dict[str, Any]:
    """Everything that decides the weights, as it reads back from JSON."""
    free = {"raws", "dest", "cache", "save_every", "overwrite", "dry_run"}
    options = {key: value for key, value in asdict(config).items() if key not in free}
    return {"kind": "autoencoder", "raws": [source.manifest.digest for source in images], **options}


def _model(config: AutoencoderConfig, image_size: int) -> Any:
    """A new AutoencoderKL, or the one to go on from."""
    if config.initialize_from is not None:
        model = load_autoencoder(config.initialize_from).model.requires_grad_(True)
        if (
            not hasattr(model, "encode")
            or not hasattr(model.config, "latent_channels")
            or "KL" not in type(model).__name__
        ):
            raise ConfigError(f"--initialize-from {config.initialize_from}: is no AutoencoderKL")
        return model
    levels = len(config.block_channels)
    if image_size % 2 ** (levels - 1):
        raise ConfigError(f"--block-channels: {levels} levels need an image size divisible by {2 ** (levels - 1)}")
    torch.manual_seed(config.seed)
    return import_diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=image_size,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
