"""`lfm autoencoder`: train or fine-tune a diffusers AutoencoderKL on raw shards (Kingma and Welling, 2014).

    loss = error(x, decoded(z)) + equivariance error(T x, decoded(T z)) + kl_weight KL(posterior || standard normal)
    error(x, y) = mean |x - y| + 2 mean (x - y)^2

z is a sample of the posterior of the image x, which is in [-1, 1]; the KL divergence, too, is a mean over its elements. T,
drawn for each step, rotates by a multiple of 90 degrees and scales down, to a quarter of the size at least (EQ-VAE, Kouzelis et
al. 2025).
The exported weights are an exponential moving average, and the scale factor gives the latents unit deviation.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lfm import storage
from lfm.autoencoder import import_diffusers, to_levels, to_unit_range
from lfm.autoencoder import load as load_autoencoder
from lfm.data import manifest as manifests
from lfm.data.evaluation_images import ShardedImages
from lfm.data.stream.sample_order import Order
from lfm.errors import CheckpointError, ConfigError, DataError
from lfm.precision import float32_arithmetic, precision_on
from lfm.training.ema import Ema, decay_after
from lfm.world import World
from pipelines.common import factory
from pipelines.common.progress import Progress
from pipelines.data.data_options import AutoencoderConfig

STATE = "training.pt"
CONFIG = "config.json"
FILES = r"training\.pt|config\.json|recipe\.json|diffusion_pytorch_model\.safetensors"
SCALE_IMAGES = 512  # for measuring the scale factor
WARMUP_STEPS = 50
SMALLEST_SCALE = 0.25  # of the transformed latents
LAST_RATE = 0.05  # the learning rate of the last step, as a share of the highest


@dataclass(frozen=True)
class AutoencoderResult:
    """The plan in words, and the PSNR of the last batch in dB; None after a dry run, or if nothing was left to train."""

    plan: str
    psnr: float | None


def run(config: AutoencoderConfig, world: World) -> AutoencoderResult:
    """Train to `num_steps`, resuming where an earlier run of the same command stopped, and export to `dest`.

    Raises:
        ConfigError, DataError, CheckpointError: before training, if the cause is known by then.
    """
    _check(config, world)
    cache = factory.cache(config.cache)
    sources = [
        ShuffledImages(ShardedImages(raw, manifests.load(raw, "raw"), cache), config.seed) for raw in config.raws
    ]
    image_sizes = {source.images.image_size for source in sources}
    if len(image_sizes) > 1:
        raise ConfigError(f"{', '.join(config.raws)}: have different image sizes; shard them at one size")
    model = _model(config, image_sizes.pop())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    plan = (
        f"{config.num_steps:,} steps of {config.batch_size} images from {', '.join(config.raws)}, "
        f"{num_parameters:,} parameters, {config.initialize_from or 'new'} -> {config.dest}"
    )
    if config.dry_run:
        return AutoencoderResult(plan, None)
    device = factory.device(world)
    config = replace(config, precision=precision_on(device, config.precision))
    manifests.claim(config.dest, _recipe(config, sources), overwrite=config.overwrite, owned=FILES)
    if storage.exists(storage.join(config.dest, CONFIG)):
        return AutoencoderResult(f"{plan}: already complete", None)
    trainer = AutoencoderTrainer(config, model, sources, device)
    psnr = trainer.run()
    trainer.export()
    return AutoencoderResult(plan, psnr)


def _check(config: AutoencoderConfig, world: World) -> None:
    if world.size > 1:
        raise ConfigError(
            f"`lfm autoencoder` trains in one process, but the launcher started {world.size}; run it without a launcher"
        )
    if not storage.is_local(config.dest):
        raise ConfigError(f"{config.dest}: must be a local folder; copy the autoencoder afterwards")
    if config.batch_size % len(config.raws):
        raise ConfigError(
            f"`batch_size` {config.batch_size}: must be a multiple of the number of raw data sets, {len(config.raws)}"
        )


def _recipe(config: AutoencoderConfig, sources: Sequence[ShuffledImages]) -> dict[str, Any]:
    """Everything that decides the weights. The keys are part of the file format."""
    free = {"raws", "dest", "cache", "save_every", "overwrite", "dry_run"}
    if not config.equivariance:
        free.add("equivariance")  # as recipes from before this option
    options = {key: value for key, value in asdict(config).items() if key not in free}
    return {"kind": "autoencoder", "raws": [source.images.digest for source in sources], **options}


def _model(config: AutoencoderConfig, image_size: int) -> Any:
    """A new AutoencoderKL, or the one to fine-tune."""
    if config.initialize_from is not None:
        model = load_autoencoder(config.initialize_from).model.requires_grad_(True)
        if "KL" not in type(model).__name__:
            raise ConfigError(f"`initialize_from` {config.initialize_from}: is not an AutoencoderKL")
        return model
    levels = len(config.block_channels)
    if image_size % 2 ** (levels - 1):
        raise ConfigError(f"`block_channels`: {levels} levels need an image size divisible by {2 ** (levels - 1)}")
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


class ShuffledImages:
    """The images of raw shards in the order of `Order`, from any position on."""

    def __init__(self, images: ShardedImages, seed: int) -> None:
        self.images, self.order = images, Order(images.blocks, seed, window=1)
        self._decoded = lru_cache(maxsize=2)(self._decode)

    def at(self, position: int, count: int) -> Tensor:
        """The images from `position` on: uint8 (count, 3, H, W)."""
        shards, rows = self.order.at(position, count)
        images = np.stack([self._decoded(int(shard))[row] for shard, row in zip(shards, rows, strict=True)])
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def _decode(self, shard: int) -> np.ndarray:
        """All images of a shard: uint8 (samples, H, W, 3)."""
        return np.stack([sample.image for sample in self.images.read(shard)])


class AutoencoderTrainer:
    """Trains a model on shuffled images, each batch with the same number from every source; resumes from its state file."""

    def __init__(
        self, config: AutoencoderConfig, model: Any, sources: Sequence[ShuffledImages], device: torch.device
    ) -> None:
        self.config, self.model, self.sources, self.device = config, model.to(device).train(), sources, device
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
        self.ema = Ema(self.parameters)
        self.step = 0
        self.state_path = Path(config.dest) / STATE
        if self.state_path.exists():
            self._resume()

    def run(self) -> float | None:
        """Train; return the PSNR of the last batch in dB, or None if no step was left."""
        psnr = None
        arithmetic = float32_arithmetic(self.config.precision, self.device)
        with arithmetic, Progress("autoencoder", self.config.num_steps, "steps", done=self.step) as progress:
            while self.step < self.config.num_steps:
                psnr = self._train_step(self._batch(self.step))
                self.step += 1
                if self.step % self.config.save_every == 0:
                    self._save()
                progress.advance(1, psnr=f"{psnr:.2f} dB")
        return psnr

    def export(self) -> None:
        """Write the averaged weights with their scale factor in the format of diffusers; the configuration comes last."""
        with self.ema.in_place():
            model = copy.deepcopy(self.model).eval()
        model.register_to_config(scaling_factor=self._scale_factor(model))
        storage.sweep(self.config.dest)
        with tempfile.TemporaryDirectory(dir=self.config.dest, prefix=storage.TEMPORARY_PREFIX) as folder:
            model.save_pretrained(folder)
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == CONFIG):
                path.chmod(0o644)  # safetensors makes files that only the owner can read
                path.replace(Path(self.config.dest, path.name))
        self.state_path.unlink(missing_ok=True)

    def _scale_factor(self, model: Any) -> float:
        """The factor that gives the posterior means of the first images unit deviation."""
        total = squares = values = 0.0
        with torch.inference_mode():
            for step in range(math.ceil(SCALE_IMAGES / self.config.batch_size)):
                mean = model.encode(self._batch(step)).latent_dist.mean.double()
                total, squares, values = total + mean.sum(), squares + (mean**2).sum(), values + mean.numel()
        return round(1 / math.sqrt(squares / values - (total / values) ** 2), 5)

    def _batch(self, step: int) -> Tensor:
        """The images of a step: float32 (B, 3, H, W) in [-1, 1]."""
        share = self.config.batch_size // len(self.sources)
        images = torch.cat([source.at(step * share, share) for source in self.sources])
        return to_unit_range(images.to(self.device))

    def _train_step(self, images: Tensor) -> float:
        """Update the weights; return the PSNR of the reconstructions in dB."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        loss, reconstruction = self._loss(images)
        if not math.isfinite(loss.item()):
            raise DataError(
                f"{self.config.dest}: the loss is {loss.item()} at step {self.step}; lower `learning_rate` or `kl_weight`, "
                "and set `overwrite`"
            )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.update(decay_after(self.step + 1, self.config.ema_decay))
        error = to_levels(reconstruction.detach()).float() - to_levels(images).float()
        return 10 * math.log10(255**2 / max((error**2).mean().item(), 1e-9))

    def _learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to `LAST_RATE`."""
        warmup, progress = min(1.0, (self.step + 1) / WARMUP_STEPS), self.step / self.config.num_steps
        decay = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.config.learning_rate * warmup * decay

    def _loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and its reconstruction (B, 3, H, W)."""
        generator = torch.Generator().manual_seed((self.config.seed << 32) + self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            posterior = self.model.encode(images).latent_dist
            mean, std, log_variance = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator).to(self.device)
            latents = mean + std * noise
            reconstruction = self.model.decode(latents).sample
        divergence = 0.5 * (mean**2 + std**2 - 1 - log_variance).mean()
        loss = _error(images, reconstruction) + self.config.kl_weight * divergence
        if self.config.equivariance:
            loss = loss + self.config.equivariance * self._equivariance_error(images, latents, generator)
        return loss, reconstruction

    def _equivariance_error(self, images: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Return the error between transformed images and what the decoder makes of latents that were transformed alike."""
        largest = latents.shape[-1]
        smallest = math.ceil(SMALLEST_SCALE * largest)
        turns = int(torch.randint(4, (), generator=generator))
        size = int(torch.randint(smallest, largest + 1, (), generator=generator))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            decoded = self.model.decode(transformed(latents, turns, size)).sample
        return _error(transformed(images, turns, size * images.shape[-1] // largest), decoded)

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
            raise CheckpointError(f"{self.state_path}: cannot be read; remove it to start again") from error


def transformed(values: Tensor, turns: int, size: int) -> Tensor:
    """Rotate images or latents (B, C, H, H) by `turns` times 90 degrees, and scale them to (B, C, size, size)."""
    rotated = torch.rot90(values, turns, (2, 3))
    if size == values.shape[-1]:
        return rotated
    return interpolate(rotated.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)


def _error(images: Tensor, reconstruction: Tensor) -> Tensor:
    error = reconstruction.float() - images
    return error.abs().mean() + 2 * (error**2).mean()
