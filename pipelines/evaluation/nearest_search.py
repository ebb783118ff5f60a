"""`lfm evaluate RUN --nearest LATENTS`: the nearest training samples of generated and of held-back images.

Features of the training samples are computed like those of generated images: each rank its share of the shards, in files, so
that the command resumes. One rank then compares all images with one shard after the other. Memory holds one shard, one block
of images, and the nearest samples so far, which are written after each shard.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lfm import storage, tensor_file
from lfm.data import manifest as manifests
from lfm.errors import DataError, on_one_line
from lfm.metrics.features import FeatureNetwork
from lfm.metrics.memorisation import QUANTILE, Memorisation, NearestSamples, nearest_samples
from lfm.world import World
from pipelines.common.progress import Progress
from pipelines.common.provenance import code_version
from pipelines.evaluation.candidates import GeneratedImages
from pipelines.evaluation.feature_files import Block, FeatureFiles, describe
from pipelines.evaluation.latent_sets import LatentSet

logger = logging.getLogger(__name__)

NUM_SHOWN = 16  # images of each run in the sheet
FARTHER = 1.25  # ratio of median distances above which a model's own artefacts may hide copies
FEATURES, LATENTS = "features", "latents"  # the spaces
COLUMNS = ("0.pooled", "mirror.pooled")  # features of an image and of its mirror image

BySpace = dict[str, NearestSamples]


@dataclass(frozen=True)
class NearestImages:
    """The images of one run that are nearest to training samples, the nearest first."""

    images: Tensor  # uint8 (n, 3, 3, H, W): generated, nearest by features, nearest by latents
    distances: Tensor  # float64 (n, 2): by features, by latents
    thresholds: Tensor  # float64 (2,)
    description: list[dict[str, Any]]  # for the report: seed, and training sample and distance in each space


@dataclass(frozen=True)
class TrainingComparison:
    """The result for one run."""

    measures: dict[str, Memorisation]  # by space
    shown: NearestImages
    num_held_back: int

    @property
    def description(self) -> dict[str, Any]:
        """The part of the run's row in the report."""
        measures = {space: asdict(measure) for space, measure in self.measures.items()}
        return {"quantile": QUANTILE, **measures, "shown": self.shown.description}

    @property
    def warnings(self) -> list[str]:
        """Reasons to doubt the share of copies."""
        warnings = []
        if self.num_held_back * QUANTILE < 1:
            warnings.append(
                f"{self.num_held_back:,} held-back images are few for a quantile of {QUANTILE:.0%}; hold back at least "
                f"{round(1 / QUANTILE)}"
            )
        for space, measure in self.measures.items():
            if measure.nearest > FARTHER * measure.held_back_nearest:
                warnings.append(
                    f"memorised-{space}: generated images are farther from training samples (median {measure.nearest:.3g}) "
                    f"than held-back ones ({measure.held_back_nearest:.3g}), as images with artefacts are; copies may be missed"
                )
        return warnings


@dataclass(frozen=True)
class NearestSearch:
    """The comparison of generated and held-back images with training samples, in the spaces of features and of latents."""

    out: str  # folder of the evaluation
    training: LatentSet
    held_back: LatentSet
    network: FeatureNetwork
    run: GeneratedImages  # its autoencoder decodes the latents

    @property
    def plan(self) -> str:
        """The search in words."""
        training, held_back = self.training, self.held_back
        return (
            f"nearest of {training.manifest.num_samples:,} training samples of {training.folder}, with a threshold from "
            f"{held_back.manifest.num_samples:,} held-back images of {held_back.folder}"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the result besides the generated images, for the report."""
        return {
            name: {"latents": each.folder, "digest": each.manifest.digest, "count": each.manifest.num_samples}
            for name, each in (("training", self.training), ("held_back", self.held_back))
        }

    def files(self, latents: LatentSet) -> FeatureFiles:
        """Return the files with the features of latents, whether they exist or not."""
        decoder = [self.run.header.autoencoder.content_hash, self.run.settings["precision"]]
        recipe = [latents.manifest.digest, self.network.content_hash, decoder, code_version()]
        folder = storage.join(self.out, f"latents-{manifests.digest(recipe)[:16]}")
        return FeatureFiles(folder, latents.counts)

    def compute_features(self, world: World) -> bool:
        """Compute this rank's share of the features of both sets, and return whether all exist afterwards."""
        complete = [
            self.files(each).compute(functools.partial(self._measure_block, each), world, title)
            for each, title in ((self.training, "training samples"), (self.held_back, "held-back samples"))
        ]
        return all(complete)

    def _measure_block(self, latents: LatentSet, block: int) -> Iterator[Block]:
        views = [latents.read(block, view) for view in latents.views]
        for first in range(0, latents.counts[block], self.run.batch_size):
            batches = [view[first : first + self.run.batch_size] for view in views]
            pooled = [describe([self.network], self._decode(batch))["0.pooled"] for batch in batches]
            yield dict(zip(COLUMNS, pooled, strict=False))

    def _decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents (B, C, h, w), uint8 (B, 3, H, W)."""
        images = self.run.models.load(self.run.name).decode(latents, self.run.batch_size)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def compare(self, generated: Sequence[FeatureFiles]) -> list[TrainingComparison]:
        """Return the results of all runs, from the files of their images, which hold their latents."""
        *of_runs, of_held_back = self._search(generated)
        results = []
        for files, nearest in zip(generated, of_runs, strict=True):
            measures = {space: Memorisation.of(nearest[space], of_held_back[space]) for space in nearest}
            shown = self._nearest_images(files, nearest, measures)
            results.append(TrainingComparison(measures, shown, self.held_back.manifest.num_samples))
        return results

    def _search(self, generated: Sequence[FeatureFiles]) -> list[BySpace]:
        """Return the nearest training samples of each set of images in each space, those of held-back images last."""
        sets = [*generated, self.files(self.held_back)]
        training = self.files(self.training)
        recipe = [files.folder.rpartition("/")[2] for files in (*sets, training)]
        path = storage.join(self.out, f"nearest-{manifests.digest(recipe)[:16]}.safetensors")
        results, done = _resume(path, sets)
        counts = self.training.counts
        with Progress("nearest", sum(counts), "samples", done=sum(counts[:done])) as progress:
            for block in range(done, len(counts)):
                samples = self._samples(training.load(block), block)
                for number, files in enumerate(sets):
                    nearest = self._nearest(files, number == len(generated), samples, sum(counts[:block]))
                    results[number] = {space: results[number][space].merge(nearest[space]) for space in nearest}
                _save(path, results, block + 1)
                progress.advance(counts[block])
        return results

    def _samples(self, features: Block, block: int) -> dict[str, list[Tensor]]:
        """Return the views of the training samples of a block in each space, float64 (M, D)."""
        latents = (self.training.read(block, view).flatten(1) for view in self.training.views)
        views = {FEATURES: (features[name] for name in COLUMNS if name in features), LATENTS: latents}
        return {space: [view.to(self.network.device).double() for view in each] for space, each in views.items()}

    def _nearest(
        self, files: FeatureFiles, are_held_back: bool, samples: dict[str, list[Tensor]], first_row: int
    ) -> BySpace:
        """Return the nearest of some training samples for all images of a set."""
        parts: dict[str, list[NearestSamples]] = {space: [] for space in samples}
        for number, block in enumerate(files.blocks()):
            latents = self.held_back.read(number) if are_held_back else block["latents"]
            for space, points in ((FEATURES, block["0.pooled"]), (LATENTS, latents.flatten(1))):
                scale = points.shape[1] ** -0.5 if space == LATENTS else 1.0
                points = points.to(self.network.device)
                parts[space].append(nearest_samples(points, samples[space], first_row, scale=scale))
        return {space: NearestSamples.join(each) for space, each in parts.items()}

    def _nearest_images(
        self, files: FeatureFiles, nearest: BySpace, measures: dict[str, Memorisation]
    ) -> NearestImages:
        """Return the generated images that are nearest to training samples, in proportion to the threshold of a space."""
        distances = torch.stack([each.distances[:, 0] for each in nearest.values()], 1)
        thresholds = torch.tensor([measures[space].threshold for space in nearest], dtype=torch.float64)
        closeness = (distances / thresholds.clamp_min(torch.finfo(torch.float64).tiny)).amin(1)
        chosen = closeness.argsort(stable=True)[:NUM_SHOWN].tolist()
        rows = {space: each.rows[chosen, 0].tolist() for space, each in nearest.items()}
        latents = [_pick(files, chosen), *(self.training.pick(each) for each in rows.values())]
        images = [torch.cat([self._decode(batch) for batch in each.split(self.run.batch_size)]) for each in latents]
        description = [
            {
                "seed": self.run.first_seed + image,
                **{
                    space: {"training_sample": self.training.key(rows[space][number]), "distance": float(distance)}
                    for space, distance in zip(nearest, distances[image], strict=True)
                },
            }
            for number, image in enumerate(chosen)
        ]
        return NearestImages(torch.stack(images, 1), distances[chosen], thresholds, description)


def _pick(files: FeatureFiles, numbers: Sequence[int]) -> Tensor:
    """Return the latents of some generated images, float32 (B, C, h, w), in the order of their numbers."""
    latents: dict[int, Tensor] = {}
    first = 0
    for block, count in enumerate(files.counts):
        if inside := [number for number in numbers if first <= number < first + count]:
            stored = files.load(block)["latents"]
            latents |= {number: stored[number - first] for number in inside}
        first += count
    return torch.stack([latents[number] for number in numbers])


def _resume(path: str, sets: Sequence[FeatureFiles]) -> tuple[list[BySpace], int]:
    """Return the nearest samples that were found before, and the number of shards that were searched."""
    none = [{space: NearestSamples.none(files.total) for space in (FEATURES, LATENTS)} for files in sets]
    if not storage.exists(path):
        return none, 0
    try:
        tensors, header = tensor_file.load(path)
        results = [
            {
                space: NearestSamples(tensors[f"{number}.{space}.distances"], tensors[f"{number}.{space}.rows"])
                for space in each
            }
            for number, each in enumerate(none)
        ]
        return results, int((header or {})["shards"])
    except (DataError, KeyError) as error:
        logger.warning("%s: %s; searching again", path, on_one_line(error))
        return none, 0


def _save(path: str, results: Sequence[BySpace], shards: int) -> None:
    """Write the nearest samples among the first `shards` shards."""
    tensors = {
        f"{number}.{space}.{name}": tensor
        for number, each in enumerate(results)
        for space, nearest in each.items()
        for name, tensor in (("distances", nearest.distances), ("rows", nearest.rows))
    }
    tensor_file.save(path, tensors, {"shards": shards})
