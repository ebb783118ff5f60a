"""`lfm likelihood`: bits per dimension of latents under a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.manifest import AutoencoderRecord, Manifest
from lfm.data.random_draws import image_noise
from lfm.errors import ConfigError
from lfm.flow.likelihood import Likelihood, log_likelihood
from lfm.inference import trained_model
from lfm.inference.trained_model import TrainedModel
from lfm.solvers import Solving
from lfm.world import World
from pipelines.common import factory, read_samples
from pipelines.common.progress import Progress
from pipelines.evaluation.evaluation_options import LikelihoodConfig

DEFAULT_NUM = 64


@dataclass(frozen=True)
class LikelihoodResult:
    """Mean over the latents, its standard error and the mean number of network evaluations; None after a dry run."""

    plan: str
    bits_per_dim: float | None = None
    standard_error: float = 0.0
    nfe: float = 0.0


def run(config: LikelihoodConfig, world: World) -> LikelihoodResult:
    """Compute the bits per dimension of each latent, and write them to `out`.

    Raises:
        ConfigError, DataError, CheckpointError: Before anything is computed.
    """
    solving = Solving(config.solver, config.num_steps, atol=config.atol, rtol=config.rtol)
    model = trained_model.load(
        config.run, autoencoder=config.autoencoder, device=factory.device(world), precision=config.precision
    )
    manifest = manifests.load(config.latents, "latents")
    rows = read_samples.sample_rows(config.rows, config.latents, manifest, DEFAULT_NUM)
    record = read_samples.check_latents(config.latents, manifest, model)
    if storage.is_local(config.out) and Path(config.out).is_dir():
        raise ConfigError(f"`out` {config.out}: is a folder; name a file, such as likelihood.json")
    plan = f"{len(rows)} latents of {config.latents} under {config.run}, {solving}, {config.estimator} -> {config.out}"
    if config.dry_run:
        return LikelihoodResult(plan)
    bits, nfe = [], []
    with Progress("likelihood", len(rows), "latents") as progress:
        for first in range(0, len(rows), config.batch_size):
            batch = rows[first : first + config.batch_size]
            likelihood = _likelihood(config, model, manifest, record, batch, solving)
            bits += likelihood.bits_per_dim.tolist()
            nfe += likelihood.nfe.tolist()
            progress.advance(len(batch), bits_per_dim=f"{np.mean(bits):.3f}")
    result = LikelihoodResult(plan, float(np.mean(bits)), float(np.std(bits) / np.sqrt(len(bits))), float(np.mean(nfe)))
    content = {
        "settings": asdict(config) | {"precision": model.precision},
        "data": manifest.digest,
        "samples_seen": model.header.samples_seen,
        "bits_per_dim": result.bits_per_dim,
        "each": dict(zip(rows, bits, strict=True)),
    }
    storage.write_json(config.out, content)
    return result


def _likelihood(
    config: LikelihoodConfig,
    model: TrainedModel,
    manifest: Manifest,
    record: AutoencoderRecord,
    rows: list[int],
    solving: Solving,
) -> Likelihood:
    """Return the likelihood of some rows of the latents, each drawn from its posterior with the row as its seed."""
    columns = read_samples.read_columns(config.latents, manifest, rows, config.cache)
    mean, std = torch.from_numpy(np.stack(columns["posterior"])).float().chunk(2, 1)
    drawn = mean + std * torch.from_numpy(image_noise(rows, model.latent_shape))
    latents = (drawn - record.shift) * record.scale_factor
    signs = None
    if config.estimator == "hutchinson":
        signs = torch.from_numpy(image_noise(rows, model.latent_shape, 1)).sign().to(model.device)
    has_classes = model.header.model.num_classes is not None
    classes = [int(index) for index in columns["class_index"]] if has_classes else None
    conditions = read_samples.conditions_of_latents(model, columns, classes)
    condition = conditions.condition(range(len(rows))).to(model.device)
    return log_likelihood(model.network, latents.to(model.device), condition, solving=solving, signs=signs)
