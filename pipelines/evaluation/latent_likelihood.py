"""`lfm likelihood`: bits per dimension of the latents of a data set under a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.random_draws import image_noise
from lfm.errors import ConfigError
from lfm.flow.likelihood import ESTIMATORS, log_likelihood
from lfm.inference import trained_model
from lfm.solvers import Solving
from lfm.world import World
from pipelines.common import factory, read_samples
from pipelines.common.progress import Progress
from pipelines.evaluation.evaluation_options import LikelihoodConfig


@dataclass(frozen=True)
class LikelihoodResult:
    """The mean over the latents, and how sure it is; None after a dry run."""

    plan: str
    bits_per_dim: float | None = None
    standard_error: float = 0.0
    nfe: float = 0.0


def run(config: LikelihoodConfig, world: World) -> LikelihoodResult:
    """Measure, and write a record.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is computed.
    """
    if config.estimator not in ESTIMATORS:
        raise ConfigError(f"--estimator {config.estimator}: unknown; one of {', '.join(ESTIMATORS)}")
    solving = Solving(config.solver, config.num_steps, atol=config.atol, rtol=config.rtol)
    model = trained_model.load(config.run, autoencoder=config.autoencoder, device=factory.device(world))
    manifest = manifests.load(config.latents, "latents")
    rows = read_samples.sample_rows(config.rows, config.latents, manifest, 64)
    record, shape = read_samples.check_latents(config.latents, manifest, model), model.header.model
    if storage.is_local(config.out) and Path(config.out).is_dir():
        raise ConfigError(f"--out {config.out}: is a folder; name a file, such as likelihood.json")
    plan = f"{len(rows)} latents of {config.latents} under {config.run}, {solving}, {config.estimator} -> {config.out}"
    if config.dry_run:
        return LikelihoodResult(plan)
    bits, nfe = [], []
    with Progress("likelihood", len(rows), "latents") as bar:
        for first in range(0, len(rows), config.batch_size):
            part = rows[first : first + config.batch_size]
            columns = read_samples.read_columns(config.latents, manifest, part, config.cache)
            mean, std = torch.from_numpy(np.stack(columns["posterior"])).float().chunk(2, 1)
            drawn = mean + std * torch.from_numpy(image_noise(part, model.latent_shape))
            latents = (drawn - record.shift) * record.scale_factor
            signs = None
            if config.estimator == "hutchinson":
                signs = torch.from_numpy(image_noise(part, model.latent_shape, 1)).sign().to(model.device)
            classes = [int(index) for index in columns["class_index"]] if shape.num_classes else None
            conditions = read_samples.conditions_of_latents(model, columns, classes)
            condition = conditions.condition(range(len(part))).to(model.device)
            found = log_likelihood(model.network, latents.to(model.device), condition, solving=solving, signs=signs)
            bits += found.bits_per_dim.tolist()
            nfe += found.nfe.tolist()
            bar.advance(len(part), bits_per_dim=f"{np.mean(bits):.3f}")
    result = LikelihoodResult(plan, float(np.mean(bits)), float(np.std(bits) / np.sqrt(len(bits))), float(np.mean(nfe)))
    content = {"settings": asdict(config), "data": manifest.digest, "samples_seen": model.header.samples_seen}
    storage.write_json(
        config.out, content | {"bits_per_dim": result.bits_per_dim, "each": dict(zip(rows, bits, strict=True))}
    )
    return result
