"""The pass over all images of a candidate, which writes everything that the metrics need to feature files."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from lfm import storage
from lfm.data import manifest as manifests
from lfm.metrics.features import FeatureNetwork, file_hash, load_module
from lfm.metrics.segmentation import Confusion
from lfm.world import World
from pipelines.common.provenance import code_version
from pipelines.evaluation import metric_table
from pipelines.evaluation.candidates import Candidate, CandidateBatch
from pipelines.evaluation.feature_files import Block, FeatureFiles, describe

NUM_SHOWN = 16  # images of each candidate in the report


class PerImagePass:
    """Computes the columns of feature files for candidates.

    Columns besides the features: `n.paired`, the features of the ground truth; one for each entry of the metric table with
    `per_pair`; `lpips`; `confusion`; `nfe`; `seconds`; `latents`, if they are asked for; and in the first block `shown`, the
    first images.

    Args:
        out: Folder of the evaluation.
        networks: Feature networks, at least one, on the device of all computations.
        modules: Files of the exported modules `lpips` and `segmenter`, those that are in use.
        trust_code: Whether code in these files may be run.
        with_latents: Whether to store the latents of generated images.
    """

    def __init__(
        self,
        out: str,
        networks: list[FeatureNetwork],
        modules: dict[str, str],
        *,
        trust_code: bool = False,
        with_latents: bool = False,
    ) -> None:
        self.out, self.networks, self.device, self.with_latents = out, networks, networks[0].device, with_latents
        self.hashes = {name: file_hash(path) for name, path in modules.items()}
        self.modules = {name: load_module(path, self.device, trust_code=trust_code) for name, path in modules.items()}

    def files(self, candidate: Candidate) -> FeatureFiles:
        """Return the feature files of a candidate, whether they exist or not."""
        networks = [network.content_hash for network in self.networks]
        columns = [metric.name for metric in metric_table.TABLE if metric.per_pair]
        recipe = [candidate.identity, candidate.counts, code_version(), networks, self.hashes, columns]
        recipe += ["latents"] if self.with_latents else []
        folder = storage.join(self.out, f"blocks-{manifests.digest(recipe)[:16]}")
        return FeatureFiles(folder, candidate.counts)

    def run(self, candidate: Candidate, world: World) -> bool:
        """Compute this rank's share of a candidate's files, and return whether all of them exist afterwards."""
        measure = functools.partial(self._measure_block, candidate)
        return self.files(candidate).compute(measure, world, f"evaluate {candidate.name}")

    def _measure_block(self, candidate: Candidate, block: int) -> Iterator[Block]:
        num_missing = NUM_SHOWN if block == 0 else 0
        for batch in candidate.batches(block):
            result = describe(self.networks, batch.images)
            if batch.real is not None:
                result |= self._measure_pairs(batch, batch.real)
            if batch.nfe is not None:
                seconds = torch.full(batch.nfe.shape, batch.seconds / len(batch.nfe))
                result |= {"nfe": batch.nfe, "seconds": seconds}
            if self.with_latents and batch.latents is not None:
                result["latents"] = batch.latents
            if num_missing > 0:
                result["shown"] = batch.images[:num_missing]
                num_missing -= len(batch.images)
            yield result

    @torch.inference_mode()
    def _measure_pairs(self, batch: CandidateBatch, real: Tensor) -> Block:
        fake = batch.images
        features = describe(self.networks, real)
        result = {f"{number}.paired": features[f"{number}.pooled"] for number in range(len(self.networks))}
        result |= {metric.name: metric.per_pair(fake, real) for metric in metric_table.TABLE if metric.per_pair}
        if lpips := self.modules.get("lpips"):
            result["lpips"] = lpips(fake.to(self.device), real.to(self.device)).flatten().float()
        if batch.segmentation is not None and (segmenter := self.modules.get("segmenter")):
            scores = segmenter(fake.to(self.device))  # (B, K, H, W)
            confusion = Confusion.of(scores.argmax(1).cpu(), batch.segmentation, scores.shape[1])
            result["confusion"] = confusion.pixels[None]
        return result
