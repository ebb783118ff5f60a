"""`lfm reference`: compute the statistics of real images that generated ones are compared with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from lfm import storage
from lfm.data import manifest as manifests
from lfm.data.evaluation_images import ImageSet, open_images
from lfm.errors import ConfigError, DataError, StorageError
from lfm.metrics import features
from lfm.metrics import reference as references
from lfm.metrics.features import FeatureNetwork
from lfm.metrics.reference import Reference, ReferenceHeader
from lfm.world import World
from pipelines.common import factory
from pipelines.common.provenance import code_version
from pipelines.evaluation.evaluation_options import ReferenceConfig
from pipelines.evaluation.feature_files import Block, FeatureFiles, batched, describe, stack_images

logger = logging.getLogger(__name__)

MAY_DIFFER = ("source", "network", "code_version")  # header fields in which an existing reference may differ


@dataclass(frozen=True)
class ReferenceResult:
    """The reference; None after a dry run, and while other ranks have images to measure."""

    plan: str
    reference: Reference | None


def run(config: ReferenceConfig, world: World) -> ReferenceResult:
    """Compute the features of every image once, without mirroring, and write the reference.

    Raises:
        ConfigError, DataError, StorageError: Running the same command again resumes.
    """
    if not config.out.endswith(".safetensors"):
        raise ConfigError(f"`out` {config.out}: must be a file name that ends with .safetensors")
    if config.source.endswith(".npz"):
        return _import(config)
    if config.crop and config.image_size is None:
        raise ConfigError(f"`crop` {config.crop}: is for the images of a folder, together with `image_size`")
    images = open_images(
        config.source, factory.cache(config.cache), image_size=config.image_size, rule=config.crop or "centre"
    )
    network = features.load(config.network, factory.device(world), trust_code=config.trust_code)
    header = _header(config, images, network)
    plan = (
        f"{header.count:,} images of {header.image_size} x {header.image_size} pixels in {config.source} "
        f"-> {network.name} ({network.content_hash[:12]}) -> {config.out}"
    )
    if config.dry_run:
        return ReferenceResult(plan, None)
    if (existing := _existing(config, header)) is not None:
        return ReferenceResult(plan, existing)
    recipe = [header.data_digest, header.image_size, header.rule, header.network_hash]
    files = FeatureFiles(f"{config.out}.blocks-{manifests.digest(recipe)[:12]}", images.blocks)

    def measure(block: int) -> Iterator[Block]:
        for samples in batched(images.read(block), config.batch_size):
            yield describe([network], stack_images(samples))

    try:
        if not files.compute(measure, world, "reference"):
            return ReferenceResult(plan, None)
        gaussians, subset = files.statistics(0)
    except StorageError:  # the same command in another process was faster, and has removed the files
        if (existing := _existing(replace(config, overwrite=False), header)) is None:
            raise
        return ReferenceResult(plan, existing)
    reference = Reference(header, gaussians, subset, torch.from_numpy(references.subset_rows(files.total)))
    references.save(config.out, reference)
    if world.size == 1:  # otherwise another rank may still read the files
        with suppress(StorageError):  # another process may write there
            storage.remove(files.folder)
    return ReferenceResult(plan, reference)


def _header(config: ReferenceConfig, images: ImageSet, network: FeatureNetwork) -> ReferenceHeader:
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


def _existing(config: ReferenceConfig, header: ReferenceHeader) -> Reference | None:
    """Return the reference that the same command wrote before, or None if it has to be made, again if it is damaged.

    Raises:
        ConfigError: If `out` is the reference of other images or another network.
    """
    if config.overwrite or not storage.exists(config.out):
        return None
    try:
        reference = references.load(config.out)
    except DataError as error:
        if not references.is_damaged(config.out):
            raise
        logger.warning("%s; making it again", str(error).split("; make")[0])
        return None
    before, now = reference.header.model_dump(), header.model_dump()
    if changed := [key for key in now if before[key] != now[key] and key not in MAY_DIFFER]:
        raise ConfigError(
            f"{config.out}: is a reference with another {', '.join(changed)}; choose another `out`, or set `overwrite`"
        )
    return reference


def _import(config: ReferenceConfig) -> ReferenceResult:
    """Write a reference from published statistics of the original FID's network."""
    if config.image_size is None:
        raise ConfigError(f"{config.source}: does not record the size of its images; set `image_size`")
    plan = f"the statistics of {config.source}, computed with the original FID's network -> {config.out}"
    reference = references.import_npz(config.source, config.image_size, code_version())
    if config.dry_run:
        return ReferenceResult(plan, None)
    if _existing(config, reference.header) is None:
        references.save(config.out, reference)
    return ReferenceResult(plan, reference)
