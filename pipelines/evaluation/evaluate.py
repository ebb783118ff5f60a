"""`lfm evaluate`: compare generated images with a reference, with reproducible metrics.

The images come from a folder, from raw shards, or from runs that generate them in memory: exactly as many as requested,
seed by seed, whatever the number of ranks. The report records everything that determines a number.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from lfm import storage
from lfm.data.evaluation_images import FolderImages, ImageSet, open_images, pick
from lfm.errors import ConfigError
from lfm.metrics import features
from lfm.metrics.memorisation import nearest_samples
from lfm.metrics.reference import Reference
from lfm.weights_file import WEIGHTS
from lfm.world import World
from pipelines.common import factory
from pipelines.common.provenance import code_version
from pipelines.common.reference_features import ReferenceSet
from pipelines.evaluation import metric_table, report
from pipelines.evaluation.candidates import Candidate, GeneratedImages, ModelLoader, PairedImages, StoredImages
from pipelines.evaluation.evaluation_options import EvaluateConfig
from pipelines.evaluation.feature_files import FeatureFiles
from pipelines.evaluation.latent_sets import open_latents
from pipelines.evaluation.metric_table import EvaluationInputs, Metric, Results
from pipelines.evaluation.nearest_search import NearestSearch, TrainingComparison
from pipelines.evaluation.per_image_pass import NUM_SHOWN, PerImagePass

PACKAGES = ("torch", "numpy", "pillow", "torchmetrics", "scikit-learn", "diffusers")
GENERATION_OPTIONS = ("num", "first_seed", "guidance_scale", "solver", "num_steps", "atol", "rtol", "precision")
RUN_OPTIONS = ("nearest", "held_back", *GENERATION_OPTIONS, "autoguidance", "autoencoder")


@dataclass(frozen=True)
class EvaluateResult:
    """The report; empty after a dry run, and while other ranks have images to measure."""

    plan: str
    report: dict[str, Any]
    table: str


def run(config: EvaluateConfig, world: World) -> EvaluateResult:
    """Evaluate every candidate, and write report.json, report.txt, report.png and nearest.png into the folder `out`.

    Raises:
        ConfigError, DataError, CheckpointError: If the inputs do not fit together; before anything is generated.
    """
    reference_sets = _load_reference_sets(config, world)
    candidates = _candidates(config, world)
    real = _open_neighbours(config, reference_sets[0])
    search = _open_nearest(config, candidates, reference_sets[0])
    for candidate in candidates:
        for reference_set in reference_sets:
            reference_set.check_comparable(candidate.name, candidate.image_size, candidate.crop)
        if sum(candidate.counts) < 2:
            raise ConfigError(f"{candidate.name}: holds a single image; metrics need at least two")
    modules = {name: path for name, path in (("lpips", config.lpips), ("segmenter", config.segmenter)) if path}
    provides = (*candidates[0].provides, "training") if search else candidates[0].provides
    inputs = EvaluationInputs(reference_sets, provides, tuple(modules))
    metrics = metric_table.choose(config.metrics, inputs)
    lines = [_plan(candidate, config, metrics) for candidate in candidates]
    plan = "\n".join([*lines, search.plan] if search else lines)
    if config.dry_run:
        return EvaluateResult(plan, {}, "")
    image_pass = PerImagePass(
        config.out,
        [reference_set.network for reference_set in reference_sets],
        modules,
        trust_code=config.trust_code,
        with_latents=search is not None,
    )
    settings = {
        "targets": [candidate.settings for candidate in candidates],
        "references": [reference_set.reference.header.model_dump() for reference_set in reference_sets],
        "networks": [_description(reference_set) for reference_set in reference_sets],
        "modules": image_pass.hashes,
        "metrics": [metric.name for metric in metrics],
    } | ({"nearest": search.settings} if search else {})
    if world.is_main:
        report.check_folder(config.out, settings, overwrite=config.overwrite)
    complete = [image_pass.run(candidate, world) for candidate in candidates]
    if search:
        complete.append(search.compute_features(world))
    if not all(complete):
        return EvaluateResult(plan, {}, "")
    files = [image_pass.files(candidate) for candidate in candidates]
    comparisons = search.compare(files) if search else [None] * len(files)
    results = [
        metric_table.compute(metrics, each, inputs, comparison.measures if comparison else None)
        for each, comparison in zip(files, comparisons, strict=True)
    ]
    content = {
        "settings": settings,
        "rows": [_row(*row, inputs) for row in zip(candidates, files, results, comparisons, strict=True)],
        "metrics": results[0].descriptions,
        "versions": _versions(),
    }
    return EvaluateResult(plan, content, _write_report(config, content, files, comparisons, real, reference_sets[0]))


def _write_report(
    config: EvaluateConfig,
    content: dict[str, Any],
    files: list[FeatureFiles],
    comparisons: Sequence[TrainingComparison | None],
    real: ImageSet | None,
    reference_set: ReferenceSet,
) -> str:
    """Write the report with its images, and return its table."""
    first_blocks = [next(each.blocks()) for each in files]
    neighbours = None
    if real:
        pooled = [block["0.pooled"][:NUM_SHOWN] for block in first_blocks]
        neighbours = _nearest_images(real, reference_set.reference, pooled)
    nearest = [comparison.shown for comparison in comparisons if comparison]
    return report.write(config.out, content, [block["shown"] for block in first_blocks], neighbours, nearest)


def _load_reference_sets(config: EvaluateConfig, world: World) -> list[ReferenceSet]:
    sets = [
        ReferenceSet.load(path, factory.device(world), config.network, trust_code=config.trust_code)
        for path in config.reference
    ]
    for name in config.network:
        if features.short_name(name) not in [reference_set.network.name for reference_set in sets]:
            raise ConfigError(f"`network` {name}: no reference uses it; leave it out, or add its reference")
    return sets


def _candidates(config: EvaluateConfig, world: World) -> list[Candidate]:
    """Return the candidates that `targets` names, all of them runs or all of them stored images."""
    are_runs = [name.endswith(".safetensors") or storage.exists(storage.join(name, WEIGHTS)) for name in config.targets]
    if not any(are_runs):
        return _stored_candidates(config)
    if not all(are_runs):
        raise ConfigError("`targets`: holds both runs and folders of images; evaluate them one kind at a time")
    if config.pairs and config.num:
        raise ConfigError(f"`num` {config.num}: with `pairs` there is one image for each of them; leave it out")
    real = open_images(config.pairs, factory.cache(config.cache)) if config.pairs else None
    models = ModelLoader(config.autoencoder, factory.device(world), config.precision)
    weak = None
    if config.autoguidance:
        weak = ModelLoader(config.autoencoder, factory.device(world), config.precision).load(config.autoguidance)
    return [
        GeneratedImages(name, scale, config, real, models, weak)
        for name in config.targets
        for scale in config.guidance_scale or (1.0,)
    ]


def _stored_candidates(config: EvaluateConfig) -> list[Candidate]:
    for option in RUN_OPTIONS:
        if getattr(config, option) not in (None, ()):
            raise ConfigError(f"`{option}`: is for runs; {config.targets[0]} holds images, leave it out")
    cache = factory.cache(config.cache)
    evaluation_images = [open_images(name, cache) for name in config.targets]
    if not config.pairs:
        return [StoredImages(images, config.batch_size) for images in evaluation_images]
    real = open_images(config.pairs, cache)
    candidates: list[Candidate] = []
    for images in evaluation_images:
        if not isinstance(images, FolderImages):
            raise ConfigError(f"`pairs` {config.pairs}: {images.name} holds shards; name a folder of images instead")
        candidates.append(PairedImages(images, real, config.batch_size))
    return candidates


def _plan(candidate: Candidate, config: EvaluateConfig, metrics: list[Metric]) -> str:
    return (
        f"{candidate.name}: {sum(candidate.counts):,} images of {candidate.image_size} x {candidate.image_size} pixels "
        f"against {', '.join(config.reference)} by {', '.join(metric.name for metric in metrics)} -> {config.out}"
    )


def _description(reference_set: ReferenceSet) -> dict[str, str]:
    network = reference_set.network
    return {"name": network.name, "content_hash": network.content_hash, "description": network.description}


def _row(
    candidate: Candidate,
    files: FeatureFiles,
    results: Results,
    comparison: TrainingComparison | None,
    inputs: EvaluationInputs,
) -> dict[str, Any]:
    """Return a candidate's part of the report."""
    warnings = [*results.warnings, *(comparison.warnings if comparison else [])]
    for reference_set in inputs.reference_sets:
        header = reference_set.reference.header
        if header.stored and "jp" in header.stored:
            warnings.append(f"{header.source}: its images are JPEGs, so that JPEG artefacts count as real")
        if header.count not in (None, files.total):
            warnings.append(f"{files.total:,} images against {header.count:,} real ones")
    return {
        "target": candidate.name,
        "count": files.total,
        **candidate.settings,
        "metrics": results.values,
        "warnings": warnings,
    } | ({"nearest": comparison.description} if comparison else {})


def _open_neighbours(config: EvaluateConfig, reference_set: ReferenceSet) -> ImageSet | None:
    """Return the images of the first reference, at the location that the user names: none is opened because a file says so.

    Raises:
        ConfigError: If they are other images, or the reference has no features to compare with.
    """
    if config.neighbours is None:
        return None
    reference = reference_set.reference
    header = reference.header
    if reference.features is None:
        raise ConfigError(f"`neighbours` {config.neighbours}: {config.reference[0]} has no features of single images")
    size = header.image_size if header.resized else None
    real = open_images(config.neighbours, factory.cache(config.cache), image_size=size, rule=header.rule)
    if real.digest != header.data_digest:
        raise ConfigError(
            f"`neighbours` {config.neighbours}: holds other images than {config.reference[0]} was made of"
        )
    return real


def _open_nearest(
    config: EvaluateConfig, candidates: list[Candidate], reference_set: ReferenceSet
) -> NearestSearch | None:
    """Return the search for the nearest training samples; it uses the feature network of the first reference.

    Raises:
        ConfigError, DataError: If there are no latents to compare with, or they are not those of the runs.
    """
    if config.nearest is None:
        if config.held_back is not None:
            raise ConfigError(f"`held_back` {config.held_back}: is for `nearest`; set both, or leave it out")
        return None
    runs = [candidate for candidate in candidates if isinstance(candidate, GeneratedImages)]
    headers = {run.name: run.header for run in runs}
    training, held_back = open_latents(config.nearest, config.held_back, headers, config.cache)
    return NearestSearch(config.out, training, held_back, reference_set.network, runs[-1])


def _nearest_images(real: ImageSet, reference: Reference, pooled: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the real images nearest to those with the features `pooled` (n, D), uint8 (n, 3, H, W), for each candidate."""
    assert reference.features is not None and reference.rows is not None, "checked when they were opened"
    nearest = [nearest_samples(points, [reference.features], k=1).rows[:, 0] for points in pooled]
    rows = [reference.rows[numbers].tolist() for numbers in nearest]
    return [torch.from_numpy(np.stack(pick(real, part))).permute(0, 3, 1, 2) for part in rows]


def _versions() -> dict[str, str]:
    """Return the versions of this package, Python, and those of `PACKAGES` that are installed."""
    versions = {"lfm": code_version(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
