"""`lfm reference`: the statistics of the real images that generated ones are compared with, made once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.image_sets import ImageSet, open_images
from lfm.data.transforms import CROPS
from lfm.errors import ConfigError
from lfm.metrics import features as networks
from lfm.metrics import reference as references
from lfm.metrics.reference import Reference, ReferenceHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.provenance import code_version
from pipelines.evaluation import feature_files
from pipelines.evaluation.evaluation_options import ReferenceConfig


@dataclass(frozen=True)
class ReferenceResult:
    """The reference that is there now; None after a dry run, or while other ranks have blocks to finish."""

    plan: str
    reference: Reference | None


def run(config: ReferenceConfig, world: World) -> ReferenceResult:
    """Measure every image once, never a mirror of one, and write the reference.

    Raises:
        ConfigError, DataError, StorageError: the same command continues.
    """
    if not config.out.endswith(".safetensors"):
        raise ConfigError(f"{config.out}: a reference is one file; give it a name that ends in .safetensors")
    if config.source.endswith(".npz"):
        return _import(config)
    if config.crop and (config.image_size is None or config.crop not in CROPS):
        raise ConfigError(f"--crop {config.crop}: one of {', '.join(CROPS)}, together with --image-size, for a folder")
    rule = config.crop or "centre"
    images = open_images(config.source, factory.cache(config.cache), image_size=config.image_size, rule=rule)
    network = networks.load(config.network, factory.device(world))
    header = _header(config, images, network)
    plan = (
        f"{header.count:,} images of {header.image_size} x {header.image_size} pixels in {config.source} "
        f"-> {network.name} ({network.content_hash[:12]}) -> {config.out}"
    )
    if config.dry_run:
        return ReferenceResult(plan, None)
    if (there := _there(config, header)) is not None:
        return ReferenceResult(plan, there)
    recipe = [header.data_digest, header.image_size, header.rule, header.network_hash]
    folder = f"{config.out}.blocks-{manifests.digest(recipe)[:12]}"

    def make(block: int) -> Iterator[feature_files.Block]:
        for samples in feature_files.batched(images.read(block), config.batch_size):
            yield feature_files.describe([network], feature_files.as_batch(samples))

    if not feature_files.compute(folder, images.blocks, make, world, "reference"):
        return ReferenceResult(plan, None)
    gaussians, kept = feature_files.summarise(folder, images.blocks, 0)
    rows = torch.from_numpy(references.subset_rows(sum(images.blocks)))
    reference = Reference(header, gaussians, kept, rows)
    references.save(config.out, reference)
    if world.size == 1:  # else another rank may be reading them
        storage.remove(folder)
    return ReferenceResult(plan, reference)


def _header(config: ReferenceConfig, images: ImageSet, network: networks.FeatureNetwork) -> ReferenceHeader:
    return ReferenceHeader(
        source=config.source,
        data_digest=images.digest,
        image_size=images.image_size,
        rule=images.rule,
        resized=config.image_size is not None,
        stored=images.stored,
        count=sum(images.blocks),
        network=config.network,
        network_name=network.name,
        network_hash=network.content_hash,
        network_description=network.description,
        code_version=code_version(),
    )


def _there(config: ReferenceConfig, header: ReferenceHeader) -> Reference | None:
    """The reference that the command made before, if it did.

    Raises:
        ConfigError: there is another one.
    """
    if config.overwrite or not storage.exists(config.out):
        return None
    there = references.load(config.out)
    before, now = there.header.model_dump(), header.model_dump()
    free = ("source", "network", "code_version")
    if changed := [key for key in now if before[key] != now[key] and key not in free]:
        raise ConfigError(
            f"{config.out}: is the reference of another {', '.join(changed)}; choose another file, or --overwrite"
        )
    return there


def _import(config: ReferenceConfig) -> ReferenceResult:
    if config.image_size is None:
        raise ConfigError(f"{config.source}: does not say of what size its images were; give --image-size")
    plan = f"the statistics of {config.source}, of the original FID's network -> {config.out}"
    reference = references.import_npz(config.source, config.image_size, code_version())
    if config.dry_run:
        return ReferenceResult(plan, None)
    if _there(config, reference.header) is None:
        references.save(config.out, reference)
    return ReferenceResult(plan, reference)
