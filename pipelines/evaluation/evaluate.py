"""`lfm evaluate`: generated images against a reference, in numbers that another laboratory gets too.

The images of a folder or of raw shards, or of runs, which are generated in memory: exactly as many as asked for, seed by
seed, whatever the number of ranks. Everything that decides a number is in the report beside it.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from lfm import storage
from lfm.data.image_sets import FolderImages, open_images, pick
from lfm.errors import ConfigError, LfmError
from lfm.metrics import features as networks
from lfm.metrics.features import FeatureNetwork
from lfm.metrics.precision_recall import nearest
from lfm.metrics.reference import Reference
from lfm.solvers import Solving
from lfm.weights_file import WEIGHTS
from lfm.world import World
from pipelines.common import factory
from pipelines.common.provenance import code_version
from pipelines.common.reference_features import ReferenceSet
from pipelines.evaluation import metric_table, report
from pipelines.evaluation.candidates import PairedImages, Run, StoredImages, Target
from pipelines.evaluation.evaluation_options import EvaluateConfig
from pipelines.evaluation.metric_table import EvaluationInputs
from pipelines.evaluation.per_image_pass import SHOWN, Scorer

DEFAULT_NUM = 50_000
PACKAGES = ("torch", "numpy", "pillow", "torchmetrics", "diffusers")


@dataclass(frozen=True)
class EvaluateResult:
    """The report; its rows are empty after a dry run, or while other ranks have blocks to finish."""

    plan: str
    report: dict[str, Any]
    table: str


def run(config: EvaluateConfig, world: World) -> EvaluateResult:
    """Measure every target, and write report.json, report.txt and report.png into `out`.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is generated, wherever it can be known before.
    """
    sets = [ReferenceSet.load(path, factory.device(world), config.network) for path in config.reference]
    found, used = [each.reference for each in sets], [each.network for each in sets]
    for name in config.network:
        if networks.short_name(name) not in [network.name for network in used]:
            raise ConfigError(f"--network {name}: no reference was made by it; leave it out, or name its reference")
    targets = _targets(config, world)
    for target in targets:
        for each in sets:
            each.check_comparable(target.name, target.image_size, target.rule)
        if sum(target.counts) < 2:
            raise ConfigError(f"{target.name}: a single image has no distribution; two are the least")
    modules = {"lpips": config.lpips, "segmenter": config.segmenter}
    means = EvaluationInputs(found, used, targets[0].offers, tuple(name for name, path in modules.items() if path))
    chosen = means.choose(config.metrics)
    plan = "\n".join(
        f"{target.name}: {sum(target.counts):,} images of {target.image_size} x {target.image_size} pixels against "
        f"{', '.join(config.reference)} by {', '.join(chosen)} -> {config.out}"
        for target in targets
    )
    if config.dry_run:
        return EvaluateResult(plan, {}, "")
    settings: dict[str, Any] = {
        "targets": [target.settings for target in targets],
        "references": [reference.header.model_dump() for reference in found],
        "networks": [_described(network) for network in used],
        "modules": {name: networks.file_hash(path) for name, path in modules.items() if path},
        "metrics": chosen,
    }
    if world.is_main:
        report.claim(config.out, settings, overwrite=config.overwrite)
    scorer = Scorer(config.out, used, modules)
    complete = [scorer.measure(target, world) for target in targets]  # all of them, also where others are not done
    if not all(complete):
        return EvaluateResult(plan, {}, "")
    rows = [_row(scorer.folder(target), target, means, chosen) for target in targets]
    content = {"settings": settings, "rows": rows, "versions": _versions()}
    first = [scorer.first(target) for target in targets]
    shown = [block["shown"] for block in first]
    neighbours = _neighbours(config, found[0], [block["0.pooled"][:SHOWN] for block in first])
    return EvaluateResult(plan, content, report.write(config.out, content, shown, neighbours))


def _targets(config: EvaluateConfig, world: World) -> list[Target]:
    """What the command names: runs, or images."""
    are_runs = {
        name: name.endswith(".safetensors") or storage.exists(storage.join(name, WEIGHTS)) for name in config.targets
    }
    if len({*are_runs.values()}) != 1:
        raise ConfigError("TARGETS: are runs and folders of images; evaluate them one kind at a time")
    if not config.targets or not are_runs[config.targets[0]]:
        return _images(config)
    if config.pairs and config.num:
        raise ConfigError(f"--num {config.num}: there is one image for each of --pairs {config.pairs}; leave it out")
    real = open_images(config.pairs, factory.cache(config.cache)) if config.pairs else None
    solving = Solving(config.solver or "heun", config.num_steps, atol=config.atol, rtol=config.rtol)
    num, first_seed = config.num or DEFAULT_NUM, config.first_seed or 0
    return [
        Run(name, num, first_seed, solving, scale, real, config.autoencoder, config.batch_size, world)
        for name in config.targets
        for scale in config.guidance_scale or (1.0,)
    ]


def _images(config: EvaluateConfig) -> list[Target]:
    for flag in ("num", "first_seed", "guidance_scale", "solver", "num_steps", "atol", "rtol", "autoencoder"):
        if getattr(config, flag) not in (None, ()):
            raise ConfigError(
                f"--{flag.replace('_', '-')}: is for runs; {config.targets[0]} holds images, leave it out"
            )
    cache = factory.cache(config.cache)
    opened = [open_images(name, cache) for name in config.targets]
    if not config.pairs:
        return [StoredImages(images, config.batch_size) for images in opened]
    real = open_images(config.pairs, cache)
    targets: list[Target] = []
    for images in opened:
        if not isinstance(images, FolderImages):
            raise ConfigError(f"--pairs {config.pairs}: {images.name} holds shards; name a folder of images")
        targets.append(PairedImages(images, real, config.batch_size))
    return targets


def _described(network: FeatureNetwork) -> dict[str, str]:
    return {"name": network.name, "content_hash": network.content_hash, "description": network.description}


def _row(folder: str, target: Target, means: EvaluationInputs, chosen: tuple[str, ...]) -> dict[str, Any]:
    """A target's part of the report."""
    values, warnings = metric_table.of_pixels(folder, target.counts, chosen), []
    for number, (network, reference) in enumerate(zip(means.networks, means.references, strict=True)):
        of_network, about = metric_table.of_network(folder, target.counts, number, means, chosen)
        prefix = f"{network.name}: " if len(means.networks) > 1 else ""
        values |= {prefix + name: value for name, value in of_network.items()}
        warnings += about
        if reference.header.stored and "jp" in reference.header.stored:
            warnings.append(f"{reference.header.source}: its images are JPEGs, whose artefacts count as real")
        if reference.header.count not in (None, sum(target.counts)):
            warnings.append(f"{sum(target.counts):,} images against {reference.header.count:,} real ones")
    return {
        "target": target.name,
        "count": sum(target.counts),
        **target.settings,
        "metrics": values,
        "warnings": warnings,
    }


def _neighbours(config: EvaluateConfig, reference: Reference, pooled: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """The real images nearest to those shown, by the first reference's features, uint8 (n, 3, H, W) for each target.

    None where the reference is without features, or its images are no longer where they were.
    """
    header = reference.header
    if reference.features is None or reference.rows is None:
        return None
    try:
        size = header.image_size if header.resized else None
        real = open_images(header.source, factory.cache(config.cache), image_size=size, rule=header.rule)
        if real.digest != header.data_digest:
            return None
        rows = [reference.rows[nearest(features, reference.features)].tolist() for features in pooled]
        return [torch.from_numpy(np.stack(pick(real, part))).permute(0, 3, 1, 2) for part in rows]
    except LfmError:
        return None


def _versions() -> dict[str, str]:
    return {"lfm": code_version(), "python": platform.python_version()} | {
        package: version(package) for package in PACKAGES
    }
