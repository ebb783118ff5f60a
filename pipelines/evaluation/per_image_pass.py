"""What `lfm evaluate` measures on every image, and where it keeps it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from lfm import storage
from lfm.data import manifest as manifests
from lfm.metrics.features import FeatureNetwork, file_hash, load_module
from lfm.metrics.paired import psnr, ssim
from lfm.metrics.segmentation import Confusion
from lfm.world import World
from pipelines.common.provenance import code_version
from pipelines.evaluation import feature_files
from pipelines.evaluation.candidates import GeneratedBatch, Target

SHOWN = 16  # images of each target that the report shows


class Scorer:
    """What is measured on every image."""

    def __init__(self, out: str, networks: list[FeatureNetwork], modules: dict[str, str | None]) -> None:
        self.out, self.networks, self.device = out, networks, networks[0].device
        self.hashes = {name: file_hash(path) for name, path in modules.items() if path}
        self.modules = {name: load_module(path, self.device) for name, path in modules.items() if path}

    def folder(self, target: Target) -> str:
        """Where the blocks of a target are: named after all that decides them."""
        measured_by = [code_version(), [network.content_hash for network in self.networks], self.hashes]
        recipe = [target.identity, target.counts, *measured_by]
        return storage.join(self.out, f"blocks-{manifests.digest(recipe)[:16]}")

    def measure(self, target: Target, world: World) -> bool:
        """This rank's part of the blocks of a target; whether all of them are there now."""
        make = functools.partial(self._block, target)
        return feature_files.compute(self.folder(target), target.counts, make, world, f"evaluate {target.name}")

    def _block(self, target: Target, block: int) -> Iterator[feature_files.Block]:
        """What is measured on the images of a block, batch by batch."""
        shown = SHOWN if block == 0 else 0
        for made in target.make(block):
            found = feature_files.describe(self.networks, made.images)
            if made.real is not None:
                found |= self._of_pairs(made, made.real)
            if made.nfe is not None:
                found |= {"nfe": made.nfe, "seconds": torch.full(made.nfe.shape, made.seconds / len(made.nfe))}
            if shown > 0:
                found["shown"] = made.images[:shown]
                shown -= len(made.images)
            yield found

    def _of_pairs(self, made: GeneratedBatch, real: torch.Tensor) -> feature_files.Block:
        fake = made.images
        described = feature_files.describe(self.networks, real)
        found = {name.replace("pooled", "paired"): value for name, value in described.items() if "pooled" in name}
        found |= {"psnr": psnr(fake, real), "ssim": ssim(fake, real)}
        with torch.inference_mode():
            if lpips := self.modules.get("lpips"):
                found["lpips"] = lpips(fake.to(self.device), real.to(self.device)).flatten().float()
            if made.segmentation is not None and (segmenter := self.modules.get("segmenter")):
                scores = segmenter(fake.to(self.device))  # (B, K, H, W)
                confusion = Confusion.of(scores.argmax(1).cpu(), made.segmentation, scores.shape[1])
                found["confusion"] = confusion.pixels[None]
        return found

    def first(self, target: Target) -> feature_files.Block:
        """The first block of a target, which holds its first images too: `shown`, uint8 (up to 16, 3, H, W)."""
        return next(feature_files.read(self.folder(target), target.counts))
